"""What the compilers for an H100 and a TPU v5e make of a step: at the limit of the memory's bandwidth."""

import jax
import jax.numpy as jnp
import pytest
from compiled_for import MARKS, assert_at_the_limit, compiled, on_each_chip, per_parameter
from helpers import CODES, FORMS, each, forms

from benchmarks import _aot
from benchmarks.accelerators import SHAPE
from rmsprop_jax import conventions, rmsprop, warmup

pytestmark = MARKS
EVERY_FORM = FORMS | {
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "everything": {"centered": True, "momentum": 0.9, "bias_correction": True, "weight_decay": 1e-4},
}
on_each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@each(form=EVERY_FORM)
@on_each_dtype
@on_each_chip
def test_every_form_moves_its_arrays_once(chip, dtype, form):
    assert_at_the_limit(chip, rmsprop(warmup(1e-3), **form), dtype)


@pytest.mark.parametrize("name", conventions.names())
@on_each_dtype
@on_each_chip
def test_every_convention_moves_its_arrays_once(chip, dtype, name):
    assert_at_the_limit(chip, conventions.get(name)(1e-3), dtype)


@pytest.mark.parametrize("accumulator", CODES)
@each(form=forms("plain", "momentum", "centered"))
@on_each_dtype
@on_each_chip
def test_codes_are_written_in_place(chip, dtype, form, accumulator):
    assert_at_the_limit(chip, rmsprop(1e-3, accumulator=accumulator, **form), dtype)


@each(
    form={
        "plain": {},
        "after": {"lr_in_momentum": False},
        "nesterov": {"nesterov": True},
        "centered": {"centered": True},
        "uint8": {"accumulator": "uint8"},
    }
)
@on_each_dtype
@on_each_chip
def test_a_small_momentum_buffer_is_written_in_place(chip, dtype, form):
    tx = rmsprop(1e-3, momentum=0.9, momentum_dtype="bfloat16", **form)
    assert_at_the_limit(chip, tx, dtype)


@on_each_chip
def test_a_step_is_one_kernel(chip):
    done, _ = compiled(chip, rmsprop(1e-3, momentum=0.9))
    assert _aot.counts(done)["kernels"] == 1


@on_each_chip
def test_scanned_steps_are_in_place(chip):
    tx, params = rmsprop(1e-3, momentum=0.9), jax.ShapeDtypeStruct(SHAPE, jnp.float32)

    def run(params, state, scales):
        def step(kept, scale):
            params, state = kept
            updates, state = tx.update(scale * params, state, params)
            return (params + updates, state), None

        return jax.lax.scan(step, (params, state), scales)[0]

    arguments = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((10,), jnp.float32)
    placed = _aot.placed(arguments, _aot.devices(chip))
    counts = _aot.counts(_aot.compiled(run, *placed, donate_argnums=(0, 1)))
    assert counts["copies"] == 0
    assert counts["temporary"] < 1e-3 * params.size
    assert counts["bytes"] <= 1.001 * 10 * 24 * params.size  # the gradient is computed where it is used


LARGE = [
    (8192, 16384),
    (4096, 4096),
    (1024, 1024),
    (768, 3072),
    (3072, 768),
    (1000, 1000),
    (50257, 768),
    (3, 3, 512, 512),
    (12, 768, 3072),
]


@pytest.mark.parametrize("shape", LARGE, ids=str)
@on_each_chip
def test_factored_reads_gradients_again_and_stores_no_squares(chip, shape):
    """On a TPU once more, for both means, on a GPU twice, as Optax's does. The rest are means."""
    moved, temporary = per_parameter(chip, shape, accumulator="factored")
    assert moved < {"H100": 20.4, "v5e": 16.1}[chip]
    assert temporary < 0.2
