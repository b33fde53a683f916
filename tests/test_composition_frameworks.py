"""In Flax and Equinox, as an Optax transformation is used there."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import cross_entropy

from rmsprop_jax import rmsprop, warmup


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), rmsprop(warmup(3e-3), momentum=0.5))


def test_flax_nnx_optimizer(digits):
    images, labels = digits
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(64, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs), nnx.relu, nnx.Linear(32, 10, rngs=rngs)
    )
    trainer = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer):
        value, grads = nnx.value_and_grad(lambda m: cross_entropy(m(images), labels))(model)
        trainer.update(model, grads)
        return value

    losses = [step(model, trainer) for _ in range(60)]
    assert losses[-1] < 0.2 < 2 < losses[0]


def test_flax_linen_train_state(digits):
    images, labels = digits
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])
    params = model.init(jax.random.key(0), images)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer())

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(
            lambda p: cross_entropy(state.apply_fn({"params": p}, images), labels)
        )(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(60):
        state, value = step(state)
        losses.append(value)
    assert losses[-1] < 0.5 < 2 < losses[0]


def test_equinox(digits):
    images, labels = digits
    model = eqx.nn.MLP(64, 10, 32, 1, key=jax.random.key(0))
    tx = optimizer()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(lambda m: cross_entropy(jax.vmap(m)(images), labels))(model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(60):
        model, state, value = step(model, state)
        losses.append(value)
    assert losses[-1] < 0.5 < 2 < losses[0]
