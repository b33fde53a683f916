"""Models of several kinds, small and on data that is at hand, and runs that train and watch them."""

import re
from functools import cache, partial
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cross_entropy

from rmsprop_jax import Settings, apply_updates, diagnostics, rmsprop


class Model(NamedTuple):
    init: object
    loss: object  # of parameters and a batch
    data: tuple
    batch: int


def normal(key, *shape, gain=1.0):
    return gain * jax.random.normal(key, shape) / np.sqrt(max(1, np.prod(shape[:-1])))


def mlp(off=0.0, norm=lambda x: 0.0):
    """A network on the breast-cancer data. `off` is what its first biases start from, `norm` a penalty."""
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "first": {"kernel": normal(keys[0], 30, 32, gain=1.4), "bias": jnp.full(32, -off)},
            "second": {"kernel": normal(keys[1], 32, 32, gain=1.4), "bias": jnp.zeros(32)},
            "head": {"kernel": normal(keys[2], 32, 2), "bias": jnp.zeros(2)},
        }

    def loss(params, x, y):
        first, second, head = params["first"], params["second"], params["head"]
        h = jax.nn.relu(x.astype(first["kernel"].dtype) @ first["kernel"] + first["bias"])
        h = jax.nn.relu(h @ second["kernel"] + second["bias"])
        return cross_entropy(h @ head["kernel"] + head["bias"], y) + norm(second["bias"])

    return Model(init, loss, (x.astype(np.float32), y.astype(np.int32)), 64)


def cnn(between=lambda x: x):
    """A convolutional network on the digits. `between` is applied after its first layer."""
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1) / 8 - 1

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "conv_1": normal(keys[0], 3, 3, 1, 8, gain=1.4),
            "conv_2": normal(keys[1], 3, 3, 8, 16, gain=1.4),
            "bias": jnp.zeros(16),
            "head": normal(keys[2], 64, 10),
        }

    def loss(params, x, y):
        def conv(x, kernel):
            layout = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)

        h = between(jax.nn.relu(conv(x.astype(params["head"].dtype), params["conv_1"])))
        h = jax.nn.relu(conv(h, params["conv_2"]) + params["bias"])
        return cross_entropy(h.reshape(len(h), -1) @ params["head"], y)

    return Model(init, loss, (x.astype(np.float32), y.astype(np.int32)), 64)


def gru(bias=True):
    """A recurrent network on Python's documentation, with or without the bias of its head in use."""
    text = " ".join(topics[name] for name in sorted(topics))[:200_000]
    alphabet, tokens = np.unique(list(text), return_inverse=True)
    size, hidden, window = len(alphabet), 32, 12
    tokens = tokens[: len(tokens) // window * window].reshape(-1, window)

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "embed": normal(keys[0], size, hidden, gain=np.sqrt(size)),
            "gates": normal(keys[1], 2 * hidden, 2 * hidden),
            "new": normal(keys[2], 2 * hidden, hidden),
            "head": normal(keys[3], hidden, size),
            "bias": jnp.zeros(size),
        }

    def loss(params, tokens):
        def cell(h, x):
            z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, h], -1) @ params["gates"]), 2, -1)
            h = (1 - z) * h + z * jnp.tanh(jnp.concatenate([x, r * h], -1) @ params["new"])
            return h, h

        x = params["embed"][tokens[:, :-1]].swapaxes(0, 1)
        _, h = jax.lax.scan(cell, jnp.zeros_like(x[0]), x)
        return cross_entropy(h @ params["head"] + (params["bias"] if bias else 0.0), tokens[:, 1:].T)

    return Model(init, loss, (tokens.astype(np.int32),), 16)


def linear():
    """Linear regression on the diabetes data."""
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_diabetes(return_X_y=True)
    x, y = (((a - a.mean(0)) / a.std(0)).astype(np.float32) for a in (x, y))

    def loss(params, x, y):
        predicted = x.astype(params["kernel"].dtype) @ params["kernel"] + params["bias"]
        return jnp.mean(jnp.square(predicted.astype(jnp.float32) - y))

    return Model(lambda key: {"kernel": normal(key, 10), "bias": jnp.zeros(())}, loss, (x, y), 32)


def quadratic():
    """Noisy gradients of a bowl, a hundred times as steep in some directions as in others."""
    curvature = np.geomspace(0.1, 10, 50).astype(np.float32)
    noise = np.random.default_rng(0).normal(size=(4096, 50)).astype(np.float32)

    def loss(params, x):
        p = jnp.concatenate([params["flat"], params["steep"]])
        return jnp.mean(jnp.sum(curvature * jnp.square(p - x), -1))

    return Model(lambda key: {"flat": jnp.full(25, 3.0), "steep": jnp.full(25, 3.0)}, loss, (noise,), 8)


MODELS = {
    "mlp": mlp,
    "cnn": cnn,
    "gru": gru,
    "linear": linear,
    "quadratic": quadratic,
    "mlp, switched off": partial(mlp, off=30.0),
    "mlp, norm": partial(mlp, norm=lambda x: 1e-3 * jnp.sqrt(jnp.sum(x**2))),
    "mlp, safe norm": partial(mlp, norm=lambda x: 1e-3 * jnp.sqrt(jnp.sum(x**2) + 1e-12)),
    "cnn, cut": partial(cnn, between=jax.lax.stop_gradient),
    "gru, no bias": partial(gru, bias=False),
}
STEPS = 400


class Run(NamedTuple):
    history: diagnostics.Measurement
    losses: np.ndarray
    final: float  # the loss on all of the data

    @property
    def findings(self):
        return diagnostics.advise(self.history, self.losses)


@cache
def trainer(model, form):
    """A compiled run, with what may vary from one to the next: rates, decay, eps, and factors of the loss."""
    init, loss, data, size = MODELS[model]()
    options = dict(form)
    make, skip = options.pop("make", rmsprop), options.pop("skip", False)
    dtype = jnp.dtype(options.pop("dtype", "float32"))
    rounded = make is rmsprop and dtype != jnp.float32

    # At level 1 the convolutions' gradients compile in half the time.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def run(seed, rates, decay, eps, factors):
        fixed = {} if make is rmsprop else {"decay": 0.999}  # Optax rounds a traced decay otherwise

        def optimizer(rate):
            tx = make(rate, **{"decay": decay, "eps": eps} | fixed | options)
            tx = optax.apply_if_finite(tx, 10**6) if skip else tx
            known = None if hasattr(tx, "settings") else Settings(decay, eps)
            return diagnostics.watch(tx, 5, settings=known)

        def step(carry, now):
            params, state = carry
            t, rate, factor = now
            key = jax.random.fold_in(seed, t)
            rows = jax.random.randint(key, (size,), 0, len(data[0]))
            batch = [jnp.asarray(x)[rows] for x in data]
            value, grads = jax.value_and_grad(lambda p: factor * loss(p, *batch))(params)
            updates, state = optimizer(rate).update(grads, state, params)
            return (apply_updates(params, updates, key=key if rounded else None), state), value

        params = jax.tree.map(lambda p: p.astype(dtype), init(jax.random.fold_in(seed, STEPS)))
        now = jnp.arange(STEPS), rates, factors
        (params, state), losses = jax.lax.scan(step, (params, optimizer(rates[0]).init(params)), now)
        return state, losses, loss(params, *data)

    return run


def train(model, rate, decay=0.9, eps=1e-8, factors=(), seed=0, **form):
    """A run with a rate or schedule, and factors of the loss at some steps, {step: factor}."""
    rates = rate(np.arange(STEPS)) if callable(rate) else rate
    loss_factors = np.ones(STEPS, np.float32)
    for step, factor in dict(factors).items():
        loss_factors[step] = factor
    arguments = (
        jnp.broadcast_to(jnp.asarray(rates), STEPS),
        jnp.asarray(decay),
        jnp.asarray(eps),
        loss_factors,
    )
    run = trainer(model, tuple(sorted(form.items(), key=lambda item: item[0])))
    with jax.numpy_rank_promotion("allow"):  # the models' biases
        state, losses, final = run(jax.random.key(seed), *arguments)
    return Run(diagnostics.history(state), np.asarray(losses), float(final))


def number_after(text, words):
    """The number in an advice."""
    return float(re.search(re.escape(words) + r" ([-+.e\d]*\d)", text)[1])
