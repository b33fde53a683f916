"""The equation: against float64 NumPy, and at the edges where other implementations break."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FLAGS, GRADIENTS, scanned, scanned_each
from hypothesis import given, settings

from rmsprop_jax import ScaleByRmsState, scale_by_rms

FLOATS = [jnp.float16, jnp.bfloat16, jnp.float32]
FORMS = [{"eps": eps, **flags} for eps in (0.0, 1e-50) for flags in FLAGS] + [{"eps": 1e-8}]
in_every_form = scanned_each([scale_by_rms(0.9, **form) for form in FORMS])


def run(tx, gradients):
    """The updates for a sequence of gradients, and the last state."""
    # A real number times a complex one is a promotion that JAX calls implicit, and Optax is not strict.
    ours = tx.update.__module__.startswith("rmsprop_jax")
    strict = ours and not jnp.iscomplexobj(gradients[0])
    with jax.numpy_dtype_promotion("strict" if strict else "standard"):
        state = tx.init(gradients[0])
        updates = []
        for g in gradients:
            u, state = tx.update(g, state)
            updates.append(u)
    return updates, state


@pytest.fixture
def strict_but_for_complex(dtype):
    """A real number times a complex one is a promotion that JAX calls implicit."""
    with jax.numpy_dtype_promotion("standard" if jnp.issubdtype(dtype, jnp.complexfloating) else "strict"):
        yield


def weighted_sum(x, decay):
    """sum_t (1 - decay) * decay^(T - t) * x_t, over the first axis of a float64 array."""
    weights = (1 - decay) * decay ** np.arange(len(x))[::-1]
    return np.tensordot(weights, x, axes=1)


def variance(g, decay):
    """E[g^2] - E[g]^2 by two passes, without the subtraction; the start, at 0, has the weight decay^T."""
    mean = weighted_sum(g, decay)
    return weighted_sum((g - mean) ** 2, decay) + decay ** len(g) * mean**2


def reference(gradients, decay, eps, initial_scale=0.0, eps_in_sqrt=True, centered=False):
    """The last update, in float64 and from the definition: weighted sums over the whole history."""
    g = np.asarray(gradients, np.float64)
    nu = variance(g, decay) if centered else weighted_sum(g**2, decay)
    nu = nu + initial_scale * decay ** len(g)
    return g[-1] / (np.sqrt(nu + eps) if eps_in_sqrt else np.sqrt(nu) + eps)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("eps_in_sqrt", [False, True])
@pytest.mark.parametrize("initial_scale", [0.0, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_update_is_the_definition(centered, eps_in_sqrt, initial_scale, decay):
    rng = np.random.default_rng(1)
    gradients = [jnp.asarray(rng.normal(0.3, 1, (4, 3)), jnp.float32) for _ in range(150)]
    form = {"initial_scale": initial_scale, "eps_in_sqrt": eps_in_sqrt, "centered": centered}
    tx = scale_by_rms(decay, 1e-3, **form)
    updates, state = run(tx, gradients)
    assert state.count == 150
    for t in (1, 2, 17, 150):
        # float32 rounding, at most one unit of the last place (6e-8) for each step remembered
        np.testing.assert_allclose(updates[t - 1], reference(gradients[:t], decay, 1e-3, **form), rtol=2e-5)


def test_a_textbook_accumulator():
    _, state = run(scale_by_rms(decay=0.9), [jnp.array([10.0, 1.0]), jnp.array([-8.0, 1.0])])
    np.testing.assert_allclose(state.nu, [0.9 * 10 + 0.1 * 64, 0.9 * 0.1 + 0.1], rtol=1e-6)


def test_one_minus_decay_is_formed_before_decay_is_rounded():
    """float32's 0.999999 is 1 - 9.54e-7: the accumulator would be 5% too small after the first step."""
    for centered in (False, True):
        _, state = run(scale_by_rms(0.999999, centered=centered), [jnp.ones(2)])
        np.testing.assert_allclose(state.nu, 1e-6, rtol=3e-6)
        if centered:
            np.testing.assert_allclose(state.mu, 1e-6, rtol=3e-6)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("noise", [0.0, 1.0, 100.0])
def test_centered_variance_of_large_nearly_constant_gradients(decay, noise):
    rng = np.random.default_rng(2)
    gradients = jnp.asarray(1e4 + noise * rng.normal(size=(3000, 50)), jnp.float32)
    tx = scale_by_rms(decay, eps=1e-8, centered=True)
    state, _ = scanned(tx, gradients)
    exact = variance(np.asarray(gradients, np.float64), decay)
    assert jnp.all(state.nu >= 0)
    # float32 keeps 1e4 to half of 2^-10; the running mean stops where its step (1 - decay) * (g - mu) is
    # below that, so a deviation of 2^-11 / (1 - decay) is not seen.
    unseen = 2.0**-11 / (1 - decay)
    np.testing.assert_allclose(np.sqrt(state.nu), np.sqrt(exact), rtol=1e-2, atol=3 * unseen)


def test_optax_centered_is_nan_where_ours_is_finite():
    gradients = [jnp.linspace(1e4, 2e4, 50)] * 300
    theirs, _ = run(optax.scale_by_stddev(decay=0.9), gradients)
    ours, _ = run(scale_by_rms(decay=0.9, centered=True), gradients)
    assert jnp.any(jnp.isnan(theirs[-1]))
    chex.assert_tree_all_finite(ours)


def test_centered_with_bias_correction_begins_with_steps_of_order_one():
    g = jnp.array([1e-3, 1.0, -1e3])
    (ours,), _ = run(scale_by_rms(decay=0.9, centered=True, bias_correction=True), [g])
    np.testing.assert_allclose(ours, np.sign(g) / np.sqrt(0.9), rtol=1e-2)  # 1e-3: eps counts
    (theirs,), _ = run(optax.scale_by_stddev(decay=0.9, bias_correction=True), [g])
    assert not jnp.all(jnp.abs(theirs) < 100)  # g / sqrt(0 + eps), or the root of a negative number


@pytest.mark.parametrize("dtype", [*FLOATS, jnp.complex64])
def test_a_zero_gradient_gives_exactly_zero(dtype, strict_but_for_complex):
    """Before, beside and after gradients that are not."""
    gradients = jnp.zeros((5, 3), dtype).at[3, 1].set(1)
    for form, (_, updates) in zip(FORMS, in_every_form(gradients), strict=True):
        assert updates.dtype == dtype
        np.testing.assert_array_equal(updates == 0, gradients == 0, err_msg=str(form))


def test_optax_gives_nan_for_float16_zero_gradients():
    (u,), _ = run(optax.scale_by_rms(), [jnp.zeros(3, jnp.float16)])
    assert jnp.all(jnp.isnan(u))


@pytest.mark.parametrize("dtype", [*FLOATS, jnp.complex64, jnp.float64, jnp.complex128])
def test_the_largest_gradients_leave_everything_finite(dtype, request, strict_but_for_complex):
    if dtype in (jnp.float64, jnp.complex128):
        request.getfixturevalue("x64")
    largest = jnp.finfo(dtype).max
    g = jnp.array([1.0, -1.0, 1.0], dtype) * largest
    outcomes = in_every_form(jnp.stack([g, -g, g, jnp.ones_like(g), jnp.zeros_like(g)]))
    for form, (state, updates) in zip(FORMS, outcomes, strict=True):
        chex.assert_tree_all_finite((updates, state))
        if not form.get("centered"):
            rounding = 1 + 2 * float(jnp.finfo(dtype).eps)
            assert np.all(np.abs(updates) <= rounding / np.sqrt(0.1)), form


def test_a_parameter_moves_again_after_one_huge_gradient():
    gradients = jnp.concatenate([jnp.array([3e38]), jnp.ones(2000)])

    def last_update(tx):
        _, updates = scanned(tx, gradients)
        return updates[-1]

    np.testing.assert_allclose(last_update(scale_by_rms(decay=0.9)), 1.0, rtol=1e-5)
    assert last_update(optax.scale_by_rms(decay=0.9)) == 0  # its accumulator is inf for ever


BOUNDED = [*itertools.product([0.0, 0.5, 0.9, 0.999], [0.0, 1e-30, 1e-8, 1.0], [False, True])]
each_bounded = scanned_each([scale_by_rms(decay, eps, eps_in_sqrt=inside) for decay, eps, inside in BOUNDED])


@settings(deadline=None, max_examples=40)
@given(GRADIENTS)
def test_an_update_is_bounded_whatever_the_gradients(gradients):
    for (decay, *how), (state, updates) in zip(BOUNDED, each_bounded(gradients), strict=True):
        assert np.all(np.abs(updates) <= (1 + 1e-6) / np.sqrt(1 - decay)), (decay, how)
        chex.assert_tree_all_finite(state)


CENTERED = [*itertools.product([0.0, 1e-10, 0.999], [0.0, 1e-30, 1e-8], [False, True], [False, True])]
each_centered = scanned_each(
    [scale_by_rms(decay, eps, 0.0, *flags, centered=True) for decay, eps, *flags in CENTERED]
)


@settings(deadline=None, max_examples=20)
@given(GRADIENTS)
def test_centered_stays_finite_whatever_the_gradients(gradients):
    for form, (state, updates) in zip(CENTERED, each_centered(gradients), strict=True):
        chex.assert_tree_all_finite((updates, state))
        assert np.all(state.nu >= 0), form


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [*FLOATS, jnp.complex64])
def test_what_is_not_finite_stays_visible_and_alone(bad, dtype, strict_but_for_complex):
    gradients = jnp.ones((5, 3), dtype).at[2, 1].set(bad)
    for form, (_, updates) in zip(FORMS, in_every_form(gradients), strict=True):
        assert np.all(np.isfinite(updates[:, [0, 2]])), form
        np.testing.assert_array_equal(np.isfinite(updates[:3, 1]), [True, True, False], err_msg=str(form))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_low_precision_gradients_are_computed_in_float32(dtype, centered):
    rng = np.random.default_rng(3)
    gradients = [jnp.asarray(rng.normal(1, 1e-2, 20), dtype) for _ in range(60)]
    tx = scale_by_rms(decay=0.999, centered=centered)
    low, low_state = run(tx, gradients)
    full, full_state = run(tx, [g.astype(jnp.float32) for g in gradients])
    # XLA contracts a * b + c as it likes in either program: a unit in the last place
    chex.assert_trees_all_close(low_state, full_state, rtol=1e-6)
    half_a_unit = float(jnp.finfo(dtype).eps) / 2
    low, full = np.asarray(low, np.float32), np.asarray(full)
    np.testing.assert_allclose(low, full, rtol=1.01 * half_a_unit + 1e-6)
    assert low_state.nu.dtype == jnp.float32


def test_complex_gradients_are_measured_by_their_modulus():
    rng = np.random.default_rng(4)
    g = [jnp.asarray(rng.normal(size=5) + 1j * rng.normal(size=5), jnp.complex64) for _ in range(20)]
    ours, state = run(scale_by_rms(), g)
    theirs, _ = run(optax.scale_by_rms(), g)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert state.nu.dtype == jnp.float32
    _, state = run(scale_by_rms(centered=True), g)
    assert (state.nu.dtype, state.mu.dtype) == (jnp.float32, jnp.complex64)


def test_the_state_is_one_class_with_strong_dtypes():
    params = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": [jnp.float32(0), None], "c": jnp.zeros((0, 4))}
    grads = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": [jnp.float32(1), None], "c": jnp.zeros((0, 4))}
    for form in FLAGS:
        tx = scale_by_rms(**form)
        before = tx.init(params)
        updates, after = jax.eval_shape(tx.update, grads, before)
        assert isinstance(before, ScaleByRmsState)
        assert (before.mu is not None) == form["centered"]
        chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        assert before.count.dtype == jnp.int32
        assert all(x.dtype in (jnp.float32, jnp.int32) and not x.weak_type for x in jax.tree.leaves(after))


@pytest.mark.parametrize("empty", [{}, (), None, [None]])
def test_empty_trees(empty):
    tx = scale_by_rms(centered=True)
    updates, state = tx.update(empty, tx.init(empty))
    assert updates == empty
    assert state.count == 1


def test_init_takes_abstract_parameters_and_numbers():
    tx = scale_by_rms(initial_scale=2.0, centered=True)
    state = tx.init(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16))
    np.testing.assert_array_equal(state.nu, np.full((2, 3), 2.0, np.float32))
    _, state = tx.update(1.0, tx.init(0.0))
    assert state.nu.shape == ()


def test_the_count_saturates():
    tx = scale_by_rms(bias_correction=True)
    largest = jnp.int32(jnp.iinfo(jnp.int32).max)
    updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2))._replace(count=largest, nu=jnp.ones(2)))
    assert state.count == largest
    np.testing.assert_allclose(updates, 1.0, rtol=1e-6)
