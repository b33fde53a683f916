"""apply_updates: Optax's for dense updates, a scatter for row-sparse ones."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import copies

from rmsprop_jax import apply_updates, rmsprop, rows
from rmsprop_jax.rows import RowGradient

PARAMS = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(2, jnp.bfloat16), "none": None}


def test_dense_updates_are_optax_s():
    updates = {"w": jnp.full((3, 2), 0.5), "b": jnp.full(2, 0.3), "none": None}
    ours, theirs = apply_updates(PARAMS, updates), optax.apply_updates(PARAMS, updates)
    chex.assert_trees_all_equal(ours, theirs)
    chex.assert_trees_all_equal_dtypes(ours, theirs)


def test_a_scalar_update_is_broadcast_as_in_optax():
    np.testing.assert_array_equal(apply_updates(jnp.ones(3), jnp.float32(1.0)), jnp.full(3, 2.0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_added_up_and_those_out_of_range_dropped(dtype):
    table = jnp.ones((4, 2), dtype)
    update = RowGradient(jnp.array([1, 3, 1, -1, 4]), jnp.arange(10, dtype=dtype).reshape(5, 2), 4)
    new = apply_updates(table, update)
    assert new.dtype == dtype
    np.testing.assert_array_equal(new.astype(jnp.float32), [[1, 1], [5, 7], [1, 1], [3, 4]])


def test_small_row_updates_of_a_small_dtype_are_added_up_first():
    """In bfloat16, 256 + 1 is 256; 256 + (1 + 1) is not."""
    table = jnp.full((2, 1), 256, jnp.bfloat16)
    update = RowGradient(jnp.array([1, 1]), jnp.ones((2, 1), jnp.bfloat16), 2)
    np.testing.assert_array_equal(apply_updates(table, update).astype(jnp.float32), [[256], [258]])


def test_wide_updates_of_a_narrow_table_are_rounded_once():
    """As a dense update is: 1 + 0.00586 is 1.0078125 in bfloat16."""
    value = jnp.full((1, 1), 0.00586, jnp.float32)
    by_rows = apply_updates(jnp.ones((1, 1), jnp.bfloat16), RowGradient(jnp.array([0]), value, 1))
    dense = optax.apply_updates(jnp.ones((1, 1), jnp.bfloat16), value)
    assert by_rows == dense == 1.0078125


def test_in_place_when_donated():
    num_rows = 10_007
    table = jnp.ones((num_rows, 4))
    update = RowGradient(jnp.array([3, 5]), jnp.ones((2, 4)), num_rows)
    compiled = jax.jit(apply_updates, donate_argnums=0).lower(table, update).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < num_rows
    assert compiled.memory_analysis().alias_size_in_bytes == table.nbytes
    assert not [line for line in copies(compiled) if str(num_rows) in line]


def test_a_mixed_tree_in_one_call():
    params = {"embed": {"words": jnp.zeros((5, 2)), "tags": jnp.zeros((3, 2))}, "out": jnp.ones(2)}
    labels = {"embed": "rows", "out": "dense"}
    tx = optax.partition({"rows": rows.exact(rmsprop(0.1, 0.75)), "dense": rmsprop(0.1, 0.75)}, labels)
    grads = {
        "embed": {
            "words": RowGradient(jnp.array([2]), jnp.ones((1, 2)), 5),
            "tags": RowGradient(jnp.array([0, 0]), jnp.ones((2, 2)), 3),
        },
        "out": jnp.ones(2),
    }
    updates, _ = tx.update(grads, tx.init(params), params)
    new = apply_updates(params, updates)
    np.testing.assert_allclose(new["embed"]["words"][2], -0.2, rtol=1e-6)
    np.testing.assert_allclose(new["embed"]["tags"][0], -0.2, rtol=1e-6)
    np.testing.assert_allclose(new["out"], 0.8, rtol=1e-6)
    assert jnp.sum(new["embed"]["words"] != 0) == jnp.sum(new["embed"]["tags"] != 0) == 2


def test_updates_that_do_not_fit_are_named():
    update = RowGradient(jnp.array([0]), jnp.ones((1, 2)), 4)
    with pytest.raises(ValueError, match=r"Row-sparse update 'w' has shape \(4, 2\).*\(3, 2\)"):
        apply_updates({"w": jnp.ones((3, 2))}, {"w": update})
    for shape, own in (((3,), (3, 2)), ((4, 3, 2), (3, 2)), ((3, 2), (1, 2)), ((0, 2), (1, 2))):
        with pytest.raises(
            ValueError, match=rf"'w' has shape {re.escape(str(shape))}.* {re.escape(str(own))}"
        ):
            apply_updates({"w": jnp.ones(own)}, {"w": jnp.ones(shape)})
    with pytest.raises(ValueError, match=r"Update 'w' has no parameter"):
        apply_updates({"w": None}, {"w": jnp.ones(2)})


# Stochastic rounding of low-precision parameters.


@pytest.mark.parametrize("key", [0, 0.5, "key", np.zeros(2, np.uint32), jnp.zeros(2)], ids=repr)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match=r"Invalid key: key=.*jax\.random"):
        apply_updates(PARAMS, PARAMS, key=key)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_with_a_key_small_updates_add_up_in_the_mean(dtype):
    params = {"w": jnp.ones((40, 50), dtype), "b": jnp.ones((), dtype)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-4), params)

    @jax.jit
    def step(params, key):
        return apply_updates(params, updates, key=key), None

    moved, _ = jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 500))
    assert moved["w"].dtype == dtype
    exact, unit = 1 + 500 * 1e-4, float(jnp.finfo(dtype).eps)
    # A sum of 500 roundings, of at most half a unit's variance each, over 2,000 elements: five deviations
    np.testing.assert_allclose(
        moved["w"].astype(jnp.float32).mean(), exact, atol=5 * unit * np.sqrt(500 / 4 / 2000)
    )
    unmoved = params
    for _ in range(20):
        unmoved = apply_updates(unmoved, updates)
    chex.assert_trees_all_equal(unmoved, params)


def test_a_key_changes_nothing_in_wide_parameters_and_rounds_each_leaf_by_itself():
    key = jax.random.key(1)
    params = {
        "a": jnp.ones(1000, jnp.bfloat16),
        "b": jnp.ones(1000, jnp.bfloat16),
        "c": jnp.ones(3),
        "d": None,
        "e": jnp.full(3, 1j),
    }
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), params)
    new = apply_updates(params, updates, key=key)
    for wide in "ce":
        chex.assert_trees_all_equal(new[wide], optax.apply_updates(params[wide], updates[wide]))
    assert jnp.mean(new["a"] == new["b"]) < 0.9
    chex.assert_trees_all_equal(new, apply_updates(params, updates, key=key))
    chex.assert_trees_all_equal(new, apply_updates(params, updates, key=jax.random.key_data(key)))
    other = apply_updates(params, updates, key=jax.random.key(2))
    assert jnp.mean(new["a"] == other["a"]) < 0.9


def test_rows_are_rounded_without_bias_too():
    table = jnp.ones((400, 20), jnp.bfloat16)
    update = RowGradient(jnp.arange(200), jnp.full((200, 20), 1e-3, jnp.bfloat16), 400)
    new = apply_updates(table, update, key=jax.random.key(0)).astype(jnp.float32)
    np.testing.assert_array_equal(new[200:], 1)
    # 4,000 elements, each up by 2^-7 with probability 0.128: five deviations of their mean
    np.testing.assert_allclose(new[:200].mean() - 1, 1e-3, atol=5 * 2**-7 * np.sqrt(0.128 * 0.872 / 4000))


def test_stochastic_rounding_needs_no_memory_of_its_own():
    params = jnp.ones((512, 256), jnp.bfloat16)
    updates = jnp.ones((512, 256), jnp.float32)
    step = jax.jit(lambda p, u, key: apply_updates(p, u, key=key), donate_argnums=0)
    memory = step.lower(params, updates, jax.random.key(0)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096
    assert memory.alias_size_in_bytes == params.nbytes
