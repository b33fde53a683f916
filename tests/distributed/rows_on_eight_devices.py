"""Tables on meshes of simulated devices: run with on_eight_devices.py, by tests/test_sharding.py."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import LAYOUTS, assert_equal, data_mesh, mesh_of
from tables import squared

from rmsprop_jax import apply_updates, rmsprop, rows
from rmsprop_jax.sharding import state_sharding


@pytest.mark.parametrize("on_rows", [rows.exact, rows.lazy])
def test_rows_on_every_mesh(on_rows):
    """Bit for bit where every row is looked up once, so that nothing is summed."""
    tx = on_rows(rmsprop(0.02, 0.99))

    def updated(mesh=None, spec=None, zero=False):
        rng = np.random.default_rng(0)
        table = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
        layout = None
        if mesh is not None:
            table = jax.device_put(table, NamedSharding(mesh, spec))
            layout = state_sharding(tx, table, mesh, "data") if zero else None
        state = jax.jit(tx.init, out_shardings=layout)(table)
        layout = None if layout is None else (table.sharding, layout)

        @partial(jax.jit, donate_argnums=(0, 1), out_shardings=layout)
        def step(table, state, ids, values):
            updates, state = tx.update(rows.RowGradient(ids, values, 64), state, table)
            return apply_updates(table, updates), state

        for _ in range(20):
            ids = jnp.asarray(rng.choice(70, size=12, replace=False), jnp.int32) - 3  # some out of range
            table, state = step(table, state, ids, jnp.asarray(rng.normal(size=(12, 16)), jnp.float32))
        if zero:
            nu = state.dense[0].nu
            assert nu.addressable_shards[0].data.nbytes < nu.nbytes
        return table, state

    expected = jax.device_get(updated())
    for devices, name, zero in [
        (2, "fully sharded", False),
        (8, "replicated", True),
        (8, "tensor-parallel", True),
        (8, "both", False),
    ]:
        actual = updated(mesh_of(devices), LAYOUTS[name], zero)
        assert_equal(actual, expected, err_msg=f"{devices=}, {name}, {zero=}")


def test_rows_of_several_ids_in_shards():
    """A whole step, where ids repeat and their gradients are added up in another order on each mesh."""

    def train(place):
        tx = optax.partition(
            {"rows": rows.exact(rmsprop(0.02, 0.99)), "dense": rmsprop(0.02)}, ("rows", "dense")
        )
        rng = np.random.default_rng(0)
        table = place(rng.normal(size=(64, 16)).astype(np.float32))
        params = jnp.asarray(rng.normal(size=16), jnp.float32)
        state = jax.tree.map(place, tx.init((table, params)))

        @jax.jit
        def step(table, params, state, ids, target):
            loss, grads = rows.value_and_grad(squared)(table, ids, params, target)
            updates, state = tx.update(grads, state, (table, params))
            return *apply_updates((table, params), updates), state, loss

        losses = []
        for _ in range(40):
            ids = rng.zipf(1.3, 12).astype(np.int32) - 2  # some of them out of range, on either side
            target = rng.normal(size=12).astype(np.float32)
            table, params, state, loss = step(table, params, state, ids, target)
            losses.append(loss.item())
        return table, optax.tree.get(state.inner_states["rows"], "nu")[0], losses

    mesh = data_mesh()
    expected = train(jnp.asarray)
    for spec in (PartitionSpec("data"), PartitionSpec(None, "data")):

        def place(x, spec=spec):
            in_shards = x.shape[:1] == (64,) and len(spec) <= x.ndim
            return jax.device_put(x, NamedSharding(mesh, spec if in_shards else PartitionSpec()))

        table, nu, losses = train(place)
        for x in (table, nu):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), x.sharding
        np.testing.assert_allclose(losses, expected[2], rtol=1e-4)
        np.testing.assert_allclose(table, expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(nu, expected[1], rtol=1e-4, atol=1e-7)


OPTIMIZERS = {
    "exact": rows.exact(rmsprop(0.1)),
    "lazy": rows.lazy(rmsprop(0.1, momentum=0.9, centered=True)),
    "clipped": optax.chain(rows.values_only(optax.clip_by_global_norm(1.0)), rows.lazy(optax.adam(0.1))),
}
TABLE = jnp.arange(64.0).reshape(8, 8) / 10
IDS = jnp.array([1, 3, 1, 7, -1, 0, 9, 5])


@cache
def two_steps_of(name):
    return jax.jit(partial(two_steps, OPTIMIZERS[name]))


def two_steps(tx, table, ids, state=None):
    """With repeated ids, and some out of range, of shape (n,) and (n, 1)."""
    state = tx.init(table) if state is None else state
    for shaped in (ids, ids[:, None]):
        loss = lambda found, _: jnp.sum(found**2)  # noqa: E731
        _, (grads, _) = rows.value_and_grad(loss)(table, shaped, None)
        updates, state = tx.update(grads, state, table)
        table = apply_updates(table, updates)
    return table


FEW = [
    ("exact", "replicated", "data"),
    ("exact", "both", None),
    ("lazy", "tensor-parallel", "data"),
    ("clipped", "fully sharded", None),
]


@pytest.mark.parametrize(("name", "layout", "ids"), quick(product(OPTIMIZERS, LAYOUTS, [None, "data"]), FEW))
def test_rows_on_an_explicit_mesh(name, layout, ids):
    """Tables whose rows or columns are split, and ids that are; the new table is laid out as the old one."""
    mesh, tx = mesh_of(8, AxisType.Explicit), OPTIMIZERS[name]
    expected = two_steps_of(name)(TABLE, IDS)
    with jax.set_mesh(mesh):
        table = jax.device_put(TABLE, NamedSharding(mesh, LAYOUTS[layout]))
        placed_ids = jax.device_put(IDS, NamedSharding(mesh, PartitionSpec(ids)))
        for state in (None, jax.jit(tx.init)(table)):
            new = two_steps_of(name)(table, placed_ids, state)
            assert new.sharding.is_equivalent_to(table.sharding, 2)
            np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("split", [PartitionSpec("data"), PartitionSpec(None, "data")], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_inside_shard_map(name, split):
    """A table for each device, or some of the columns; with varying axes checked, state made inside."""
    tx = OPTIMIZERS[name]
    by_rows = split == PartitionSpec("data")
    ids = IDS % 2 if by_rows else IDS  # a device has one row here
    specs = (split, PartitionSpec("data") if by_rows else PartitionSpec())
    inside = jax.shard_map(
        partial(two_steps, tx), mesh=data_mesh(), in_specs=specs, out_specs=split, check_vma=True
    )
    parts = np.split(np.asarray(TABLE), 8, axis=0 if by_rows else 1)
    of_part = np.split(np.asarray(ids), 8) if by_rows else [ids] * 8
    expected = [two_steps_of(name)(part, i) for part, i in zip(parts, of_part, strict=True)]
    np.testing.assert_allclose(
        jax.jit(inside)(TABLE, ids), np.concatenate(expected, axis=0 if by_rows else 1), rtol=1e-5, atol=1e-6
    )
