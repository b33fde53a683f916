"""Gradients of rows: sums over ids of any kind, and those of the dense loss."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from rmsprop_jax import apply_updates, rmsprop, rows
from rmsprop_jax.rows import RowGradient

IDS = hnp.arrays(np.int32, st.sampled_from([0, 1, 9]), elements=st.integers(-9, 15))


@settings(max_examples=40, deadline=None)
@given(ids=IDS, data=st.data())
def test_any_ids_are_summed_or_dropped(ids, data):
    """Duplicates, no ids at all, ids out of range on either side."""
    floats = st.floats(-100, 100, width=16)
    values = data.draw(hnp.arrays(np.float32, (len(ids), 2), elements=floats))
    gradient = RowGradient(jnp.asarray(ids), jnp.asarray(values), 7)
    expected = np.zeros((7, 2))
    for i, value in zip(ids, values, strict=True):
        if 0 <= i < 7:
            expected[i] += value
    np.testing.assert_allclose(gradient.to_dense(), expected, rtol=1e-5, atol=1e-4)
    summed = gradient.summed()
    kept = np.asarray(summed.indices)
    assert sorted(kept[kept < 7]) == sorted({i for i in ids.tolist() if 0 <= i < 7})
    assert np.all((kept >= 0) & (kept <= 7))
    np.testing.assert_allclose(summed.to_dense(), expected, rtol=1e-5, atol=1e-4)

    table = jnp.asarray(np.arange(14.0, dtype=np.float32).reshape(7, 2))
    for on_rows in (rows.exact, rows.lazy):
        tx = on_rows(rmsprop(0.1))
        updates, state = tx.update(gradient, tx.init(table), table)
        # Sums of numbers up to 100 depend on their order by 1e-4; where those are small, so may the step.
        clear = np.abs(expected) > 0.1
        new = np.asarray(apply_updates(table, updates))
        moved = 0.1 * expected / np.sqrt(0.1 * expected**2 + 1e-8)
        np.testing.assert_allclose((new - np.asarray(table))[clear], -moved[clear], rtol=1e-3)
        untouched = np.setdiff1d(np.arange(7), ids)
        np.testing.assert_array_equal(new[untouched], np.asarray(table)[untouched])
        np.testing.assert_array_equal(np.asarray(state.dense[0].nu)[untouched], 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int32])
def test_ids_of_every_integer_dtype(dtype):
    table = jnp.arange(600.0).reshape(300, 2)
    ids = jnp.asarray(np.array([0, 100, np.iinfo(dtype).max], dtype))
    value, (grads, _) = rows.value_and_grad(lambda found, _: jnp.sum(found))(table, ids, None)
    inside = [i for i in (0, 100, np.iinfo(dtype).max) if i < 300]
    assert value == table[np.array(inside)].sum()
    assert grads.to_dense().sum() == 2 * len(inside)


def test_value_and_grad_is_that_of_the_dense_loss():
    """Two tables, one of them used twice, ids of any shape, dense parameters, auxiliary output."""
    tables = {"in": jnp.arange(12.0).reshape(6, 2), "out": jnp.arange(10.0).reshape(5, 2) / 7}
    ids = {"in": jnp.array([[1, 1], [4, 0]]), "out": {"near": jnp.array([2, 3]), "far": jnp.array([[2, 4]])}}
    params = {"bias": jnp.array(0.3)}

    def loss_fn(found, params, scale, power=2):
        assert found["in"].shape == (2, 2, 2)
        assert found["out"]["far"].shape == (1, 2, 2)
        scores = jnp.einsum("abk,bk->a", found["in"], found["out"]["near"]) + params["bias"]
        return jnp.sum(scores**power) * scale + jnp.sum(jnp.sin(found["out"]["far"])), {"scores": scores}

    def dense_loss(tables, params):
        found = jax.tree.map(lambda table, some: jax.tree.map(lambda i: table[i], some), tables, ids)
        return loss_fn(found, params, 0.1, power=2)

    (value, aux), (grads, param_grads) = rows.value_and_grad(loss_fn, has_aux=True)(
        tables, ids, params, 0.1, power=2
    )
    (dense_value, dense_aux), (dense_grads, dense_param_grads) = jax.value_and_grad(
        dense_loss, argnums=(0, 1), has_aux=True
    )(tables, params)
    assert value == dense_value
    np.testing.assert_array_equal(aux["scores"], dense_aux["scores"])
    np.testing.assert_allclose(param_grads["bias"], dense_param_grads["bias"], rtol=1e-6)
    for name, gradient in grads.items():
        assert isinstance(gradient, RowGradient)
        assert gradient.shape == tables[name].shape
        np.testing.assert_allclose(gradient.to_dense(), dense_grads[name], rtol=1e-5)


def test_a_table_that_is_not_used_has_a_gradient_without_rows():
    tables, ids = {"used": jnp.ones((3, 2)), "not": jnp.ones((5, 4, 2))}, {"used": jnp.array([0]), "not": []}
    _, (grads, _) = rows.value_and_grad(lambda found, _: jnp.sum(found["used"]))(tables, ids, None)
    assert grads["not"].shape == (5, 4, 2)
    assert grads["not"].indices.shape == (0,)
    np.testing.assert_array_equal(grads["not"].to_dense(), jnp.zeros((5, 4, 2)))


@pytest.mark.parametrize("loss", [0.0, np.nan, np.inf])
def test_the_ids_do_not_depend_on_the_loss(loss):
    """XLA only believes so."""
    table, ids = jnp.ones((3, 2)), jnp.array([[2, 1], [-1, 7]])
    value, (grads, _) = jax.jit(rows.value_and_grad(lambda x, _: jnp.sum(x) * 0 + loss))(table, ids, None)
    np.testing.assert_array_equal(value, loss)
    np.testing.assert_array_equal(grads.indices, [2, 1, 3, 3])


def test_out_of_range_ids_look_up_zeros():
    table = jnp.ones((3, 2))
    gradient = rows.value_and_grad(lambda x, _: (jnp.sum(x), x), has_aux=True)
    (_, found), _ = gradient(table, jnp.array([-1, 0, 3]), None)
    np.testing.assert_array_equal(found[:, 0], [0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("table", "ids", "looked_up"),
    [
        (("data", "model"), "data", ("data", "model")),
        ((None, "model"), "data", ("data", "model")),
        (("data", None), None, (None, None)),
        ((None, "model"), "model", (None, "model")),  # the columns have that axis already
    ],
)
def test_on_explicit_axes_rows_are_split_as_the_ids_and_the_columns_are(table, ids, looked_up):
    """The gradient's rows are whole on each device, since any of them may be anywhere in the table."""
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def struct(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(found, _):
        assert jax.typeof(found).sharding.spec == PartitionSpec(*looked_up)
        return jnp.sum(found**2)

    with jax.sharding.use_abstract_mesh(mesh):
        grads = jax.eval_shape(
            lambda table, ids: rows.value_and_grad(loss)(table, ids, None)[1][0],
            struct((8, 4), jnp.float32, *table),
            struct((16,), jnp.int32, ids),
        )
        dense = jax.eval_shape(RowGradient.to_dense, grads)
    assert grads.indices.sharding.spec == PartitionSpec(None)
    assert grads.values.sharding.spec == dense.sharding.spec == PartitionSpec(None, table[1])


def test_from_bcoo_and_to_dense():
    dense = jnp.zeros((5, 2)).at[jnp.array([1, 3])].set(7.0)
    matrix = sparse.BCOO.fromdense(dense, n_dense=1, nse=4)  # two of its four are padding
    np.testing.assert_array_equal(RowGradient.from_bcoo(matrix).to_dense(), dense)
    with pytest.raises(ValueError, match=r"n_batch=0 and n_sparse=1.*n_sparse=2"):
        RowGradient.from_bcoo(sparse.BCOO.fromdense(dense))
