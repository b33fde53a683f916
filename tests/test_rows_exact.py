"""Exact mode: the dense trajectory, for tables of every dtype and shape."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import each, quick
from tables import rare_rows, run_dense, run_rows

from rmsprop_jax import apply_updates, rmsprop, rows, warmup
from rmsprop_jax.rows import RowGradient

EXACT = {
    "default": {"decay": 0.99},
    "long_memory": {"decay": 0.999},
    "outside": {"decay": 0.99, "eps_in_sqrt": False},
    "from_one": {"decay": 0.99, "initial_scale": 1.0},
    "corrected": {"decay": 0.99, "bias_correction": True},
    "short_memory": {"decay": 0.5, "eps": 1e-3},
}


FEW = [("outside", False), ("corrected", True), ("short_memory", False)]


@pytest.mark.parametrize(
    ("name", "schedule"), quick([(name, changing) for name in EXACT for changing in (False, True)], FEW)
)
def test_exact_is_the_dense_trajectory(name, schedule, x64):
    """As close to the dense optimizer in float64 as the dense optimizer in float32 is."""
    form = EXACT[name]
    learning_rate = warmup(optax.cosine_decay_schedule(1e-2, 4000), steps=500) if schedule else 1e-2
    ids, values = rare_rows(steps=4000, batch=12, num_rows=40, width=3)
    assert np.all(ids[1:-1] != 38)  # a row that is not touched for 3,998 steps
    table = jnp.asarray(np.random.default_rng(1).normal(size=(40, 3)), jnp.float32)

    ours, state = run_rows(rows.exact(rmsprop(learning_rate, **form)), table, ids, values)
    dense, _ = run_dense(rmsprop(learning_rate, **form), table, ids, values)
    truth, _ = run_dense(
        rmsprop(learning_rate, **form), table.astype(jnp.float64), ids, values.astype(np.float64)
    )
    assert ours.dtype == jnp.float32
    moved = np.abs(truth - table).max()
    assert moved > 0.1
    rounding = np.abs(dense - truth).max()
    assert rounding < 1e-4
    assert np.abs(ours - truth).max() <= 2 * rounding
    np.testing.assert_array_equal(ours[39], table[39])
    assert state.last[39] == 0
    assert state.last[38] == state.last[0] == 4000


@each(form=EXACT)
def test_exact_is_optax_rmsprop_too(form):
    ids, values = rare_rows(steps=1000, batch=8, num_rows=20, width=2)
    table = jnp.ones((20, 2))
    ours, _ = run_rows(rows.exact(rmsprop(1e-3, **form)), table, ids, values)
    dense, _ = run_dense(optax.rmsprop(1e-3, **form), table, ids, values)
    # A thousand steps of up to 1e-3, each rounded to the table's 6e-8; optax corrects in another order.
    np.testing.assert_allclose(ours, dense, rtol=0, atol=2e-5)


@pytest.mark.parametrize("missed", [0, 1, 1000, 12_345_678, 2**31 - 2])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 3e-8])
def test_what_was_missed_is_decayed_accurately(decay, missed):
    """To a few float32 roundings, however long it was, of the decay given, not the float32 nearest to it."""
    tx = rows.exact(rmsprop(1.0, decay=decay, eps=0.0))
    state = tx.init(jnp.zeros((1, 1)))
    rms = state.dense[0]._replace(count=jnp.int32(missed), nu=jnp.full((1, 1), 2.0))
    state = state._replace(dense=(rms, *state.dense[1:]))
    gradient = RowGradient(jnp.array([0]), jnp.zeros((1, 1)), 1)
    _, state = tx.update(gradient, state)
    steps = missed + 1
    expected = 2.0 * math.exp(steps * math.log1p(-(1 - decay))) if decay else 0.0
    found = float(state.dense[0].nu[0, 0])
    assert found == pytest.approx(expected, rel=3e-6, abs=1e-37)
    assert state.last[0] == steps


def test_a_traced_decay_is_decayed_to_its_own_precision():
    tx = optax.inject_hyperparams(
        lambda lr, decay: rows.exact(rmsprop(lr, decay)), hyperparam_dtype=jnp.float32
    )(0.1, 0.99)
    table = jnp.ones((3, 2))
    state = tx.init(table)
    step = jax.jit(tx.update)
    dense = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(0.1, decay=0.99)
    dense_state, dense_table = dense.init(table), table
    for ids in ([0, 1], [1, 1], [1, 2], [0, 2]):
        gradient = RowGradient(jnp.array(ids), jnp.array([[1.0, 2.0], [3.0, -4.0]]), 3)
        updates, state = step(gradient, state, table)
        table = apply_updates(table, updates)
        dense_updates, dense_state = dense.update(gradient.to_dense(), dense_state, dense_table)
        dense_table = optax.apply_updates(dense_table, dense_updates)
    np.testing.assert_allclose(table, dense_table, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tables_of_other_dtypes(dtype, x64):
    """Gradients and updates in the table's dtype, arithmetic and state in float32 at least."""
    ids, values = rare_rows(steps=50, batch=6, num_rows=10, width=2)
    table = jnp.ones((10, 2), dtype)
    ours, state = run_rows(rows.exact(rmsprop(0.05, decay=0.999)), table, ids, jnp.asarray(values, dtype))
    assert ours.dtype == dtype
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    assert state.dense[0].nu.dtype == wide
    truth, _ = run_dense(
        rmsprop(0.05, decay=0.999), table.astype(jnp.float64), ids, values.astype(np.float64)
    )
    # Each of the 50 steps, up to 1.6 large, rounds gradient, update and table once.
    tolerance = 50 * 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(ours.astype(np.float64), truth, rtol=0, atol=tolerance)


def test_numeric_rules_hold_row_by_row():
    """Zero stays zero, a huge gradient is finite, and NaN is seen in its own row alone."""
    tx = rows.exact(rmsprop(1.0, decay=0.75, eps=0.0))
    gradient = RowGradient(jnp.array([0, 1, 2]), jnp.array([[0.0], [3e38], [jnp.nan]]), 4)
    updates, state = tx.update(gradient, tx.init(jnp.zeros((4, 1))))
    dense = updates.to_dense()[:, 0]
    np.testing.assert_array_equal(dense[jnp.array([0, 3])], 0.0)
    assert dense[1] == pytest.approx(-2.0)
    assert jnp.isnan(dense[2])
    assert jnp.all(jnp.isfinite(state.dense[0].nu[:2]))


def test_state_goes_through_tree_map_params_and_eval_shape():
    """With `last` a leaf per table, state can be laid out, saved and restored like any other."""
    tables = {"a": jnp.ones((4, 2)), "b": jnp.ones((3, 5)), "c": None}
    tx = rows.exact(rmsprop(0.1))
    state = tx.init(tables)
    shapes = jax.eval_shape(tx.init, tables)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)
    marked = optax.tree.map_params(tx, lambda x: "table", state, transform_non_params=lambda x: "other")
    assert marked.last == {"a": "table", "b": "table", "c": None}
    assert marked.dense[0].nu == {"a": "table", "b": "table", "c": None}
    assert marked.dense[0].count == "other"


def test_tables_with_one_axis_and_with_three():
    for shape in ((6,), (6, 2, 3)):
        table = jnp.ones(shape)
        ids = jnp.array([1, 1, 5])
        _, (grads, _) = rows.value_and_grad(lambda x, _: jnp.sum(x**2))(table, ids, None)
        tx = rows.exact(rmsprop(0.1, decay=0.75))
        updates, _ = tx.update(grads, tx.init(table))
        new = apply_updates(table, updates)
        np.testing.assert_allclose(new[jnp.array([1, 5])], 0.8, rtol=1e-5)
        np.testing.assert_array_equal(new[jnp.array([0, 2, 3, 4])], 1.0)


def test_complex_tables():
    tx = rows.exact(rmsprop(1.0, decay=0.75, eps=0.0))
    gradient = RowGradient(jnp.array([1]), jnp.array([[3 + 4j]]), 2)
    updates, _ = tx.update(gradient, tx.init(jnp.zeros((2, 1), jnp.complex64)))
    np.testing.assert_allclose(updates.to_dense(), [[0], [-2 * (0.6 + 0.8j)]], rtol=1e-5)


def test_vmap_over_tables():
    tables = jnp.arange(24.0).reshape(2, 6, 2)
    ids = jnp.array([[0, 0, 3], [5, 1, 9]])
    tx = rows.exact(rmsprop(0.1))

    def step(table, ids):
        _, (grads, _) = rows.value_and_grad(lambda x, _: jnp.sum(jnp.sin(x)))(table, ids, None)
        updates, _ = tx.update(grads, tx.init(table))
        return apply_updates(table, updates)

    together = jax.jit(jax.vmap(step))(tables, ids)
    one_by_one = jnp.stack([jax.jit(step)(*pair) for pair in zip(tables, ids, strict=True)])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6)
