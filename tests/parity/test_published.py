"""Trajectories that the frameworks' own tests print, replayed, to the tolerance that those tests use."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import step_of

from rmsprop_jax import conventions


def replay(tx, params, grads, steps):
    """The parameters after each of `steps` updates by the same gradients."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
    state, path = tx.init(params), []
    for _ in range(steps):
        params, state = step_of(tx)(params, state, grads)
        path.append(params)
    return path, state


# sonnet/src/optimizers/rmsprop_test.py of Sonnet 2.0.2: testDense and testDenseCentered
@pytest.mark.parametrize(
    ("centered", "first", "second", "third"),
    [(False, 0.683772, 0.454357, 0.262262), (True, 0.666667, 0.41176, 0.186776)],
)
def test_sonnet_dense(centered, first, second, third):
    tx = conventions.sonnet(learning_rate=0.1, centered=centered)
    path, _ = replay(tx, [[1.0, 2.0], [3.0, 4.0]], [[5.0, 5.0], [3.0, 3.0]], steps=3)
    for params, moved in zip(path, (first, second, third), strict=True):
        expected = [[moved, moved + 1], [moved + 2, moved + 3]]
        np.testing.assert_allclose(params, expected, rtol=1e-6, atol=1e-6)


# ... testSparse and testSparseCentered, at the one row that has a gradient
@pytest.mark.parametrize(
    ("centered", "path_0", "path_1"),
    [
        (False, (-8.486831, -15.369301, -21.132141), (-5.486784, -12.369237, -18.132067)),
        (True, (-8.999999, -16.64719, -23.396709), (-5.999944, -13.647109, -20.39661)),
    ],
)
def test_sonnet_sparse(centered, path_0, path_1):
    tx = conventions.sonnet(learning_rate=3.0, centered=centered)
    path, _ = replay(tx, [1.0, 4.0], [0.1, 0.01], steps=3)
    np.testing.assert_allclose(path, np.stack([path_0, path_1], axis=1), rtol=1e-4)


# ... testVariableHyperParams
def test_sonnet_changes_the_learning_rate():
    tx = conventions.sonnet(learning_rate=lambda count: jnp.where(count == 0, 0.1, 0.01))
    path, _ = replay(tx, [1.0, 4.0], [5.0, 3.0], steps=2)
    np.testing.assert_allclose(path, [[0.683772, 3.683772], [0.660831, 3.660831]], rtol=1e-6)


# keras/src/optimizers/rmsprop_test.py of Keras 3.15: test_single_step
def test_keras_single_step():
    (params,), _ = replay(conventions.keras(0.5), [1.0, 2.0, 3.0, 4.0], [1.0, 6.0, 7.0, 2.0], steps=1)
    np.testing.assert_allclose(params, [-0.5811, 0.4189, 1.4189, 2.4189], rtol=1e-4, atol=1e-4)


# ... test_weight_decay
def test_keras_weight_decay():
    (params,), _ = replay(conventions.keras(1.0, weight_decay=0.004), 2.0, 0.0, steps=1)
    # Theirs asks for 6 decimals of 1.9760959, which is 2 * (1 - 0.004)^3; one update gives 2 * (1 - 0.004).
    np.testing.assert_allclose(params, 2.0 * (1 - 0.004), atol=1e-6)


# ... test_correctness_with_golden
def test_keras_golden():
    tx = conventions.keras(centered=True)
    params, state = jnp.ones(10), tx.init(jnp.ones(10))
    gradients = [jnp.full(10, 0.01)] + 4 * [jnp.arange(0.1, 1.1, 0.1)]
    for g, expected in zip(gradients, [0.9967, 0.9933, 0.9908, 0.9885, 0.9864], strict=True):
        params, state = step_of(tx)(params, state, g)
        np.testing.assert_allclose(params, expected, rtol=5e-4, atol=5e-4)


# tensorflow/python/training/rmsprop_test.py: testWithoutMomentum
def test_tensorflow_without_momentum():
    tx = conventions.tensorflow(learning_rate=2.0, decay=0.9, momentum=0.0, epsilon=1.0)
    path, state = replay(tx, [1.0, 3.0], [0.1, 0.01], steps=2)
    np.testing.assert_allclose(
        optax.tree.get(state, "nu"), [0.901 * 0.9 + 0.001, 0.90001 * 0.9 + 1e-5], rtol=1e-6
    )
    first = np.array([0.1 * 2.0 / math.sqrt(0.901 + 1.0), 0.01 * 2.0 / math.sqrt(0.90001 + 1.0)])
    second = np.array(
        [
            0.1 * 2.0 / math.sqrt(0.901 * 0.9 + 0.001 + 1.0),
            0.01 * 2.0 / math.sqrt(0.90001 * 0.9 + 1e-5 + 1.0),
        ]
    )
    np.testing.assert_allclose(path, [[1, 3] - first, [1, 3] - first - second], rtol=1e-6)


# ... testWithMomentum
def test_tensorflow_with_momentum():
    tx = conventions.tensorflow(learning_rate=2.0, decay=0.9, momentum=0.5, epsilon=1e-5)
    path, state = replay(tx, [1.0, 3.0], [0.1, 0.01], steps=2)
    first = np.array([0.1 * 2.0 / math.sqrt(0.901 + 1e-5), 0.01 * 2.0 / math.sqrt(0.90001 + 1e-5)])
    second = 0.5 * first + [
        0.1 * 2.0 / math.sqrt(0.901 * 0.9 + 0.001 + 1e-5),
        0.01 * 2.0 / math.sqrt(0.90001 * 0.9 + 2e-5),
    ]
    np.testing.assert_allclose(path, [[1, 3] - first, [1, 3] - first - second], rtol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "trace"), -second, rtol=1e-6)
