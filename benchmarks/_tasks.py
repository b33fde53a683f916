"""The tasks of tasks.py: what is trained, on what, and what is measured.

The networks and data of text, digits and words are quality.py's, smaller.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._frame import example
from benchmarks.quality import digits_task, normal, text_task, words_task


class Task(NamedTuple):
    """The world is what there is beside the parameters: an order of the data, an optimum, carts."""

    start: Callable  # key -> parameters, world
    grads: Callable  # parameters, world, key -> gradients, next world
    measure: Callable  # parameters, world -> scalar


def supervised(make, batch, measured=200):
    """From what quality.py's functions return. The seed draws which three tenths of the data are held out."""
    init, loss, *parts = make()
    data = [jnp.concatenate(both) for both in zip(*parts, strict=True)]
    size = len(data[0])

    def start(key):
        key_init, key_order = jax.random.split(key)
        return init(key_init), jax.random.permutation(key_order, size)

    def grads(params, order, key):
        some = order[jax.random.randint(key, (batch,), 0, size * 7 // 10)]
        return jax.grad(loss)(params, [x[some] for x in data]), order

    def measure(params, order):
        some = order[size * 7 // 10 :][:measured]
        return loss(params, [x[some] for x in data])

    return Task(start, grads, measure)


def table_task(load, loss, outputs, width=32):
    """A network of two hidden layers on one of scikit-learn's tables, its columns standardised."""
    x, y = load(return_X_y=True)
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)
    sizes = (x.shape[1], width, width, outputs)

    def init(key):
        keys = jax.random.split(key, 3)
        weights = [normal(*some) for some in zip(keys, sizes[:-1], sizes[1:], strict=True)]
        return [(w, jnp.zeros(w.shape[1])) for w in weights]

    def of_batch(params, batch):
        h, y = batch
        for w, b in params[:-1]:
            h = jax.nn.relu(h @ w + b)
        w, b = params[-1]
        return loss(h @ w + b, y).mean()

    return init, of_batch, [x, y]


def cancer_task():
    from sklearn.datasets import load_breast_cancer

    return table_task(load_breast_cancer, optax.softmax_cross_entropy_with_integer_labels, 2)


def diabetes_task():
    from sklearn.datasets import load_diabetes

    def load(**options):
        x, y = load_diabetes(**options)
        return x, ((y - y.mean()) / y.std()).astype(np.float32)

    return table_task(load, lambda out, y: jnp.square(out[:, 0] - y), 1)


def cartpole_task(carts=8, rollout=16, gamma=0.99, width=32, value_weight=0.5, entropy_weight=0.01):
    """An actor-critic (A2C). Measured: the mean return of 8 new episodes, at most 500, actions drawn."""
    cartpole = example("actor_critic")

    def start(key):
        keys = jax.random.split(key, 5)
        params = {
            "hidden": normal(keys[0], 4, 2 * width),  # half of it the actor's, half the critic's
            "bias": jnp.zeros(2 * width),
            "actor": normal(keys[1], width, 2) / 10,
            "critic": normal(keys[2], width) / 10,
        }
        return params, (jax.vmap(cartpole.new_cart)(jax.random.split(keys[3], carts)), keys[4])

    def network(params, observation):
        actor, critic = jnp.split(jnp.tanh(observation @ params["hidden"] + params["bias"]), 2, -1)
        return jax.nn.log_softmax(actor @ params["actor"]), critic @ params["critic"]

    def act(params, carts, key):
        log_policy, _ = network(params, carts.observation)
        action = jax.random.categorical(key, log_policy)
        after, outcome = jax.vmap(cartpole.push)(carts, action)
        return after, (carts.observation, action, outcome)

    def loss(params, observation, action, target):
        log_policy, value = network(params, observation)
        chosen = jnp.take_along_axis(log_policy, action[..., None], -1)[..., 0]
        advantage = target - value
        entropy = -jnp.sum(jnp.exp(log_policy) * log_policy, -1)
        return jnp.mean(
            value_weight * advantage**2 - jax.lax.stop_gradient(advantage) * chosen - entropy_weight * entropy
        )

    def grads(params, world, key):
        carts, key_measure = world
        carts, (observation, action, outcome) = jax.lax.scan(
            partial(act, params), carts, jax.random.split(key, rollout)
        )

        def back(following, now):
            outcome, beyond = now
            following = jnp.where(outcome.truncated, beyond, jnp.where(outcome.terminated, 0, following))
            following = (1 - gamma) * outcome.reward + gamma * following  # so that values are at most 1
            return following, following

        _, last = network(params, carts.observation)
        _, beyond = network(params, outcome.observation)
        _, target = jax.lax.scan(back, last, (outcome, beyond), reverse=True)
        return jax.grad(loss)(params, observation, action, target), (carts, key_measure)

    def measure(params, world):
        key_start, key = jax.random.split(world[1])
        carts = jax.vmap(cartpole.new_cart)(jax.random.split(key_start, 8))

        def play(carry, key):
            carts, up = carry
            carts, (_, _, outcome) = act(params, carts, key)
            return (carts, up & ~outcome.terminated), up.mean()

        keys = jax.random.split(key, cartpole.MAX_STEPS)
        return jax.lax.scan(play, (carts, jnp.ones(8, bool)), keys)[1].sum()

    return Task(start, grads, measure)


def drift_task(size=20, batch=8, pace=0.01, noise=0.1):
    """Linear regression whose true weights walk at random. Measured: the squared error expected above noise.

    The inputs have units of their own, from 0.3 to 3; prediction changes equally fast along each.
    """
    units = jnp.geomspace(0.3, 3, size)

    def start(key):
        return jnp.zeros(size), jax.random.normal(key, (size,)) / units

    def grads(params, true, key):
        keys = jax.random.split(key, 3)
        true += pace * jax.random.normal(keys[0], (size,)) / units
        x = units * jax.random.normal(keys[1], (batch, size))
        error = x @ (params - true) + noise * jax.random.normal(keys[2], (batch,))
        return x.T @ error / batch, true

    def measure(params, true):
        return jnp.sum(jnp.square(units * (params - true)))

    return Task(start, grads, measure)


def quadratic_task(size=20):
    """sum(curvature * x^2) / 2, half of the curvatures 1, half 100; noise as curved as the loss."""
    curvature = jnp.repeat(jnp.array([1.0, 100.0]), size // 2)

    def grads(params, world, key):
        return curvature * params + jnp.sqrt(curvature) * jax.random.normal(key, (size,)), world

    def measure(params, _):
        return jnp.sum(curvature * jnp.square(params)) / 2

    return Task(lambda key: (jax.random.normal(key, (size,)), ()), grads, measure)


MAKE = {
    "digits": lambda: supervised(partial(digits_task, 8), 32, 500),
    "text": lambda: supervised(partial(text_task, 32, 24), 16),
    "cancer": lambda: supervised(cancer_task, 32),
    "diabetes": lambda: supervised(diabetes_task, 32),
    "words": lambda: supervised(partial(words_task, 8), 128, 2000),
    "cartpole": cartpole_task,
    "drift": drift_task,
    "quadratic": quadratic_task,
}
