"""Collectives of a step on eight H100s and on eight TPUs v5e."""

import pytest
from compiled_for import MARKS, on_each_chip

from benchmarks import accelerators

pytestmark = MARKS


@on_each_chip
def test_zero1_scatters_gradients_and_gathers_parameters(chip):
    """Nothing else, and each once."""
    found = accelerators.compiled_on_mesh(chip, "data parallel, ZeRO stage 1")["collectives"]
    assert {kind: len(put_in) for kind, put_in in found.items()} == {"reduce-scatter": 1, "all-gather": 1}


@on_each_chip
def test_factored_reduces_means_alone(chip):
    found = accelerators.compiled_on_mesh(chip, "sharded matrix, factored")["collectives"]
    (put_in,) = found["all-reduce"]
    assert set(found) == {"all-reduce"}
    assert put_in <= 4 * (accelerators.SHAPE[1] + 8)  # a mean for each column, and that of the rows' means


@pytest.mark.parametrize("name", ["sharded matrix", "sharded matrix, uint8", "in shard_map, uint8"])
@on_each_chip
def test_elsewhere_devices_need_nothing_of_each_other(chip, name):
    assert accelerators.compiled_on_mesh(chip, name)["collectives"] == {}
