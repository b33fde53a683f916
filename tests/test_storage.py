"""Accumulators in one and two bytes: unbiased, bounded, and as easy to handle as float32."""

from dataclasses import dataclass
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_compiled import assert_equal_leaves_are_lowered_once, compiled_step

from rmsprop_jax import ScaleByRmsState, rmsprop, rounding, scale_by_rms, storage, warmup

SMALL = ["bfloat16", "uint8"]
FORMS = {
    "plain": {},
    "outside": {"eps_in_sqrt": False},
    "corrected": {"bias_correction": True},
    "centered": {"centered": True},
    "momentum": {"momentum": 0.9},
}
SCALE_FORMS = {name: form for name, form in FORMS.items() if name != "momentum"}


@dataclass(frozen=True)
class Float16Root:
    """An accumulator of one's own, as the module shows it."""

    def encode(self, nu, threshold):
        return rounding.to_dtype(jnp.sqrt(nu), jnp.float16, threshold)

    def decode(self, codes):
        return jnp.square(codes.astype(jnp.float32))


EVERY = [*SMALL, Float16Root(), storage.Uint8(-40)]
by_name = partial(pytest.mark.parametrize, "accumulator", ids=lambda x: x if isinstance(x, str) else repr(x))


# What is stored, against what would be in float32.

KINDS = ("gauss", "drop", "sparse", "periodic", "decades")
ELEMENTS, STEPS, LAST = 1024, 4000, 1000


def gradients(t):
    """[kind, element] at step t. In "drop" the scale falls to a hundredth a quarter before the end."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), t), 2)
    normal = jax.random.normal(keys[0], (len(KINDS), ELEMENTS))
    element = jnp.arange(ELEMENTS)
    factors = {
        "gauss": 1.0,
        "drop": jnp.where(t > STEPS - LAST, 0.01, 1.0),
        "sparse": jax.random.bernoulli(keys[1], 0.05, (ELEMENTS,)),
        "periodic": (t + element) % 8 == 0,
        "decades": 10 ** jnp.linspace(-2, 2, ELEMENTS),
    }
    normal = normal.at[KINDS.index("periodic")].set(1.0)
    return normal * jnp.stack([jnp.broadcast_to(factors[kind], (ELEMENTS,)) for kind in KINDS])


@pytest.fixture(scope="module", params=[0.9, 0.99, 0.999])
def ratios(request):
    """{accumulator: stored rms / exact rms, [time, kind, element]} for a decay, over the last steps."""
    names = ("float32", *SMALL)
    txs = [scale_by_rms(request.param, accumulator=name) for name in names]

    def step(states, t):
        states = [tx.update(gradients(t), state)[1] for tx, state in zip(txs, states, strict=True)]
        exact, *stored = (jnp.sqrt(storage.convert(state, "float32").nu) for state in states)
        return states, jnp.stack(stored) / exact

    @jax.jit
    def run(states):
        states, _ = jax.lax.scan(lambda s, t: (step(s, t)[0], None), states, jnp.arange(STEPS - LAST))
        return jax.lax.scan(step, states, jnp.arange(STEPS - LAST, STEPS))[1][::7]

    measured = run([tx.init(jnp.zeros((len(KINDS), ELEMENTS))) for tx in txs])
    return dict(zip(SMALL, np.moveaxis(np.asarray(measured), 1, 0), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("accumulator", "within"), [("bfloat16", 0.005), ("uint8", 0.02)])
def test_the_mean_is_right_after_thousands_of_steps(ratios, accumulator, within, kind):
    some = ratios[accumulator][:, KINDS.index(kind)]
    if kind == "periodic" and accumulator == "uint8":
        within = 0.08  # rounding errors that repeat with the gradients do not cancel
    assert abs(some.mean() - 1) < within


@pytest.mark.slow
@pytest.mark.parametrize(("accumulator", "low", "high"), [("bfloat16", 0.95, 1.05), ("uint8", 0.78, 1.28)])
def test_nine_in_ten_lie_close_over_four_decades(ratios, accumulator, low, high):
    some = ratios[accumulator][:, KINDS.index("decades")]
    assert low < np.quantile(some, 0.05) < np.quantile(some, 0.95) < high


# The codes.


def test_every_code_is_its_own_whatever_the_threshold():
    codes = jnp.arange(256).astype(jnp.uint8)
    for exponent in (-126, -50, 0, 64):
        uint8 = storage.Uint8(exponent)
        for threshold in (0, 1, 2**31, 2**32 - 1):
            again = uint8.encode(uint8.decode(codes), jnp.full(256, threshold, jnp.uint32))
            np.testing.assert_array_equal(again, codes)


def test_one_byte_is_even_in_the_logarithm():
    numbers = np.asarray(storage.Uint8(-50).decode(jnp.arange(256).astype(jnp.uint8)), np.float64)
    assert numbers[0] == 0
    np.testing.assert_allclose(np.log2(numbers[1:]), -50 + np.arange(1, 256) / 4, atol=1e-6)


def test_between_two_codes_the_mean_lies_between_that_of_the_number_and_of_its_logarithm():
    uint8, size = storage.Uint8(), 2**14
    thresholds = jnp.asarray((np.arange(size) + 0.5) / size * 2**32, jnp.uint32)
    for x in np.linspace(0.02, 0.98, 13):
        nu = 2.0 ** (x / 4)
        codes = np.asarray(uint8.encode(jnp.full(size, nu, jnp.float32), thresholds), np.float64)
        # 0.013 * x * (1 - x) below the logarithm, which is right to a thousandth
        np.testing.assert_allclose(codes.mean() - 200, x - 0.013 * x * (1 - x), atol=1.2e-3)
        assert set(codes) <= {200, 201}


def test_beyond_its_range_a_byte_is_the_nearest_and_never_zero():
    uint8 = storage.Uint8(-40)
    numbers = jnp.array([0.0, 1e-37, 2.0**-50, 2.0**30, 3e38, jnp.inf, jnp.nan, -jnp.nan])
    for threshold in (0, 2**32 - 1):
        codes = uint8.encode(numbers, jnp.full(8, threshold, jnp.uint32))
        np.testing.assert_array_equal(codes, [0, 1, 1, 255, 255, 255, 255, 255])


@pytest.mark.parametrize("exponent", [-127, 65, 0.5])
def test_a_byte_s_exponent_is_checked(exponent):
    with pytest.raises(ValueError, match="exponent"):
        storage.Uint8(exponent)


# The rules of the step.


@by_name(EVERY)
@pytest.mark.parametrize("form", SCALE_FORMS.values(), ids=SCALE_FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_zero_huge_and_missing_gradients(accumulator, form, dtype):
    tx = scale_by_rms(0.9, accumulator=accumulator, **form)
    state = tx.init(jnp.zeros(4, dtype))
    largest = jnp.finfo(dtype).max
    for g in ([0, 1, largest, -largest], [0, 0, 1, largest], [0, 1e-7, 0, 0]):
        u, state = tx.update(jnp.array(g, dtype), state)
        assert u.dtype == dtype
        np.testing.assert_array_equal(u == 0, jnp.array(g, dtype) == 0)
        chex.assert_tree_all_finite((u, storage.convert(state, "float32", source=accumulator)))
        if not form.get("centered") and not form.get("bias_correction"):
            assert jnp.all(jnp.abs(u) <= (1 + 2 * float(jnp.finfo(dtype).eps)) / np.sqrt(0.1))
    u, _ = tx.update(jnp.array([1, jnp.nan, jnp.inf, 1], dtype), state)
    np.testing.assert_array_equal(jnp.isfinite(u), [True, False, False, True])


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, (6, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.sampled_from([0.0, 0.9, 0.999]),
    st.sampled_from([0.0, 1e-8]),
    st.booleans(),
    st.sampled_from(EVERY),
)
def test_an_update_is_bounded_whatever_the_gradients(some, decay, eps, eps_in_sqrt, accumulator):
    tx = scale_by_rms(decay, eps, eps_in_sqrt=eps_in_sqrt, accumulator=accumulator)
    state = tx.init(jnp.zeros(3))
    for g in some:
        u, state = tx.update(jnp.asarray(g), state)
        assert jnp.all(jnp.abs(u) <= (1 + 1e-6) / np.sqrt(1 - decay))
    chex.assert_tree_all_finite(state)


@by_name(EVERY)
def test_the_first_steps_are_those_of_float32_to_a_step_of_the_code(accumulator):
    rng = np.random.default_rng(0)
    some = [{"a": jnp.asarray(rng.normal(size=(30, 20)), jnp.float32)} for _ in range(3)]
    for form in SCALE_FORMS.values():
        exact, small = scale_by_rms(0.9, **form), scale_by_rms(0.9, accumulator=accumulator, **form)
        exact_state, state = exact.init(some[0]), small.init(some[0])
        for g in some:
            u_exact, exact_state = exact.update(g, exact_state)
            u, state = small.update(g, state)
            # three roundings of at most a step of 2^(1/8) each
            np.testing.assert_allclose(u["a"] / u_exact["a"], 1, atol=0.3)
            assert abs(jnp.mean(u["a"] / u_exact["a"]) - 1) < 0.03


@by_name(SMALL)
def test_an_initial_scale_is_kept_in_the_mean(accumulator):
    for scale in (1.0, 0.3):
        state = scale_by_rms(initial_scale=scale, accumulator=accumulator).init(jnp.zeros((100, 100)))
        np.testing.assert_allclose(storage.convert(state, "float32").nu.mean(), scale, rtol=5e-3)


def test_sixty_four_bit_parameters_have_the_same_codes(x64):
    rng = np.random.default_rng(1)
    g = rng.normal(size=100)
    for accumulator in SMALL:
        tx = scale_by_rms(accumulator=accumulator)
        u, state = tx.update(jnp.asarray(g), tx.init(jnp.zeros(100)))
        _, single = tx.update(jnp.asarray(g, jnp.float32), tx.init(jnp.zeros(100, jnp.float32)))
        assert (u.dtype, state.nu.dtype.name) == (jnp.float64, accumulator)
        chex.assert_trees_all_equal(state.nu, single.nu)


# The state, in the company of Optax.

PARAMS = {"w": jnp.ones((6, 4)), "b": [jnp.ones(4, jnp.bfloat16), None], "none": jnp.ones((0, 3))}


@by_name(EVERY)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_state_keeps_its_fields_shapes_and_dtypes(accumulator, form):
    tx = rmsprop(1e-2, accumulator=accumulator, **form)
    before = tx.init(PARAMS)
    _, after = tx.update(PARAMS, before, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert isinstance(before[0], ScaleByRmsState)
    assert [x.shape for x in jax.tree.leaves(before[0].nu)] == [x.shape for x in jax.tree.leaves(PARAMS)]
    assert not any(x.weak_type for x in jax.tree.leaves(after))
    abstract = jax.eval_shape(tx.init, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, before)
    marked = optax.tree.map_params(tx, lambda _: "param", before, transform_non_params=lambda _: "other")
    assert optax.tree.get(marked, "nu") == {"w": "param", "b": ["param", None], "none": "param"}


@pytest.mark.parametrize(("accumulator", "size"), [("float32", 4), ("bfloat16", 2), ("uint8", 1)])
def test_bytes_per_parameter(accumulator, size):
    params = {"a": jnp.zeros((100, 30)), "b": jnp.zeros(50)}
    state = rmsprop(1e-3, accumulator=accumulator).init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == size * 3050 + 4  # and the count


WRAPPED = {
    "masked": lambda accumulator: optax.masked(rmsprop(0.1, accumulator=accumulator), True),
    "inject": lambda accumulator: optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(
        learning_rate=0.1, decay=0.9, accumulator=accumulator
    ),
    "multi_steps": lambda accumulator: optax.MultiSteps(rmsprop(0.1, accumulator=accumulator), 1),
    "finite": lambda accumulator: optax.apply_if_finite(rmsprop(0.1, accumulator=accumulator), 3),
}


@by_name(EVERY)
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_inside_the_wrappers_of_optax(accumulator, wrap):
    """Jitted and donated; a wrapper changes nothing."""
    rng = np.random.default_rng(2)
    start = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)

    def trained(tx):
        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        params, state = jnp.copy(start), tx.init(start)
        for _ in range(20):
            params, state = step(params, state)
        return params

    alone = trained(rmsprop(0.1, accumulator=accumulator))
    # A program of its own contracts a * b + c as it likes, which may turn a rounding: a step of the code
    np.testing.assert_allclose(trained(wrap(accumulator)), alone, atol=0.1)
    assert jnp.mean(jnp.abs(alone)) < 0.5 * jnp.mean(jnp.abs(start))


# Conversion.


@pytest.mark.parametrize("source", ["float32", *SMALL])
@pytest.mark.parametrize("target", ["float32", *SMALL])
def test_a_state_is_converted_and_trains_on(source, target):
    tx = {name: rmsprop(warmup(0.1), momentum=0.9, accumulator=name) for name in (source, target)}
    params = {"w": jnp.full((50, 40), 3.0)}
    _, state = tx[source].update(params, tx[source].init(params))
    converted = storage.convert(state, target)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, tx[target].init(params))
    chex.assert_trees_all_equal(converted[1:], state[1:])
    exact = storage.convert(state, "float32")[0].nu["w"]
    again = storage.convert(converted, "float32")[0].nu["w"]
    np.testing.assert_allclose(again / exact, 1, atol=0.2)
    np.testing.assert_allclose(again.mean(), exact.mean(), rtol=5e-3)
    tx[target].update(params, converted)
    if source == target:
        chex.assert_trees_all_equal(converted, state)


def test_one_s_own_accumulator_is_converted_by_its_name_alone():
    own = Float16Root()
    tx = scale_by_rms(accumulator=own)
    _, state = tx.update(jnp.full(3, 2.0), tx.init(jnp.zeros(3)))
    with pytest.raises(ValueError, match=r"float16.*source"):
        storage.convert(state, "float32")
    np.testing.assert_allclose(storage.convert(state, "float32", source=own).nu, 0.4, rtol=2e-3)


@pytest.mark.parametrize("bad", ["int8", None, Float16Root, 3.0, jnp.uint8])
def test_what_is_no_accumulator_is_refused(bad):
    for use in (lambda: rmsprop(1e-3, accumulator=bad), lambda: storage.convert((), bad)):
        with pytest.raises(ValueError, match="Invalid accumulator"):
            use()


# What XLA makes of it.


@by_name(SMALL)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_donated_step_needs_no_temporary_and_no_copy(accumulator, form, dtype):
    if accumulator == "bfloat16" and jax.__version_info__ < (0, 10):
        pytest.skip("the XLA of this JAX computes the codes twice and copies the old ones")
    compiled = compiled_step(rmsprop(warmup(1e-3), accumulator=accumulator, **form), dtype)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 512
    assert not [line for line in compiled.as_text().splitlines() if " copy(" in line and "[]" not in line]
    assert memory.alias_size_in_bytes >= memory.output_size_in_bytes - 1024


@by_name(SMALL)
def test_equal_leaves_are_lowered_once(accumulator):
    assert_equal_leaves_are_lowered_once(rmsprop(1e-3, accumulator=accumulator))


@by_name(SMALL)
def test_a_checkpoint_is_restored_into_the_same_and_into_another_accumulator(accumulator, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    params = {"w": jnp.ones((4, 3))}
    tx = rmsprop(0.1, accumulator=accumulator)
    _, state = tx.update(params, tx.init(params))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal(restored, state)
    wide = storage.convert(restored, "float32")
    np.testing.assert_allclose(wide[0].nu["w"], 0.1, rtol=0.19)  # a step of the code
    rmsprop(0.1).update(params, wide)
