"""Derivatives through updates, for meta-learning and hyper-gradients: right, and finite everywhere."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CODES, Float16Root, each_accumulator, quick
from jax.test_util import check_grads

from rmsprop_jax import apply_updates, conventions, rmsprop, rounding, scale_by_rms

slow = pytest.mark.slow  # what compiles derivatives of derivatives
FLAGS = ("eps_in_sqrt", "bias_correction", "centered")
FORMS = [dict(zip(FLAGS, flags, strict=True)) for flags in itertools.product([True, False], repeat=3)]
FEW = quick(FORMS, FORMS[3:5])  # which have each flag on and off
G = np.array([0.3, -1.0, 2.0, 1e-3])  # float64 where that is enabled


def after(steps, **form):
    """A function of a scale of the gradients, the start of nu and eps: all that three updates do."""

    def outcome(scale, start, eps):
        tx = scale_by_rms(0.9, eps, **form)
        state = tx.init(G)
        state = state._replace(nu=start * jnp.ones_like(state.nu))
        total = 0.0
        for t in range(steps):
            u, state = tx.update(jnp.cos(t * G) * G * scale, state)
            total += jnp.sum(u * jnp.arange(1.0, 5.0))
        return total + jnp.sum(jnp.sqrt(state.nu))

    return outcome


@pytest.mark.parametrize("form", FEW, ids=str)
def test_first_and_second_derivatives_are_finite_differences(form, x64):
    """In float64, to what differences of 1e-6 give; by the gradients, nu and eps at once, of two updates."""
    check_grads(jax.jit(after(2, **form)), (1.1, 0.5, 1e-2), order=2, modes=["rev"], atol=1e-4, rtol=1e-4)


@slow
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_of_the_learning_rate_and_the_decay(form, x64):
    def outcome(learning_rate, decay):
        tx = rmsprop(learning_rate, decay, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1, **form)
        w, state = jnp.asarray(G), tx.init(G)
        for _ in range(2):
            u, state = tx.update(2 * w, state, w)
            w = w + u
        return jnp.sum(w**2)

    check_grads(jax.jit(outcome), (0.1, 0.9), order=2, modes=["rev"], atol=1e-4, rtol=1e-4)


EDGE = jnp.array([0.0, 1e-30, 1e-15, 1e-5, 1.0, 1e15])


@pytest.mark.parametrize("form", FEW, ids=str)
@pytest.mark.parametrize(
    ("eps", "accumulator"), [(0.0, "float32"), (1e-30, "float32"), *((0.0, name) for name in CODES)]
)
def test_no_derivative_is_nan(form, eps, accumulator):
    """Of zero, tiny and huge gradients, in float32, where g^2 and nu^(-3/2) leave its range."""
    tx = scale_by_rms(0.9, eps, accumulator=accumulator, **form)

    def outcome(x):
        state, total = tx.init(EDGE), 0.0
        for t in range(3):
            u, state = tx.update(EDGE * x * (t != 1), state)
            total += jnp.sum(u * jnp.arange(6.0))
        return total

    first = jax.grad(outcome)
    assert jnp.all(jnp.isfinite(jnp.stack(jax.jit(lambda x: (first(x), jax.grad(first)(x)))(1.0))))


@pytest.mark.parametrize("form", FEW, ids=str)
def test_the_derivative_of_each_element_at_zero(form):
    """Not one of its neighbours is spoilt, and with eps it is 1 / sqrt(eps)'s or 1 / eps."""
    eps = 1e-4
    slope = jax.jacobian(lambda g: scale_by_rms(0.9, eps, **form).update(g, scale_by_rms(**form).init(g))[0])
    found = jax.jit(slope)(jnp.array([0.0, 1.0]))
    assert jnp.all(jnp.isfinite(found))
    np.testing.assert_allclose(found[0, 0], 1 / np.sqrt(eps) if form["eps_in_sqrt"] else 1 / eps, rtol=1e-3)


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_below_the_smallest_normal_number_nothing_moves_the_root(eps_in_sqrt):
    """A tiny gradient is divided by that number's root, whatever nu is; and eps, if it is under the root."""

    def update(start, eps):
        tx, g = scale_by_rms(0.9, eps, eps_in_sqrt=eps_in_sqrt), jnp.float32(1e-25)
        return tx.update(g, tx.init(g)._replace(nu=start))[0]

    by_nu, by_eps = jax.jit(jax.grad(update, (0, 1)))(jnp.float32(0), jnp.float32(0))
    assert by_nu == 0
    assert (by_eps == 0) == eps_in_sqrt


# Straight through: the derivative of rounding is 1, which unbiased rounding has in the mean.


@each_accumulator([*CODES, Float16Root()])
@pytest.mark.parametrize("form", quick([{}, {"eps_in_sqrt": False}, {"centered": True}], [{}]), ids=str)
def test_stored_small_an_update_has_the_derivative_of_float32(accumulator, form):
    """Of one update, to what a code is off by: its step, 2^(1/4) for a byte."""
    g = jnp.array([0.5, -1.0, 2.0])

    def slope(accumulator):
        tx = scale_by_rms(0.9, 1.0, accumulator=accumulator, **form)

        @jax.jit
        def of_the_second(g):
            state = tx.update(g, tx.init(g))[1]
            return jax.jacobian(lambda g: tx.update(g, state)[0])(g)

        return of_the_second(g)

    exact = np.diag(slope("float32"))
    np.testing.assert_allclose(np.diag(slope(accumulator)), exact, rtol=0.2)


@each_accumulator(CODES)
def test_the_sign_of_a_first_gradient_has_no_derivative(accumulator):
    """Without eps the first update is sign(g) / sqrt(0.1): -2.4 was found where this is 0."""
    tx = scale_by_rms(0.9, 0.0, accumulator=accumulator)
    g = jnp.linspace(-2.0, 2.0, 64)
    slope = jax.jit(jax.grad(lambda x: jnp.mean(tx.update(g * x, tx.init(g))[0] * g)))(1.0)
    assert abs(slope) < 0.2


def test_no_derivative_goes_through_integers_to_the_next_update():
    """A byte has none: what an update owes to earlier ones is a constant, as with stop_gradient on nu."""
    g = jnp.array([0.5, -1.0, 2.0])

    def second(accumulator, stop):
        tx = scale_by_rms(0.9, 1.0, accumulator=accumulator)

        def outcome(x):
            _, state = tx.update(g * x, tx.init(g))
            state = state._replace(nu=stop(state.nu))
            return jnp.sum(tx.update(g, state)[0])

        return jax.jit(jax.grad(outcome))(1.0)

    assert second("uint8", lambda nu: nu) == second("float32", jax.lax.stop_gradient) == 0
    np.testing.assert_allclose(second("bfloat16", lambda nu: nu), second("float32", lambda nu: nu), rtol=0.05)


def test_momentum_and_parameters_rounded_to_bfloat16():
    w = jnp.array([1.0, -2.0, 3.0], jnp.bfloat16)

    def outcome(learning_rate, momentum_dtype, key):
        tx = rmsprop(learning_rate, momentum=0.9, momentum_dtype=momentum_dtype)
        params, state = w.astype(jnp.float32) if key is None else w, tx.init(w)
        for _ in range(3):
            u, state = tx.update(params.astype(jnp.float32), state, params)
            params = apply_updates(params, u, key=key)
        return jnp.sum(params.astype(jnp.float32) ** 2)

    def slope(momentum_dtype, key):
        return jax.jit(jax.grad(lambda rate, key: outcome(rate, momentum_dtype, key)))(0.1, key)

    exact = slope(None, None)
    for case in (("bfloat16", None), (None, jax.random.key(0)), ("bfloat16", jax.random.key(0))):
        np.testing.assert_allclose(slope(*case), exact, rtol=0.05)


def test_rounding_alone():
    x = jnp.array([1.001, -2.3, 0.0])
    threshold = rounding.thresholds(x.shape, 0, 0)
    slope = jax.grad(lambda x: jnp.sum(rounding.to_dtype(x, jnp.bfloat16, threshold).astype(jnp.float32) * x))
    np.testing.assert_allclose(slope(x), 2 * x, rtol=1e-2)


@slow
@pytest.mark.parametrize("name", conventions.names())
def test_every_convention(name, x64):
    def outcome(scale):
        tx = conventions.get(name)(0.1)
        state, total = tx.init(G), 0.0
        for _ in range(2):
            u, state = tx.update(G * scale, state, G)
            total += jnp.sum(u * G)
        return total

    check_grads(jax.jit(outcome), (1.1,), order=2, modes=["rev"], atol=1e-3, rtol=1e-3)
