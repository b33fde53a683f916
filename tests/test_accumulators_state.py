"""Accumulators in one and two bytes: their state in the company of Optax, and what XLA makes of it."""

import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ACCUMULATORS,
    CODES,
    EVERY_SMALL,
    SMALL,
    Float16Root,
    arrays,
    assert_equal_leaves_are_lowered_once,
    assert_in_place,
    compiled_step,
    each_accumulator,
    each_accumulator_and_form,
    forms,
    quick,
    step_of,
)

from rmsprop_jax import ScaleByRmsState, accumulators, rmsprop, scale_by_rms, warmup

FORMS = forms("plain", "outside", "corrected", "centered", "momentum")

# The state.

PARAMS = {"w": jnp.ones((6, 4)), "b": [jnp.ones(4, jnp.bfloat16), None], "none": jnp.ones((0, 3))}


@each_accumulator_and_form(EVERY_SMALL, FORMS)
def test_the_state_keeps_its_fields_shapes_and_dtypes(accumulator, form):
    tx = rmsprop(1e-2, accumulator=accumulator, **form)
    before = tx.init(PARAMS) if form == FORMS["momentum"] else jax.eval_shape(tx.init, PARAMS)
    _, after = jax.eval_shape(tx.update, PARAMS, before, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert isinstance(before[0], ScaleByRmsState)
    numbers = jax.eval_shape(accumulators.decoded, before[0])
    assert jax.tree.map(jnp.shape, numbers) == jax.tree.map(jnp.shape, PARAMS)
    own = accumulators.resolve(accumulator)
    trees = before[0].nu[own.name]
    for tree in [trees[part] for part in own.parts] or [trees]:
        assert jax.tree.structure(tree) == jax.tree.structure(PARAMS)
    assert not any(x.weak_type for x in jax.tree.leaves(after))
    abstract = jax.eval_shape(tx.init, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, before)
    marked = optax.tree.map_params(tx, lambda _: "param", before, transform_non_params=lambda _: "other")
    expected = jax.tree.map(lambda _: "param", before[0].nu)
    assert optax.tree.get(marked, "nu") == expected


BYTES = {"float32": 4 * 60_050, "bfloat16": 2 * 60_050, "uint8": 60_050, "factored": 4 * (300 + 200 + 50 + 1)}


@each_accumulator(ACCUMULATORS)
def test_bytes_per_parameter(accumulator):
    params = {"a": jnp.zeros((300, 200)), "b": jnp.zeros(50)}
    state = jax.eval_shape(rmsprop(1e-3, accumulator=accumulator).init, params)
    assert (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == BYTES[accumulator] + 4
    )  # and the count


WRAPPED = {
    "masked": lambda accumulator: optax.masked(rmsprop(0.1, accumulator=accumulator), True),
    "inject": lambda accumulator: optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(
        learning_rate=0.1, decay=0.9, accumulator=accumulator
    ),
    "multi_steps": lambda accumulator: optax.MultiSteps(rmsprop(0.1, accumulator=accumulator), 1),
    "finite": lambda accumulator: optax.apply_if_finite(rmsprop(0.1, accumulator=accumulator), 3),
}


@pytest.mark.parametrize("accumulator", quick(EVERY_SMALL, ["uint8", "factored"]), ids=str)
def test_inside_the_wrappers_of_optax(accumulator):
    """Jitted and donated; a wrapper changes nothing."""
    rng = np.random.default_rng(2)
    start = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)

    def trained(tx):
        step = jax.jit(lambda params, state: step_of(tx)(params, state, params), donate_argnums=(0, 1))
        params, state = jnp.copy(start), jax.jit(tx.init)(start)
        for _ in range(20):
            params, state = step(params, state)
        return params

    alone = trained(rmsprop(0.1, accumulator=accumulator))
    for name, wrap in WRAPPED.items():
        # A program of its own contracts a * b + c as it likes, which may turn a rounding: a step of the code
        np.testing.assert_allclose(trained(wrap(accumulator)), alone, atol=0.1, err_msg=name)
    assert jnp.mean(jnp.abs(alone)) < 0.5 * jnp.mean(jnp.abs(start))


# Conversion.

convert = jax.jit(accumulators.convert, static_argnums=1)


@pytest.mark.parametrize("source", ACCUMULATORS)
@pytest.mark.parametrize("target", ACCUMULATORS)
def test_a_state_is_converted_and_trains_on(source, target):
    tx = {name: rmsprop(warmup(0.1), momentum=0.9, accumulator=name) for name in (source, target)}
    params = {"w": jnp.full((130, 140), 3.0)}
    _, state = jax.jit(lambda g: tx[source].update(g, tx[source].init(g)))(params)
    converted = convert(state, target)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, jax.eval_shape(tx[target].init, params))
    chex.assert_trees_all_equal(converted[1:], state[1:])
    exact = convert(state, "float32")[0].nu["w"]
    again = convert(converted, "float32")[0].nu["w"]
    np.testing.assert_allclose(again / exact, 1, atol=0.2)
    # One byte's mean is right between the number and its logarithm: up to 1% too high.
    np.testing.assert_allclose(again.mean(), exact.mean(), rtol=1e-2)
    jax.eval_shape(tx[target].update, params, converted)
    if source == target:
        chex.assert_trees_all_equal(converted, state)


@each_accumulator(EVERY_SMALL)
def test_a_state_says_what_its_codes_are(accumulator):
    """An accumulator without a name, too: its dtype is another's, as of `Uint8(-40)`, or nobody's."""
    tx = scale_by_rms(accumulator=accumulator)
    _, state = tx.update(jnp.full(3, 2.0), tx.init(jnp.zeros(3)))
    for same in (state, jax.tree.map(jnp.copy, state), pickle.loads(pickle.dumps(state))):
        np.testing.assert_allclose(
            accumulators.convert(same, "float32").nu, 0.4, rtol=0.19
        )  # a step of the code


@each_accumulator(["float32", *EVERY_SMALL])
def test_an_accumulator_is_found_by_its_name(accumulator):
    own = accumulators.resolve(accumulator)
    assert accumulators.resolve(own.name) == own
    state = scale_by_rms(accumulator=own).init({"w": jnp.zeros((3, 3))})
    assert accumulators.stored_by(state) == own


def test_an_accumulator_that_is_not_imported_is_named():
    _, state = (tx := scale_by_rms(accumulator=Float16Root())).update(jnp.ones(3), tx.init(jnp.zeros(3)))
    state = state._replace(nu={"Unknown(3)": state.nu["Float16Root()"]})
    for use in (lambda: accumulators.convert(state, "float32"), lambda: tx.update(jnp.ones(3), state)):
        with pytest.raises(ValueError, match=r"'Unknown\(3\)' stores its nu.*Import"):
            use()


@pytest.mark.parametrize("name", ["uint8", "bfloat16", "factored"])
def test_a_parameter_may_have_the_name_of_an_accumulator(name):
    """Its float32 numbers are those of the parameter, in a tree that looks like the accumulator's."""
    tx, params = rmsprop(1.0), {name: jnp.ones(3)}
    _, state = tx.update(params, tx.init(params))
    assert accumulators.stored_by(state[0]) == accumulators.Float32()
    np.testing.assert_allclose(accumulators.decoded(state[0])[name], 0.1, rtol=1e-6)
    small = accumulators.convert(state, "uint8")
    np.testing.assert_allclose(accumulators.decoded(small[0])[name], 0.1, rtol=0.19)  # a step of the code
    rmsprop(1.0, accumulator="uint8").update(params, small)


@pytest.mark.parametrize(
    "tree", [{}, (optax.EmptyState(),), {"w": jnp.ones(2)}, optax.adam(0.1).init(jnp.ones(2))]
)
def test_a_tree_without_a_state_is_not_converted(tree):
    with pytest.raises(ValueError, match=r"Invalid state: there is no ScaleByRmsState in this"):
        accumulators.convert(tree, "uint8")


# A state of one setting in an optimizer of another. Taken without a word, the steps were wrong by 1.4 to 40.

STORED = ["float32", *EVERY_SMALL]


@pytest.mark.parametrize("made", STORED, ids=str)
@pytest.mark.parametrize("used", STORED, ids=str)
def test_a_state_of_another_accumulator_is_refused(made, used):
    g = {"w": jnp.full((128, 128), 2.0)}
    maker, user = rmsprop(1.0, accumulator=made), rmsprop(1.0, accumulator=used)
    if made == used:
        jax.eval_shape(lambda g: user.update(g, maker.init(g)), g)
        return
    names = [accumulators.resolve(accumulator).name for accumulator in (made, used)]
    with pytest.raises(ValueError, match="stores its nu, this optimizer has accumulator=") as error:
        jax.eval_shape(user.update, g, jax.eval_shape(maker.init, g))
    assert all(f"'{name}'" in str(error.value) for name in names)
    if "float32" not in (made, used):  # by which every conversion goes
        return
    _, state = maker.update(g, maker.init(g))
    advice = re.search(r"accumulators\.convert\(state, '.*?'\)", str(error.value))[0]
    updates, _ = user.update(g, eval(advice, {"state": state, "accumulators": accumulators}))  # its own words
    np.testing.assert_allclose(updates["w"], -2 / np.sqrt(0.9 * 0.4 + 0.4), rtol=0.15)


def test_a_state_with_other_parts_is_refused():
    g = {"w": jnp.ones((128, 128))}
    tx = scale_by_rms(accumulator="factored")
    state = tx.init(g)
    parts = state.nu["factored"]
    for others in ({"row_mean": parts["row_mean"]}, {**parts, "third": parts["row_mean"]}):
        with pytest.raises(ValueError, match="Invalid state"):
            tx.update(g, state._replace(nu={"factored": others}))


def test_a_state_without_parameters_is_converted_too():
    state = scale_by_rms().init({})
    small = accumulators.convert(state, "uint8")
    assert small.nu == {"uint8": {}}
    assert accumulators.convert(small, "float32").nu == {}


@pytest.mark.parametrize("part", ["nu", "mu", "trace"])
def test_a_state_that_was_cast_is_refused(part):
    """As a checkpoint that was restored in bfloat16: rounded to nearest, it would stall."""
    g = {"w": jnp.ones(3)}
    tx = rmsprop(1.0, centered=True, momentum=0.9)
    state = tx.init(g)
    cast = optax.tree.set(state, **{part: optax.tree.cast(optax.tree.get(state, part), jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"bfloat16, .*float32"):
        tx.update(g, cast)


def test_a_momentum_buffer_in_another_dtype_is_refused():
    g = {"w": jnp.ones(3)}
    made, used = rmsprop(1.0, momentum=0.9), rmsprop(1.0, momentum=0.9, momentum_dtype="bfloat16")
    for maker, user in ((made, used), (used, made)):
        with pytest.raises(ValueError, match=r"momentum buffer is stored as \w+, this optimizer"):
            user.update(g, maker.init(g))


@pytest.mark.parametrize(("made", "message"), [(None, "it has no momentum buffer"), (0.9, "has no momentum")])
def test_momentum_in_the_state_and_in_the_optimizer_go_together(made, message):
    g = jnp.ones(3)
    with pytest.raises(ValueError, match=message):
        rmsprop(1.0, momentum=0.9 if made is None else None).update(g, rmsprop(1.0, momentum=made).init(g))


def test_the_learning_rate_before_or_after_the_buffer_goes_with_the_state():
    g = jnp.ones(3)
    for before in (True, False):
        made, used = (rmsprop(1.0, momentum=0.9, lr_in_momentum=x) for x in (before, not before))
        with pytest.raises(
            ValueError, match=rf"Invalid lr_in_momentum: lr_in_momentum={not before}, .*made with"
        ):
            used.update(g, made.init(g))


@pytest.mark.parametrize(
    "bad", ["int8", "uint8(x)", "uint8(-400)", "uint8(1, 2)", None, Float16Root, 3.0, jnp.uint8]
)
def test_what_is_no_accumulator_is_refused(bad):
    for use in (lambda: rmsprop(1e-3, accumulator=bad), lambda: accumulators.convert((), bad)):
        with pytest.raises(ValueError, match="Invalid accumulator"):
            use()


# What XLA makes of it.


STEPS = [(a, form, dtype) for a in CODES for form in FORMS for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(("accumulator", "name", "dtype"), quick(STEPS, STEPS[::3]))
def test_a_donated_step_needs_no_temporary_and_no_copy(accumulator, name, dtype):
    if accumulator == "bfloat16" and jax.__version_info__ < (0, 10):
        pytest.skip("the XLA of this JAX computes the codes twice and copies the old ones")
    tx = rmsprop(warmup(1e-3), accumulator=accumulator, **FORMS[name])
    assert_in_place(compiled_step(tx, arrays(dtype)), temporary=512)


@each_accumulator(SMALL)
def test_equal_leaves_are_lowered_once(accumulator):
    assert_equal_leaves_are_lowered_once(rmsprop(1e-3, accumulator=accumulator))


@each_accumulator(EVERY_SMALL)
def test_a_checkpoint_is_restored_into_the_same_and_into_another_accumulator(accumulator, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    params = {"w": jnp.ones((4, 3))}
    tx = rmsprop(0.1, accumulator=accumulator)
    _, state = jax.jit(lambda g: tx.update(g, tx.init(g)))(params)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal(restored, state)
    wide = accumulators.convert(restored, "float32")
    np.testing.assert_allclose(wide[0].nu["w"], 0.1, rtol=0.19)  # a step of the code
    rmsprop(0.1).update(params, wide)
