"""What XLA makes of a step: its memory, its copies, and how often it compiles."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import monitoring

import rmsprop_jax
from rmsprop_jax import rmsprop, scale_by_rms, warmup

FORMS = {
    "plain": {},
    "outside": {"eps_in_sqrt": False},
    "corrected": {"bias_correction": True},
    "momentum": {"momentum": 0.9},
    "lr_after_momentum": {"momentum": 0.9, "lr_in_momentum": False},
    "centered": {"centered": True},
    "centered_momentum": {"centered": True, "momentum": 0.9},
    "weight_decay": {"momentum": 0.9, "weight_decay": 1e-4},
}
SHAPES = [(512, 512), (512,), (2048, 128)]


def training_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def compiled_step(tx, dtype=jnp.float32):
    params = [jnp.ones(shape, dtype) for shape in SHAPES]
    return training_step(tx).lower(params, tx.init(params), params).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_donated_step_needs_no_temporary_and_no_copy(form, dtype):
    compiled = compiled_step(rmsprop(warmup(1e-3), **form), dtype)
    memory = compiled.memory_analysis()
    smallest = min(jnp.zeros(shape, dtype).nbytes for shape in SHAPES)
    assert memory.temp_size_in_bytes < smallest  # scalars alone: no leaf, however small, is held twice
    arrays = [line for line in compiled.as_text().splitlines() if " copy(" in line and "[]" not in line]
    assert arrays == []
    # Parameters, accumulators and buffers are updated in place: outputs live in donated arguments.
    assert memory.alias_size_in_bytes >= memory.output_size_in_bytes - 1024


def test_nesterov_needs_the_temporary_that_it_needs_in_optax():
    """The scaled gradient enters twice, and XLA does not compute an rsqrt twice."""
    form = {"momentum": 0.9, "nesterov": True}
    ours, theirs = (
        compiled_step(rmsprop(1e-3, **form)).memory_analysis().temp_size_in_bytes
        for rmsprop in (rmsprop_jax.rmsprop, optax.rmsprop)
    )
    assert ours <= theirs + 1024


@pytest.mark.parametrize("form", ["plain", "momentum", "centered_momentum"])
def test_a_step_runs_as_many_loops_as_that_of_optax(form):
    """XLA on CPU makes one loop per output array; a loop more would be a temporary, and memory traffic."""
    if jax.default_backend() != "cpu":
        pytest.skip("one loop per output is how XLA's CPU backend works")

    def loops(tx):
        text = compiled_step(tx).as_text()
        entry = text[text.index("ENTRY") :]
        return sum(
            " fusion(" in line and "[]" not in line.split("=")[1].split("fusion")[0]
            for line in entry.splitlines()
        )

    assert loops(rmsprop(1e-3, **FORMS[form])) == loops(optax.rmsprop(1e-3, **FORMS[form]))


@pytest.fixture
def compilations():
    """A list that grows with every compilation."""
    events = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            events.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield events
    monitoring.clear_event_listeners()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_second_step_compiles_nothing(form, compilations):
    tx = rmsprop(warmup(1e-3), **form)
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}
    grads = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}
    step = training_step(tx)
    params, state = step(params, tx.init(params), grads)
    assert compilations  # the listener hears the first
    compilations.clear()
    for _ in range(3):
        params, state = step(params, state, grads)
    assert compilations == []


def test_without_jit_equal_leaves_compile_once(compilations):
    def compiled_for(decay, leaves=20):
        params = [jnp.ones((5, 7)) for _ in range(leaves)]
        tx = rmsprop(1e-3, decay)
        state = tx.init(params)
        compilations.clear()
        tx.update(params, state)
        return len(compilations)

    compiled_for(0.9, leaves=1)
    assert compiled_for(0.9) == 0
    assert compiled_for(0.8) == 1  # a number is a constant of the rule
    compiled_for(jnp.float32(0.9))
    assert compiled_for(jnp.float32(0.7)) == 0  # an array, as inject_hyperparams has it, is not


def assert_equal_leaves_are_lowered_once(tx):
    def lowered(leaves):
        params = [jnp.ones(64)] * leaves
        return len(jax.jit(tx.update).lower(params, tx.init(params)).as_text())

    per_leaf = (lowered(200) - lowered(100)) / 100
    rule = lowered(2) - 2 * per_leaf
    assert per_leaf < rule / 2


def test_equal_leaves_are_lowered_once():
    assert_equal_leaves_are_lowered_once(rmsprop(1e-3))


@pytest.mark.parametrize(("decay", "operands"), [(0.9, 2), (jnp.float32(0.9), 3)], ids=["number", "array"])
def test_only_arrays_are_passed_for_each_leaf(decay, operands):
    tx = scale_by_rms(decay)
    text = jax.jit(tx.update).lower(jnp.ones(64), tx.init(jnp.ones(64))).as_text()
    assert [call.count("%") for call in re.findall(r"call @_rule\((.*?)\)", text)] == [operands]
