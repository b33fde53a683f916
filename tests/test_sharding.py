"""Which dimension of an accumulator is split, in one process; what that does, on eight devices in another."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import each
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rmsprop_jax import accumulators, rmsprop, rows, warmup
from rmsprop_jax.sharding import state_sharding

MESH = AbstractMesh((4, 2), ("data", "model"))


def struct(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, PartitionSpec(*spec)))


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        (struct((8, 12)), (None, "data")),  # the largest
        (struct((8, 8)), ("data", None)),  # the first of the largest
        (struct((8, 13)), ("data", None)),  # the largest that four devices divide
        (struct((8, 12), None, "model"), ("data", "model")),  # the largest that is free
        (struct((8, 12), "model"), ("model", "data")),
        (struct((3, 8), None, "model"), (None, "model")),  # none: as the parameter
        (struct((8, 12), "data"), ("data", None)),  # sharded over it already
        (struct((16, 12), ("model", "data")), (("model", "data"), None)),
        (struct((5, 3)), (None, None)),
        (struct((0, 6)), (None, None)),
        (struct(()), ()),
        (jax.ShapeDtypeStruct((8, 12), jnp.float32), (None, "data")),  # without a sharding: as replicated
    ],
)
def test_splits_the_largest_free_dimension(param, expected):
    state = state_sharding(rmsprop(1e-3, centered=True, momentum=0.9), {"w": param}, MESH, "data")
    for sharding in (state[0].nu["w"], state[0].mu["w"], state[2].trace["w"]):
        assert sharding == NamedSharding(MESH, PartitionSpec(*expected))
    assert state[0].count == NamedSharding(MESH, PartitionSpec())


@pytest.mark.parametrize(
    ("param", "row", "column"),
    [
        (struct((8, 12)), ("data", None), (None, "data")),
        (struct((8, 13)), ("data", None), (None, None)),
        (struct((8, 12), None, "model"), ("data", None), (None, "model")),
        (struct((8, 12), "model"), ("model", None), (None, "data")),
        (struct((16, 12), ("model", "data")), (("model", "data"), None), (None, "data")),
        (struct((4, 8, 12), None, None, "model"), (None, "data", None), ("data", None, "model")),
    ],
)
def test_means_follow_rows_and_columns(param, row, column):
    """And are split over the data, each by itself."""
    tx = rmsprop(1e-3, accumulator=accumulators.Factored(2), momentum=0.9)
    state = state_sharding(tx, {"w": param}, MESH, "data")
    nu = state[0].nu["factored(2)"]
    means = [nu[part]["w"].spec for part in ("row_mean", "column_mean")]
    assert means == [PartitionSpec(*row), PartitionSpec(*column)]
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, {"w": param}))


KERNEL, BIAS = PartitionSpec(None, "data"), PartitionSpec("data")
WRAPPED = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), rmsprop(warmup(1e-3), momentum=0.9)),
    "adam": optax.adam(1e-3),
    "optax": optax.rmsprop(1e-3, momentum=0.9),
    "masked": optax.masked(rmsprop(1e-3), {"layer": {"kernel": True, "bias": False}}),
    "partition": optax.partition(
        {"a": rmsprop(1e-3, accumulator="uint8"), "b": optax.adam(1e-3)},
        {"layer": {"kernel": "a", "bias": "b"}},
    ),
    "several": optax.MultiSteps(rmsprop(1e-3), every_k_schedule=4),
    "injected": optax.inject_hyperparams(rmsprop)(1e-3),
    "finite": optax.apply_if_finite(rmsprop(1e-3), 5),
    "ema": optax.chain(rmsprop(1e-3), optax.ema(0.99)),
    "schedule_free": optax.contrib.schedule_free(rmsprop(1e-3), 1e-3),
}


@each(tx=WRAPPED)
def test_finds_the_accumulators_in_every_wrapper(tx):
    """Every array of a parameter's shape is split; the tree is that of the state."""
    params = {"layer": {"kernel": struct((8, 64)), "bias": struct((64,))}}
    state = jax.eval_shape(tx.init, params)
    shardings = state_sharding(tx, params, MESH, "data")
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    specs = {(8, 64): KERNEL, (64,): BIAS, (): PartitionSpec()}
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert sharding.spec == specs[x.shape]


def test_tables_of_rows():
    state = state_sharding(rows.exact(rmsprop(1e-3)), struct((64, 8)), MESH, "data")
    assert state.last.spec == BIAS
    assert state.dense[0].nu.spec == PartitionSpec("data", None)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"Invalid axis='batch': the mesh has the axes \('data', 'model'\)"):
        state_sharding(rmsprop(1e-3), {"w": struct((8,))}, MESH, "batch")
    other = AbstractMesh((8,), ("data",))
    with pytest.raises(ValueError, match=r"Parameter 'w' is on .*'data': 4.*, expected .*'data': 8"):
        state_sharding(rmsprop(1e-3), {"w": struct((8,))}, other, "data")


def test_on_eight_simulated_devices(pytestconfig):
    """tests/distributed/*on_eight_devices.py, in a process of its own for its devices."""
    programs = sorted(Path(__file__).parent.glob("distributed/*on_eight_devices.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", pytestconfig.option.markexpr]
    command += [f"--cases={cases}"] if (cases := pytestconfig.option.cases) else []
    result = subprocess.run(
        [*command, *map(str, programs)],
        text=True,
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-8000:]
