"""`nu` from means of rows and of columns: its numbers, against references and against Adafactor's."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import each, forms, scanned_each
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from rmsprop_jax import accumulators, scale_by_rms
from rmsprop_jax.accumulators import _factored

SHAPES = [(2, 3), (5, 2), (3, 4, 3), (2, 2, 5, 2), (4, 1, 6), (30, 7), (1, 3, 3), (0, 3, 4)]
SCALE_FORMS = forms("plain", "outside", "corrected")


def factored(decay=0.9, eps=1e-8, **form):
    """With every matrix factored, however small."""
    return scale_by_rms(decay, eps, accumulator=accumulators.Factored(2), **form)


def means(state):
    """Of one parameter: of its rows, and of its columns."""
    return [state.nu["factored(2)"][part] for part in ("row_mean", "column_mean")]


def gradients(shape, steps=4, seed=0):
    """Of scales four decades apart."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) * 10 ** rng.uniform(-2, 2, shape[-1]) for _ in range(steps)]


def textbook(some, over, decay, eps, eps_in_sqrt=True, bias_correction=False, initial_scale=0.0):
    """The recursion in NumPy's float64: the updates, and nu at the end."""
    means = [np.full_like(some[0].mean(axis, keepdims=True), initial_scale) for axis in over]
    for t, g in enumerate(some, start=1):
        now = (1 - decay) * g**2
        means = [decay * m + now.mean(axis, keepdims=True) for m, axis in zip(means, over, strict=True)]
        nu = means[0] * means[1] / means[0].mean(over[1], keepdims=True)
        used = np.maximum(nu, now) / (1 - decay**t if bias_correction else 1)
        yield g / (np.sqrt(used + eps) if eps_in_sqrt else np.sqrt(used) + eps), nu


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
@each(form=SCALE_FORMS | {"from 1": {"initial_scale": 1.0}})
def test_takes_the_steps_of_the_textbook(form, shape):
    """To 1e-6: a dozen roundings of float32, 6e-8 each."""
    tx, some = factored(0.9, 1e-4, **form), [np.float32(g).astype(np.float64) for g in gradients(shape)]
    state = tx.init(jnp.zeros(shape))
    for g, (u, nu) in zip(
        some, textbook(some, accumulators.Factored(2).over(shape), 0.9, 1e-4, **form), strict=True
    ):
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state)
        np.testing.assert_allclose(updates, u, rtol=1e-6)
        np.testing.assert_allclose(accumulators.convert(state, "float32").nu, nu, rtol=1e-6)


@settings(deadline=None, max_examples=8)  # each is compiled
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.sampled_from([0.0, 0.5, 0.99]))
def test_of_any_shape(shape, decay):
    """The two largest dimensions; or, where they are not two of two or more, as float32."""
    some = [np.float32(g).astype(np.float64) for g in gradients(tuple(shape), 2)]
    tx = factored(decay, 1e-4)
    state = tx.init(jnp.zeros(shape))
    over = accumulators.Factored(2).over(tuple(shape))
    assert (over is None) == (sorted(shape)[-2] < 2)
    if over is None:
        chex.assert_trees_all_equal(means(state)[0], scale_by_rms(decay, 1e-4).init(jnp.zeros(shape)).nu)
        return
    assert sorted(shape)[-2:] == sorted(shape[axis] for axis in over)
    assert [x.size for x in means(state)] == [np.prod(shape) // shape[axis] for axis in over]
    for g, (u, _) in zip(some, textbook(some, over, decay, 1e-4), strict=True):
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state)
        np.testing.assert_allclose(updates, u, rtol=1e-6)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_of_rank_one_it_is_the_whole_of_nu(shape):
    """To the same dozen roundings."""
    row, column = (np.random.default_rng(i).normal(size=shape[i:]) for i in range(2))
    over = accumulators.Factored(2).over(shape)
    row = row.mean(over[0], keepdims=True)
    column = np.broadcast_to(column, shape).mean(over[1], keepdims=True)
    g = jnp.asarray(row * column, jnp.float32)
    exact, some = scale_by_rms(), factored()
    exact_state, state = exact.init(g), some.init(g)
    for factor in (1.0, 3.0, 0.1):
        expected, exact_state = exact.update(factor * g, exact_state)
        updates, state = some.update(factor * g, state)
        np.testing.assert_allclose(updates, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("shape", "over"),
    [
        ((128, 128), (1, 0)),
        ((3, 3, 128, 256), (3, 2)),
        ((512, 8, 128), (2, 0)),
        ((200, 200, 200), (2, 1)),
        ((127, 4096), None),
        ((4096,), None),
        ((), None),
    ],
)
def test_which_dimensions(shape, over):
    assert accumulators.NAMED["factored"].over(shape) == over


# Adafactor's.


def test_the_means_are_those_of_torch():
    """`torch.optim.Adafactor`, whose decay at step t is 1 - t^-0.8. To roundings of float32 means."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    p = torch.nn.Parameter(torch.zeros(6, 5))
    theirs = torch.optim.Adafactor([p], lr=1.0, beta2_decay=-0.8)
    state = factored().init(jnp.zeros((6, 5)))
    for t, g in enumerate(gradients((6, 5), 6), start=1):
        p.grad = torch.tensor(g, dtype=torch.float32)
        theirs.step()
        decay = jnp.float32(1 - t**-0.8)  # as an array, for all steps one compiled rule
        _, state = factored(decay).update(jnp.asarray(g, jnp.float32), state)
        found = theirs.state[p]
        np.testing.assert_allclose(means(state)[0], found["row_var"].numpy(), rtol=2e-6)
        np.testing.assert_allclose(means(state)[1], found["col_var"].numpy(), rtol=2e-6)
        nu = found["row_var"] @ found["col_var"] / found["row_var"].mean(-2, keepdim=True)
        np.testing.assert_allclose(accumulators.convert(state, "float32").nu, nu.numpy(), rtol=4e-6)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 7)], ids=str)
def test_the_steps_are_those_of_optax(shape):
    """`optax.scale_by_factored_rms`, which has no bound: where nu is above what the gradient adds to it."""
    theirs = optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=2, epsilon=1e-30)
    params = jnp.zeros(shape)
    their_state, state = jax.jit(theirs.init)(params), factored().init(params)
    compared = 0
    for t, g in enumerate(gradients(shape, 6), start=1):
        decay, g = 1 - t**-0.8, jnp.asarray(g, jnp.float32)
        expected, their_state = jax.jit(theirs.update)(g, their_state, params)
        updates, state = factored(jnp.float32(decay), 0.0).update(g, state)
        for ours, axis in zip(means(state), accumulators.Factored(2).over(shape), strict=True):
            mean = their_state.v_row if axis == np.argmax(shape) else their_state.v_col
            np.testing.assert_allclose(ours.ravel(), mean.ravel(), rtol=2e-6)
        free = (
            np.asarray(accumulators.convert(state, "float32").nu) > 1.001 * (1 - decay) * np.asarray(g) ** 2
        )
        updates, expected = np.asarray(updates), np.asarray(expected)
        np.testing.assert_allclose(updates[free], expected[free], rtol=4e-6)
        assert np.all(np.abs(updates) <= np.abs(expected) * (1 + 4e-6))
        compared += free.sum()
    assert compared > 0.7 * 6 * params.size


# The rules of the step.

ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)


BOUNDED = [*itertools.product([0.0, 0.9, 0.999], [0.0, 1e-8], [False, True])]
each_bounded = scanned_each([factored(decay, eps, eps_in_sqrt=inside) for decay, eps, inside in BOUNDED])
as_float32 = jax.jit(lambda states: [accumulators.convert(state, "float32").nu for state in states])


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, (4, 12), elements=ANY), st.sampled_from([(3, 4), (2, 3, 2)]))
def test_an_update_is_bounded_whatever_the_gradients(some, shape):
    """As it is with all of nu; zero gradients give zeros, and finite ones leave all finite."""
    g = some.reshape(4, *shape)
    outcomes = each_bounded(g)
    for (decay, *how), (_, updates) in zip(BOUNDED, outcomes, strict=True):
        assert np.all(np.abs(updates) <= (1 + 1e-6) / np.sqrt(1 - decay)), (decay, how)
        assert not np.any(np.asarray(updates)[g == 0]), (decay, how)
    states = [state for state, _ in outcomes]
    chex.assert_tree_all_finite((states, as_float32(states)))


@each(form=SCALE_FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_zero_huge_and_small_gradients(form, dtype):
    tx, largest = factored(**form), float(jnp.finfo(dtype).max)
    state = tx.init(jnp.zeros((4, 3), dtype))
    for fill in ([0.0, 1, largest], [0.0, 0, 1], [0.0, 1e-7, 0], [0.0, 0, 0], [largest] * 3):
        g = jnp.broadcast_to(jnp.array(fill, dtype), (4, 3)).at[0].set(0)
        u, state = tx.update(g, state)
        assert u.dtype == dtype
        assert {x.dtype.name for x in means(state)} == {"float32"}
        np.testing.assert_array_equal(u == 0, g == 0)
        chex.assert_tree_all_finite((u, state, accumulators.convert(state, "float32").nu))


def test_many_huge_gradients_sum_to_a_finite_mean():
    g = jnp.full((1000, 300), 3e38)
    u, state = factored().update(g, factored().init(g))
    chex.assert_tree_all_finite(state)
    np.testing.assert_allclose(u, np.sqrt(10), rtol=1e-5)


def test_what_is_not_finite_is_seen():
    """An infinity in its update, and large row and column; a NaN in all of the parameter."""
    tx, g = factored(), jnp.ones((4, 3))
    u, state = tx.update(g.at[1, 2].set(jnp.inf), tx.init(g))
    np.testing.assert_array_equal(jnp.isnan(u), np.arange(12).reshape(4, 3) == 5)
    chex.assert_tree_all_finite(state)
    u, state = tx.update(g.at[1, 2].set(jnp.nan), tx.init(g))
    assert jnp.all(jnp.isnan(u))
    skipping = optax.apply_if_finite(tx, 3)
    u, state = skipping.update(g.at[1, 2].set(jnp.nan), skipping.init(g))
    chex.assert_trees_all_equal((u, state.inner_state), (0 * g, tx.init(g)))


def test_the_arithmetic_of_64_bit_gradients(x64):
    some = gradients((5, 4))
    tx = factored(0.9, 1e-4)
    state = tx.init(jnp.zeros((5, 4)))
    assert {x.dtype.name for x in means(state)} == {"float64"}
    for g, (u, _) in zip(some, textbook(some, (1, 0), 0.9, 1e-4), strict=True):
        updates, state = tx.update(jnp.asarray(g), state)
        np.testing.assert_allclose(updates, u, rtol=1e-13)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(jnp.zeros((5, 4))))


@pytest.mark.slow
@each(form=SCALE_FORMS)
def test_first_and_second_derivatives_are_finite_differences(form, x64):
    """In float64, to what differences of 1e-6 give, through two updates."""

    def outcome(scale, eps):
        tx, total = factored(0.9, eps, **form), 0.0
        state = tx.init(jnp.zeros((3, 4)))
        for g in np.random.default_rng(0).normal(size=(2, 3, 4)):
            u, state = tx.update(g * scale, state)
            total += jnp.sum(u * jnp.arange(12.0).reshape(3, 4))
        return total + sum(map(jnp.sum, map(jnp.sqrt, means(state))))

    check_grads(jax.jit(outcome), (1.1, 1e-2), order=2, modes=["rev"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e25])
def test_derivatives_are_finite_where_squares_are_not_numbers(size):
    def outcome(scale):
        tx = factored(eps=0.0)
        u, state = tx.update(size * scale * jnp.ones((3, 4)), tx.init(jnp.zeros((3, 4))))
        return jnp.sum(u) + jnp.sum(tx.update(jnp.zeros((3, 4)), state)[0])

    for derivative in (jax.grad(outcome), jax.grad(jax.grad(outcome))):
        assert jnp.isfinite(jax.jit(derivative)(1.0))


@pytest.mark.parametrize("shape", [(130, 700), (700, 130), (3, 300, 301), (300, 3, 400), (20, 5000)], ids=str)
def test_in_blocks_the_means_are_the_same(shape, optimized):
    """What XLA on CPU is given on one device, with a block of what is left."""
    g = jnp.asarray(gradients(shape, 1)[0], jnp.float32)
    over = accumulators.Factored(2).over(shape)
    assert g.size > _factored._BLOCK
    blocks = jax.jit(lambda g: _factored._means_in_blocks(jnp.square, over, g))(g)
    for mean, axis in zip(blocks, over, strict=True):
        np.testing.assert_allclose(mean, np.mean(np.float64(g) ** 2, axis, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("min_dim", [1, 0, 2.0, None])
def test_the_least_size_is_checked(min_dim):
    with pytest.raises(ValueError, match="min_dim"):
        accumulators.Factored(min_dim)


def test_centred_is_refused_by_name():
    state = scale_by_rms(centered=True).init(jnp.zeros((200, 200)))
    for use in (
        lambda: scale_by_rms(centered=True, accumulator="factored"),
        lambda: accumulators.convert(state, "factored"),
    ):
        with pytest.raises(ValueError, match=r"Invalid accumulator: 'factored'.*centered=True"):
            use()


@pytest.mark.parametrize("shape", [(128, 60_000), (60_000, 128), (700, 5_000), (2_048, 2_048)], ids=str)
def test_means_of_wide_matrices_are_right_to_a_few_units_in_the_last_place(shape):
    """Sums of up to 60,000 float32 numbers; one after the other they would be off by up to 60,000 * 6e-8."""
    g = np.random.default_rng(0).standard_normal(shape, np.float32)
    tx = scale_by_rms(0.0, accumulator="factored")
    _, state = jax.jit(tx.update)(g, tx.init(jnp.zeros(shape)))
    means = state.nu["factored"]
    for axis, part in enumerate(["column_mean", "row_mean"]):
        exact = np.square(g.astype(np.float64)).mean(axis, keepdims=True)
        np.testing.assert_allclose(means[part], exact, rtol=4e-6)
