"""Accumulators in one and two bytes: the rules of the step."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CODES, EVERY_CODE, GRADIENTS, each, each_accumulator, forms
from hypothesis import given, settings
from hypothesis import strategies as st

from rmsprop_jax import accumulators, scale_by_rms

SCALE_FORMS = forms("plain", "outside", "corrected", "centered")


@each_accumulator(EVERY_CODE)
@each(form=SCALE_FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_zero_huge_and_missing_gradients(accumulator, form, dtype):
    tx = scale_by_rms(0.9, accumulator=accumulator, **form)
    state = tx.init(jnp.zeros(4, dtype))
    largest = jnp.finfo(dtype).max
    for g in ([0, 1, largest, -largest], [0, 0, 1, largest], [0, 1e-7, 0, 0]):
        u, state = tx.update(jnp.array(g, dtype), state)
        assert u.dtype == dtype
        np.testing.assert_array_equal(u == 0, jnp.array(g, dtype) == 0)
        chex.assert_tree_all_finite((u, accumulators.convert(state, "float32")))
        if not form.get("centered") and not form.get("bias_correction"):
            assert jnp.all(jnp.abs(u) <= (1 + 2 * float(jnp.finfo(dtype).eps)) / np.sqrt(0.1))
    u, _ = tx.update(jnp.array([1, jnp.nan, jnp.inf, 1], dtype), state)
    np.testing.assert_array_equal(jnp.isfinite(u), [True, False, False, True])


@settings(deadline=None, max_examples=60)
@given(
    GRADIENTS,
    st.sampled_from([0.0, 0.9, 0.999]),
    st.sampled_from([0.0, 1e-8]),
    st.booleans(),
    st.sampled_from(EVERY_CODE),
)
def test_an_update_is_bounded_whatever_the_gradients(some, decay, eps, eps_in_sqrt, accumulator):
    tx = scale_by_rms(decay, eps, eps_in_sqrt=eps_in_sqrt, accumulator=accumulator)
    state = tx.init(jnp.zeros(3))
    for g in some:
        u, state = tx.update(jnp.asarray(g), state)
        assert jnp.all(jnp.abs(u) <= (1 + 1e-6) / np.sqrt(1 - decay))
    chex.assert_tree_all_finite(state)


@each_accumulator(EVERY_CODE)
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


@each_accumulator(CODES)
def test_an_initial_scale_is_kept_in_the_mean(accumulator):
    for scale in (1.0, 0.3):
        state = scale_by_rms(initial_scale=scale, accumulator=accumulator).init(jnp.zeros((100, 100)))
        np.testing.assert_allclose(accumulators.convert(state, "float32").nu.mean(), scale, rtol=5e-3)


def test_sixty_four_bit_parameters_have_the_same_codes(x64):
    rng = np.random.default_rng(1)
    g = rng.normal(size=100)
    for accumulator in CODES:
        tx = scale_by_rms(accumulator=accumulator)
        u, state = tx.update(jnp.asarray(g), tx.init(jnp.zeros(100)))
        _, single = tx.update(jnp.asarray(g, jnp.float32), tx.init(jnp.zeros(100, jnp.float32)))
        assert (u.dtype, state.nu[accumulator].dtype.name) == (jnp.float64, accumulator)
        chex.assert_trees_all_equal(state.nu, single.nu)
