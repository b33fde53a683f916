"""`diagnostics.watch` compiles for large matrices, and needs temporaries for one layer at a time at most."""

import math

import jax
import pytest
from compiled_for import MARKS, on_each_chip
from helpers import step_of

from benchmarks import _aot
from rmsprop_jax import diagnostics, rmsprop

pytestmark = MARKS
# Bytes for each element: XLA on TPU stores u and nu for the strided slices that sample them.
LIMITS = {"H100": 0.1, "v5e": 8.2}


@pytest.mark.parametrize(("layers", "shape"), [(1, (50257, 768)), (4, (4096, 4096))])
@on_each_chip
def test_watch_compiles_and_holds_one_layer_at_most(chip, layers, shape):
    tx = diagnostics.watch(rmsprop(1e-3))
    params = [jax.ShapeDtypeStruct(shape, "float32")] * layers
    arguments = params, jax.eval_shape(tx.init, params), params
    placed = _aot.placed(arguments, _aot.devices(chip))
    counts = _aot.counts(_aot.compiled(step_of(tx), *placed, donate_argnums=(0, 1)))
    assert counts["temporary"] < LIMITS[chip] * math.prod(shape)
