"""From Optax's states and back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CODES, assert_trees_close, each_accumulator, step_of

from rmsprop_jax import interop, rmsprop

PARAMS = {"fc": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}, "scale": jnp.float32(1.0)}


def run(tx, params, state, steps):
    step = step_of(tx)
    for t in range(steps):
        grads = jax.tree.map(lambda p: jnp.sin(p * 3 + t) - 0.2 * p, params)  # noqa: B023
        params, state = step(params, state, grads)
    return params, state


OPTAX = [
    {},
    {"momentum": 0.9},
    {"centered": True, "momentum": 0.9, "initial_scale": 1.0},
    {"momentum": 0.9, "bias_correction": True},
]


@pytest.mark.parametrize("settings", OPTAX, ids=str)
def test_optax_there_and_back(settings):
    schedule = optax.cosine_decay_schedule(0.03, 40)
    theirs, ours = optax.rmsprop(schedule, **settings), rmsprop(schedule, **settings)
    params, their_state = run(theirs, PARAMS, theirs.init(PARAMS), 20)
    state = interop.from_optax(their_state, ours.init(PARAMS))
    assert optax.tree.get_all_with_path(state, "count")[0][1] == 20
    assert_trees_close(
        run(ours, params, state, 10)[0], run(theirs, params, their_state, 10)[0], rtol=1e-5
    )  # float32, 10 updates
    assert_trees_close(interop.to_optax(state, theirs.init(PARAMS)), their_state, rtol=1e-6)


def test_optax_without_a_count_of_its_own():
    theirs, ours = optax.rmsprop(0.1), rmsprop(0.1)
    _, their_state = run(theirs, PARAMS, theirs.init(PARAMS), 3)
    assert interop.from_optax(their_state, ours.init(PARAMS))[0].count == 0
    assert interop.from_optax(their_state, ours.init(PARAMS), count=3)[0].count == 3


def test_optax_that_does_not_fit():
    with pytest.raises(ValueError, match="'scale' has no trace, which 'scale' needs"):
        interop.from_optax(optax.rmsprop(0.1).init(PARAMS), rmsprop(0.1, momentum=0.9).init(PARAMS))
    with pytest.raises(ValueError, match="'scale' has a mu, for which this optimizer has no place"):
        interop.to_optax(rmsprop(0.1, centered=True).init(PARAMS), optax.rmsprop(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="no RMSProp in it"):
        interop.from_optax(optax.adam(0.1).init(PARAMS), rmsprop(0.1).init(PARAMS))


@each_accumulator(CODES)
def test_small_accumulators_are_carried_over_to_optax_and_back(accumulator):
    params = {"w": jnp.zeros((40, 30))}
    tx, theirs = rmsprop(0.1, accumulator=accumulator), optax.rmsprop(0.1)
    _, state = tx.update({"w": jnp.full((40, 30), 3.0)}, tx.init(params))
    carried = interop.to_optax(state, theirs.init(params))
    nu = optax.tree.get(carried, "nu")["w"]
    assert nu.dtype == jnp.float32
    np.testing.assert_allclose(nu.mean(), 0.9, rtol=1e-2)
    back = interop.from_optax(carried, tx.init(params), count=1)
    assert back[0].nu[accumulator]["w"].dtype.name == accumulator
    chex.assert_trees_all_equal(back[0], state[0])  # what is on the grid stays there
