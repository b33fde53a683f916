"""Each convention takes the steps of the framework whose name it bears, for 120 updates in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_argument, step_of
from peers import PEERS

STEPS = 120
LR = 2.0**-7  # exact in float32, in which Keras and MLX keep the learning rate


def name(value):
    if callable(value):
        return f"{value.__module__.rpartition('.')[2]}.{value.__name__}"
    return ",".join(f"{k}={v}" for k, v in value.items()) or "default"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [(peer.convention, peer.start, settings) for peer in PEERS for settings in peer.settings],
    ids=name,
)
def test_takes_the_steps_of_the_framework(ours, theirs, settings):
    settings = dict(settings)
    lrs = learning_rates(settings.pop("lr", LR), settings.pop("changing_lr", False))
    expected = trajectory(theirs(start(), lrs[0], **settings), lrs)
    got = trajectory(optax_step(ours, start(), lrs, **settings), lrs)

    # Both round every operation to float64, each in its own order: a few units of 1e-16 of parameters of
    # about 1 in each of 120 steps, of which a decaying accumulator forgets what came before.
    for leaf in expected:
        assert expected[leaf].dtype == got[leaf].dtype == np.float64
        assert np.abs(expected[leaf][-1] - start()[leaf]).max() > 0.01  # something has moved
        np.testing.assert_allclose(got[leaf], expected[leaf], rtol=1e-13, atol=1e-13)


# How a framework executes it, and what wraps an optimizer from outside, as Optax's own wrappers do.
NOT_CARRIED_OVER = (
    *(
        "self",
        "params",
        "name",
        "kwargs",
        "capturable",
        "foreach",
        "differentiable",
        "use_locking",
        "use_ema",
    ),
    *("ema_momentum", "ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps"),
)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(peer.convention, peer.signature) for peer in PEERS if peer.signature is not None],
    ids=name,
)
def test_has_the_arguments_of_the_framework(ours, theirs):
    """And their defaults, but None for a 0 by which frameworks say no momentum and no weight decay."""

    def default(p):
        return None if p.name in ("momentum", "weight_decay") and p.default == 0 else p.default

    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, default(p)) for p in parameters if p.name not in (*NOT_CARRIED_OVER, "max_lr")]

    assert arguments(ours) == arguments(theirs().__init__)


def start():
    rng = np.random.default_rng(0)
    return {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}


def learning_rates(peak, changing):
    t = np.arange(STEPS)
    lrs = peak * (0.55 + 0.45 * np.cos(0.3 * t)) if changing else np.full(STEPS, peak)
    return np.float32(lrs).astype(float)


def trajectory(step, lrs):
    """The parameters after each step. Gradients depend on them, and are noisy, uneven and sometimes zero."""
    rng = np.random.default_rng(1)
    params, path = start(), []
    for lr in lrs:
        noise = {k: rng.normal(size=p.shape) * 10 ** rng.uniform(-2, 1, p.shape) for k, p in start().items()}
        zero = {k: rng.random(p.shape) < 0.1 for k, p in start().items()}
        params = step({k: np.where(zero[k], 0.0, params[k] + noise[k]) for k in start()}, lr.item())
        path.append(params)
    return {k: np.stack([params[k] for params in path]) for k in params}


def optax_step(convention, params, lrs, **settings):
    """`convention` behind the interface of `peers`, with the learning rates as its schedule."""
    changing = lrs[0] != lrs[-1]
    lr = jnp.asarray(lrs).__getitem__ if changing else lrs[0].item()
    tx = convention(**{first_argument(convention): lr}, **settings)
    params = jax.tree.map(jnp.asarray, params)
    state, update = tx.init(params), jax.jit(step_of(tx))

    def step(grads, lr):
        del lr
        nonlocal params, state
        params, state = update(params, state, grads)
        return jax.tree.map(np.asarray, params)

    return step
