"""Means of rows and of columns on meshes of simulated devices: tests/test_sharding.py runs them.

By hand: python -m pytest tests/distributed/factored_on_eight_devices.py
"""

from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import LAYOUTS, data_mesh, mesh_of, placed
from on_eight_devices import filled, initialised, random, trained, updated

from rmsprop_jax import accumulators, rmsprop, scale_by_rms, warmup

FACTORED = accumulators.Factored(2)
FORMS = {
    "plain": {},
    "outside": {"eps_in_sqrt": False, "bias_correction": True},
    "momentum": {"momentum": 0.9, "momentum_dtype": "bfloat16", "weight_decay": 0.01},
}


def assert_close(actual, expected, message, rtol=2e-6):
    """All is elementwise but the means of up to 24 squares, which a mesh sums in its own order."""
    for x, y in zip(jax.tree.leaves(jax.device_get(actual)), jax.tree.leaves(expected), strict=True):
        # Of a momentum buffer in bfloat16 a last bit may round to its other neighbour.
        small = x.dtype == jnp.bfloat16
        kind = np.float32 if small else x.dtype
        np.testing.assert_allclose(
            x.astype(kind), y.astype(kind), rtol=1e-2 if small else rtol, atol=1e-6, err_msg=message
        )


@cache
def on_one_device(tx):
    return jax.device_get(updated(tx, jnp.float32))


TX = rmsprop(warmup(0.01), 0.99, accumulator=FACTORED)
FEW = [(2, "replicated"), (4, "fully sharded"), (8, "tensor-parallel"), (8, "both")]


@pytest.mark.parametrize(("devices", "layout"), quick(product([2, 4, 8], LAYOUTS), FEW))
def test_same_numbers_in_every_layout(devices, layout):
    """Twelve steps; with ZeRO and without, and on explicit axes. `updated` sees that shardings stay."""
    tx, expected = TX, on_one_device(TX)
    mesh = mesh_of(devices)
    for zero in (None, mesh):
        actual = updated(tx, jnp.float32, lambda tree: placed(tree, mesh, LAYOUTS[layout]), zero)
        assert_close(actual, expected, f"{zero=}")
    explicit = mesh_of(devices, AxisType.Explicit)
    actual = updated(tx, jnp.float32, lambda tree: placed(tree, explicit, LAYOUTS[layout]))
    assert_close(actual, expected, "explicit")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_same_numbers_in_every_form(form, dtype):
    tx = rmsprop(warmup(0.01), 0.99, accumulator=FACTORED, **FORMS[form])
    expected = jax.device_get(updated(tx, dtype))
    mesh = mesh_of(8)
    actual = updated(tx, dtype, lambda tree: placed(tree, mesh, LAYOUTS["both"]), mesh)
    assert_close(actual, expected, form, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_means_are_sharded_as_rows_and_columns_are(kind):
    """Eagerly, jitted, after a step and, on explicit axes, in eval_shape too."""
    tx = rmsprop(0.01, accumulator=FACTORED)
    mesh = mesh_of(8, kind)
    params = placed(random(np.random.default_rng(0)), mesh, LAYOUTS["both"])
    states = initialised(tx, params, mesh, kind)
    states.append(jax.jit(tx.update)(params, states[0])[1])
    for state in states:
        nu = state[0].nu["factored(2)"]
        means = [nu[part] for part in ("row_mean", "column_mean")]
        assert [filled(tree["kernel"]) for tree in means] == [("data", None), (None, "model")]
        assert [filled(tree["odd"]) for tree in means] == [(None, None)] * 2


def test_zero_keeps_an_eighth_on_each_device():
    tx = rmsprop(0.01, accumulator=FACTORED)
    mesh = data_mesh()
    params, state, _, _ = trained(tx, mesh, PartitionSpec(), zero=True)
    for x in jax.tree.leaves(state):
        assert x.addressable_shards[0].data.nbytes == x.nbytes / (8 if x.size > 1 else 1)
    for x, expected in zip(jax.tree.leaves(params), jax.tree.leaves(trained(tx)[0]), strict=True):
        # To the rounding of the model's sums: see on_eight_devices.py.
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-3)


def test_inside_shard_map_a_part_is_a_parameter_of_its_own():
    tx, mesh = scale_by_rms(accumulator=FACTORED), data_mesh()
    g = jnp.sin(jnp.arange(16.0 * 6)).reshape(16, 6)
    split = PartitionSpec("data")

    def step(g):
        return tx.update(g, tx.init(g))[0]

    inside = jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=split, check_vma=True)
    parts = [step(part) for part in jnp.split(g, 8)]
    g = jax.device_put(g, NamedSharding(mesh, split))
    np.testing.assert_allclose(jax.jit(inside)(g), jnp.concatenate(parts), rtol=1e-6)
