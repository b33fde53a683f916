"""Accumulators in one and two bytes: the rules of the step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CODES, EVERY_CODE, GRADIENTS, each_accumulator, forms, scanned_each
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsprop_jax import accumulators, scale_by_rms

SCALE_FORMS = forms("plain", "outside", "corrected", "centered")


in_every_form = {
    accumulator: scanned_each([scale_by_rms(0.9, accumulator=accumulator, **f) for f in SCALE_FORMS.values()])
    for accumulator in EVERY_CODE
}


as_float32 = jax.jit(lambda state: accumulators.convert(state, "float32"))


@each_accumulator(EVERY_CODE)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_zero_huge_and_missing_gradients(accumulator, dtype):
    largest = jnp.finfo(dtype).max
    finite = [[0, 1, largest, -largest], [0, 0, 1, largest], [0, 1e-7, 0, 0]]
    g = jnp.array([*finite, [1, jnp.nan, jnp.inf, 1]], dtype)
    outcomes = in_every_form[accumulator](g)
    again = in_every_form[accumulator](g.at[3].set(0))
    for (name, form), (_, u), (state, _) in zip(SCALE_FORMS.items(), outcomes, again, strict=True):
        assert u.dtype == dtype
        np.testing.assert_array_equal(u[:3] == 0, g[:3] == 0, err_msg=name)
        np.testing.assert_array_equal(jnp.isfinite(u[3]), [True, False, False, True], err_msg=name)
        state = as_float32(state)
        chex.assert_tree_all_finite((u[:3], state))
        if not form.get("centered") and not form.get("bias_correction"):
            assert jnp.all(jnp.abs(u[:3]) <= (1 + 2 * float(jnp.finfo(dtype).eps)) / np.sqrt(0.1)), name


BOUNDED = [(decay, *how) for decay in (0.0, 0.9, 0.999) for how in ((0.0, False), (1e-8, True))]
each_bounded = {
    accumulator: scanned_each(
        [scale_by_rms(*row, eps_in_sqrt=inside, accumulator=accumulator) for *row, inside in BOUNDED]
    )
    for accumulator in EVERY_CODE
}


@settings(deadline=None, max_examples=40)
@given(GRADIENTS, st.sampled_from(EVERY_CODE))
def test_an_update_is_bounded_whatever_the_gradients(some, accumulator):
    for (decay, *how), (state, updates) in zip(BOUNDED, each_bounded[accumulator](some), strict=True):
        assert np.all(np.abs(updates) <= (1 + 1e-6) / np.sqrt(1 - decay)), (decay, how)
        chex.assert_tree_all_finite(state)


@each_accumulator(EVERY_CODE)
def test_the_first_steps_are_those_of_float32_to_a_step_of_the_code(accumulator):
    rng = np.random.default_rng(0)
    some = jnp.asarray(rng.normal(size=(3, 30, 20)), jnp.float32)
    exact = scanned_each([scale_by_rms(0.9, **form) for form in SCALE_FORMS.values()])
    for (_, u), (_, u_exact) in zip(in_every_form[accumulator](some), exact(some), strict=True):
        for ratio in np.asarray(u / u_exact):
            # three roundings of at most a step of 2^(1/8) each
            np.testing.assert_allclose(ratio, 1, atol=0.3)
            assert abs(np.mean(ratio) - 1) < 0.03


@each_accumulator(CODES)
def test_an_initial_scale_is_kept_in_the_mean(accumulator):
    """Compiled too, where XLA sees a constant."""
    for scale in (1.0, 0.3):
        init = scale_by_rms(initial_scale=scale, accumulator=accumulator).init
        for state in (init(jnp.zeros((100, 100))), jax.jit(init)(jnp.zeros((100, 100)))):
            np.testing.assert_allclose(accumulators.decoded(state).mean(), scale, rtol=5e-3)


def test_sixty_four_bit_parameters_have_the_same_codes(x64):
    rng = np.random.default_rng(1)
    g = rng.normal(size=100)
    for accumulator in CODES:
        tx = scale_by_rms(accumulator=accumulator)
        u, state = tx.update(jnp.asarray(g), tx.init(jnp.zeros(100)))
        _, single = tx.update(jnp.asarray(g, jnp.float32), tx.init(jnp.zeros(100, jnp.float32)))
        assert (u.dtype, state.nu[accumulator].dtype.name) == (jnp.float64, accumulator)
        chex.assert_trees_all_equal(state.nu, single.nu)
