"""Lazy mode: what TensorFlow's sparse kernels do, row by row."""

import jax.numpy as jnp
import numpy as np
from helpers import each
from tables import rare_rows, run_rows

from rmsprop_jax import rmsprop, rows

LAZY = {
    "plain": {},
    "outside": {"eps_in_sqrt": False, "initial_scale": 1.0},
    "momentum": {"momentum": 0.8},
    "centered_momentum": {"momentum": 0.8, "centered": True},
    "lr_after_momentum": {"momentum": 0.8, "lr_in_momentum": False, "weight_decay": 0.01},
    "weight_decay": {"weight_decay": 0.01},
}


def lazy_reference(table, ids, values, *, lr, decay=0.9, eps=1e-8, eps_in_sqrt=True, initial_scale=0.0,
                   momentum=None, centered=False, lr_in_momentum=True, weight_decay=0.0):  # fmt: skip
    """What TensorFlow's sparse kernels do, row by row, in float64."""
    p, nu = table.astype(float), np.full(table.shape, initial_scale)
    mu, b = np.zeros(table.shape), np.zeros(table.shape)
    for step_ids, step_values in zip(ids, values, strict=True):
        for i in np.unique(step_ids):
            g = step_values[step_ids == i].astype(float).sum(axis=0)
            nu_i = decay * nu[i] + (1 - decay) * g**2
            if centered:
                nu_i = decay * nu[i] + decay * (1 - decay) * (g - mu[i]) ** 2
                mu[i] = decay * mu[i] + (1 - decay) * g
            nu[i] = nu_i
            u = g / np.sqrt(nu[i] + eps) if eps_in_sqrt else g / (np.sqrt(nu[i]) + eps)
            if momentum is None:
                step = lr * u
            elif lr_in_momentum:
                step = b[i] = momentum * b[i] + lr * u
            else:
                b[i] = momentum * b[i] + u
                step = lr * b[i]
            p[i] -= step + lr * weight_decay * p[i]
    return p


@each(form=LAZY)
def test_lazy_leaves_untouched_rows_as_they_are(form):
    ids, values = rare_rows(steps=60, batch=6, num_rows=12, width=2)
    table = jnp.asarray(np.random.default_rng(1).normal(size=(12, 2)), jnp.float32)
    ours, state = run_rows(rows.lazy(rmsprop(0.01, eps=1e-3, **form)), table, ids, values)
    expected = lazy_reference(np.asarray(table), ids, values, lr=0.01, eps=1e-3, **form)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6)  # 60 steps of 0.01 in float32
    never = np.setdiff1d(np.arange(12), ids)
    np.testing.assert_array_equal(ours[never], table[never])
    assert state.last is None
