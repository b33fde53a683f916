"""Row-sparse gradients in Optax's transformations: the result of dense ones, or an error; never another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close

from rmsprop_jax import accumulators, apply_updates, rmsprop, rows
from rmsprop_jax.rows import RowGradient

PARAMS = {"table": jnp.arange(1.0, 15.0).reshape(7, 2), "dense": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
IDS = jnp.array([1, 3, 1, -1, 9])  # one twice, one out of range on either side


def gradients(scale=1.0, bad=None):
    values = scale * jnp.array([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 10.0]])
    values = values if bad is None else values.at[1, 0].set(bad)
    return {"table": RowGradient(IDS, values, 7), "dense": scale * jnp.array([[0.5, -0.25], [2.0, 1.0]])}


def dense(tree):
    is_rows = lambda x: isinstance(x, RowGradient)  # noqa: E731
    return jax.tree.map(lambda x: x.to_dense() if is_rows(x) else x, tree, is_leaf=is_rows)


def schedule(count):
    return 0.5 / (1 + count)


# All that Optax's documentation lists as a gradient transformation and that takes no further arguments.
SAME = {
    "chain": optax.chain(optax.zero_nans(), optax.clip_by_global_norm(0.1), optax.scale(3.0)),
    "clip": optax.clip(0.3),
    "clip_by_global_norm": optax.clip_by_global_norm(0.7),
    "identity": optax.identity(),
    "injected": optax.inject_hyperparams(optax.clip_by_global_norm)(0.7),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
    "masked": optax.masked(optax.add_decayed_weights(0.1), {"table": False, "dense": True}),
    "noise on the rest": optax.masked(optax.add_noise(0.1, 0.1, 0), {"table": False, "dense": True}),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "scale": optax.scale(-0.1),
    "scale_by_learning_rate": optax.scale_by_learning_rate(schedule),
    "scale_by_schedule": optax.scale_by_schedule(schedule),
    "scale_by_sign": optax.scale_by_sign(),
    "set_to_zero": optax.set_to_zero(),
    "stateless": optax.stateless_with_tree_map(lambda g, p: 2 * g),
    "zero_nans": optax.zero_nans(),
}
WRAPPED = {name: rows.values_only(tx) for name, tx in SAME.items()}  # once: each is compiled once
REFUSED = {
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "add_noise": optax.add_noise(0.1, 0.1, 0),
    "apply_every": optax.apply_every(2),
    "clip_by_block_rms": optax.clip_by_block_rms(0.1),
    "clip_by_block_rms, of large ones": optax.clip_by_block_rms(1e3),
    "ema": optax.ema(0.9),
    "scale_by_adadelta": optax.scale_by_adadelta(),
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_adamax": optax.scale_by_adamax(),
    "scale_by_amsgrad": optax.scale_by_amsgrad(),
    "scale_by_belief": optax.scale_by_belief(),
    "scale_by_factored_rms": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "scale_by_lion": optax.scale_by_lion(),
    "scale_by_novograd": optax.scale_by_novograd(),
    "scale_by_optimistic_gradient": optax.scale_by_optimistic_gradient(),
    "scale_by_param_block_norm": optax.scale_by_param_block_norm(),
    "scale_by_param_block_rms": optax.scale_by_param_block_rms(),
    "scale_by_radam": optax.scale_by_radam(),
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_rprop": optax.scale_by_rprop(0.1),
    "scale_by_rss": optax.scale_by_rss(),
    "scale_by_sm3": optax.scale_by_sm3(),
    "scale_by_stddev": optax.scale_by_stddev(),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "scale_by_yogi": optax.scale_by_yogi(),
    "trace": optax.trace(0.9),
}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", SAME)
def test_the_result_is_that_of_dense_gradients(name, scale):
    tx, wrapped = SAME[name], WRAPPED[name]
    state, dense_state = wrapped.init(PARAMS), tx.init(PARAMS)
    for _ in range(2):
        updates, state = jax.jit(wrapped.update)(gradients(scale), state, PARAMS)
        expected, dense_state = jax.jit(tx.update)(dense(gradients(scale)), dense_state, PARAMS)
        assert isinstance(updates["table"], RowGradient)
        assert_trees_close(dense(updates), expected, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_result_is_refused(name):
    wrapped = rows.values_only(REFUSED[name])
    state = jax.eval_shape(wrapped.init, PARAMS)
    with pytest.raises(ValueError, match=r"Invalid tx: .*(to_dense|rows\.lazy)"):
        jax.eval_shape(wrapped.update, gradients(), state, PARAMS)


def test_nans_are_set_to_zero_in_their_place():
    wrapped = rows.values_only(optax.zero_nans())
    updates, state = wrapped.update(gradients(bad=jnp.nan), wrapped.init(PARAMS))
    expected, dense_state = optax.zero_nans().update(
        dense(gradients(bad=jnp.nan)), optax.zero_nans().init(PARAMS)
    )
    assert_trees_close(dense(updates), expected, rtol=0)
    assert_trees_close(state, dense_state, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_the_global_norm_is_that_of_dense_gradients(scale):
    norm = rows.global_norm(gradients(scale))
    np.testing.assert_allclose(norm, optax.tree.norm(dense(gradients(scale))), rtol=1e-6)
    # What a norm of Optax's sees: repeated ids apart, and the ids themselves.
    assert not np.isclose(optax.tree.norm(gradients(scale)), norm)


def test_a_frozen_table_stays_out():
    wrapped = rows.values_only(optax.clip_by_global_norm(0.1))
    updates, _ = wrapped.update({**gradients(), "table": None}, wrapped.init(PARAMS), PARAMS)
    assert updates["table"] is None
    np.testing.assert_allclose(optax.tree.norm(updates["dense"]), 0.1, rtol=1e-6)


def test_micro_batches_are_concatenated_and_multi_steps_says_so():
    g = gradients()["table"]
    both = RowGradient.concatenated([g, g])
    assert_trees_close(both.to_dense(), 2 * g.to_dense(), rtol=1e-6)
    tx = optax.MultiSteps(rows.exact(rmsprop(0.1)), 2)
    # Before Optax 0.2.8 it is JAX that says that a RowGradient is no array.
    message = r"optax\.MultiSteps.*RowGradient\.concatenated|expected type: .*RowGradient"
    with pytest.raises(ValueError, match=message):
        tx.update(g, tx.init(PARAMS["table"]), PARAMS["table"])


# rows.lazy: any optimizer whose state follows its parameters.

OPTIMIZERS = {
    "adagrad": optax.adagrad(0.1),
    "adam": optax.adam(0.1),
    "adamw, scheduled": optax.adamw(schedule),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
    "lion": optax.lion(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "rmsprop": rmsprop(0.1, momentum=0.9, centered=True, weight_decay=0.1),
    "optax.rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "sgd": optax.sgd(0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_touched_rows_take_the_steps_of_the_optimizer(name):
    """Of a table that has only these rows; the others and their state stay as they are."""
    table, ids = PARAMS["table"], jnp.array([3, 1])
    values = jnp.array([[1.0, -2.0], [3.0, 4.0]])
    tx = OPTIMIZERS[name]
    wrapped = rows.lazy(tx)
    state, small, small_state = wrapped.init(table), table[ids], tx.init(table[ids])
    for t in range(3):
        updates, state = jax.jit(wrapped.update)(RowGradient(ids, (1 + t) * values, 7), state, table)
        table = apply_updates(table, updates)
        expected, small_state = jax.jit(tx.update)((1 + t) * values, small_state, small)
        small = optax.apply_updates(small, expected)
    np.testing.assert_allclose(table[ids], small, rtol=1e-6)
    untouched = np.array([0, 2, 4, 5, 6])
    np.testing.assert_array_equal(table[untouched], PARAMS["table"][untouched])


@pytest.mark.parametrize("tx", [optax.adafactor(0.1, min_dim_size_to_factor=2), optax.sm3(0.1)])
def test_a_state_that_does_not_follow_its_parameters_is_refused(tx):
    with pytest.raises(ValueError, match=r"Invalid tx: its state for parameter '(table|dense).*rows\.lazy"):
        rows.lazy(tx).init(PARAMS)


@pytest.mark.parametrize("accumulator", ["uint8", "bfloat16"])
def test_touched_rows_of_small_accumulators_are_rounded_without_bias(accumulator):
    """Rows round by their places in the batch; to nearest, a decay of 0.999 would never let `nu` fall."""
    txs = [rows.lazy(rmsprop(0.1, 0.999, accumulator=name)) for name in ("float32", accumulator)]

    def step(states, t):
        ids = jax.random.permutation(jax.random.key(t), 64)[:8]
        g = RowGradient(ids, jnp.where(t < 100, 1.0, 0.01) * jnp.ones((8, 32)), 64)
        return [tx.update(g, state)[1] for tx, state in zip(txs, states, strict=True)], None

    states, _ = jax.lax.scan(step, [tx.init(jnp.zeros((64, 32))) for tx in txs], jnp.arange(4000))
    exact, stored = (accumulators.decoded(state.dense[0]) for state in states)
    assert jnp.median(exact) < 0.8 * exact.max()
    # To nearest, 1.3. What one byte stores is unbiased between the number and its logarithm.
    np.testing.assert_allclose(np.sqrt(stored / exact).mean(), 1, atol=0.04)


@pytest.mark.parametrize("accumulator", [*accumulators.NAMED][1:])
def test_exact_refuses_small_accumulators_by_name(accumulator):
    with pytest.raises(ValueError, match=f"Invalid accumulator: .*{accumulator!r}.*rows.lazy"):
        rows.exact(rmsprop(0.1, accumulator=accumulator))


@pytest.mark.parametrize("tx", [optax.rmsprop(0.1), optax.chain(rmsprop(0.1))])
def test_exact_has_to_know_the_decay(tx):
    with pytest.raises(ValueError, match=r"Invalid tx: rows\.exact has to know its decay"):
        rows.exact(tx)
