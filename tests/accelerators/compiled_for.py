"""What the tests of accelerators share: chips, a step compiled for one, and the least that it could move."""

import math

import jax
import pytest
from helpers import step_of

from benchmarks import _aot
from benchmarks.accelerators import SHAPE, least
from rmsprop_jax import rmsprop

MARKS = [
    pytest.mark.accelerators,
    pytest.mark.skipif(not _aot.installed(), reason="make accelerators installs the compilers"),
]
CHIPS = ["H100", "v5e"]
on_each_chip = pytest.mark.parametrize("chip", CHIPS)


def compiled(chip, tx, shape=SHAPE, dtype="float32"):
    """Update and apply, donated, for one matrix; and the bytes that it moves at least."""
    params = jax.ShapeDtypeStruct(shape, dtype)
    arguments = params, jax.eval_shape(tx.init, params), params
    placed = _aot.placed(arguments, _aot.devices(chip))
    return _aot.compiled(step_of(tx), *placed, donate_argnums=(0, 1)), least(*arguments)


def assert_at_the_limit(chip, tx, dtype="float32", **options):
    """No copies, no temporaries, and each array is read and written once."""
    done, at_least = compiled(chip, tx, dtype=dtype, **options)
    counts = _aot.counts(done)
    assert counts["copies"] == 0
    assert counts["temporary"] < 2048  # scalars, for each of which there are 256 bytes
    assert counts["bytes"] <= 1.001 * at_least


def per_parameter(chip, shape, dtype="float32", **options):
    """Bytes moved and temporary bytes of a step for each parameter."""
    counts = _aot.counts(compiled(chip, rmsprop(1e-3, **options), shape, dtype)[0])
    size = math.prod(shape)
    return counts["bytes"] / size, counts["temporary"] / size
