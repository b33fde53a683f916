"""What XLA makes of a step: its memory, its copies, and how often it compiles."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import (
    FORMS,
    arrays,
    assert_equal_leaves_are_lowered_once,
    assert_in_place,
    assert_the_second_step_compiles_nothing,
    compilations,
    compiled_step,
    each,
    each_accumulator,
    forms,
)

import rmsprop_jax
from rmsprop_jax import accumulators, apply_updates, diagnostics, rmsprop, scale_by_rms, warmup


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@each(form=FORMS)
def test_a_donated_step_needs_no_temporary_and_no_copy(form, dtype):
    params = arrays(dtype)
    # Scalars alone: no leaf, however small, is held twice.
    smallest = min(x.size * x.dtype.itemsize for x in params)
    assert_in_place(compiled_step(rmsprop(warmup(1e-3), **form), params), temporary=smallest)


@each(form=forms("momentum", "lr_after_momentum", "centered_momentum"))
def test_a_small_momentum_buffer_needs_no_temporary_either(form):
    if jax.__version_info__ < (0, 10):
        pytest.skip("the XLA of this JAX holds a float32 copy of a buffer")
    params = arrays()
    tx = rmsprop(1e-3, momentum_dtype="bfloat16", **form)
    assert_in_place(compiled_step(tx, params), temporary=min(x.size * x.dtype.itemsize for x in params))


def test_nesterov_needs_the_temporary_that_it_needs_in_optax():
    """The scaled gradient enters twice, and XLA does not compute an rsqrt twice."""
    form = {"momentum": 0.9, "nesterov": True}
    ours, theirs = (
        compiled_step(rmsprop(1e-3, **form), arrays()).memory_analysis().temp_size_in_bytes
        for rmsprop in (rmsprop_jax.rmsprop, optax.rmsprop)
    )
    assert ours <= theirs + 1024


@pytest.mark.parametrize("form", ["plain", "momentum", "centered_momentum"])
def test_a_step_runs_as_many_loops_as_that_of_optax(form):
    """XLA on CPU makes one loop per output array; a loop more would be a temporary, and memory traffic."""
    if jax.default_backend() != "cpu":
        pytest.skip("one loop per output is how XLA's CPU backend works")

    def loops(tx):
        text = compiled_step(tx, arrays()).as_text()
        entry = text[text.index("ENTRY") :]
        return sum(
            " fusion(" in line and "[]" not in line.split("=")[1].split("fusion")[0]
            for line in entry.splitlines()
        )

    assert loops(rmsprop(1e-3, **FORMS[form])) == loops(optax.rmsprop(1e-3, **FORMS[form]))


@each(form=FORMS)
def test_the_second_step_compiles_nothing(form):
    tx = rmsprop(warmup(1e-3), **form)
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}
    assert_the_second_step_compiles_nothing(tx, params)


def test_without_jit_equal_leaves_compile_once():
    def compiled_for(decay, leaves=20):
        params = [jnp.ones((5, 7)) for _ in range(leaves)]
        tx = rmsprop(1e-3, decay)
        state = tx.init(params)
        with compilations() as events:
            tx.update(params, state)
        return len(events)

    compiled_for(0.9, leaves=1)
    assert compiled_for(0.9) == 0
    assert compiled_for(0.8) == 1  # a number is a constant of the rule
    compiled_for(jnp.float32(0.9))
    assert compiled_for(jnp.float32(0.7)) == 0  # an array, as inject_hyperparams has it, is not


MOST = {"init": 3, "update": 5, "apply_updates": 1, "convert": 2, "measure": 2}  # programs for each shape


@each_accumulator(accumulators.NAMED)
def test_without_jit_a_shape_compiles_a_few_programs(accumulator):
    """Not one for each of the thirty operations that store an accumulator or round to bfloat16."""
    tx = rmsprop(1e-3, momentum=0.9, momentum_dtype="bfloat16", accumulator=accumulator)
    other, key = "float32" if accumulator == "uint8" else "uint8", jax.random.key(0)

    def programs(shape):
        params = jnp.ones(shape)
        state = jax.jit(tx.init)(params)
        updates, _ = jax.jit(tx.update)(params, state, params)
        small = params.astype(jnp.bfloat16)
        calls = {
            "init": lambda: tx.init(params),
            "update": lambda: tx.update(params, state, params),
            "apply_updates": lambda: apply_updates(small, updates, key=key),
            "convert": lambda: accumulators.convert(state, other),
            "measure": lambda: diagnostics.measure(params, state, updates, params, tx=tx),
        }
        for name, call in calls.items():
            with compilations() as events:
                call()
            yield name, len(events)

    own = 3 + [*accumulators.NAMED].index(accumulator)  # shapes that the other cases do not have
    dict(programs((1, own)))  # what any shape needs
    for name, number in programs((2, own)):
        assert number <= MOST[name], name


def test_equal_leaves_are_lowered_once():
    assert_equal_leaves_are_lowered_once(rmsprop(1e-3))


@pytest.mark.parametrize(("decay", "operands"), [(0.9, 2), (jnp.float32(0.9), 3)], ids=["number", "array"])
def test_only_arrays_are_passed_for_each_leaf(decay, operands):
    tx = scale_by_rms(decay)
    text = jax.jit(tx.update).lower(jnp.ones(64), tx.init(jnp.ones(64))).as_text()
    assert [call.count("%") for call in re.findall(r"call @rule\((.*?)\)", text)] == [operands]
