"""Unbiased rounding: its mean, its neighbours, and thresholds that are even in time."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rmsprop_jax import rounding

to_dtype = jax.jit(rounding.to_dtype, static_argnums=1)
DTYPES = ["bfloat16", "float16", "float8_e5m2", "float8_e4m3fn"]


def uniform(size):
    """`size` thresholds that fill [0, 2^32) evenly."""
    return jnp.asarray((np.arange(size) + 0.5) / size * 2**32, jnp.uint32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_the_number_and_the_values_are_its_neighbours(dtype):
    rng = np.random.default_rng(0)
    limits = ml_dtypes.finfo(dtype)
    exponents = rng.uniform(
        np.log2(float(limits.smallest_subnormal)) + 1, np.log2(float(limits.max)) - 1, 300
    )
    numbers = jnp.asarray(2**exponents * rng.choice([-1, 1], 300), jnp.float32)
    numbers = numbers[jnp.abs(numbers) >= 2.0**-125]  # XLA on CPU takes float32's subnormal numbers for 0
    size = 4096
    shape = (len(numbers), size)
    thresholds = jnp.broadcast_to(uniform(size)[None], shape)
    rounded = to_dtype(jnp.broadcast_to(numbers[:, None], shape), dtype, thresholds)
    assert rounded.dtype == dtype
    rounded = np.asarray(rounded, np.float64)
    nearest = np.asarray(numbers.astype(dtype), np.float64)
    low, high = rounded.min(axis=1), rounded.max(axis=1)
    exact = np.asarray(numbers, np.float64)
    assert np.all((low <= exact) & (exact <= high))
    assert np.all((nearest == low) | (nearest == high))
    # There are 2^(bits cut off) thresholds, 2^12 of which are tried: to two of them, of the gap.
    np.testing.assert_array_less(np.abs(rounded.mean(axis=1) - exact), (high - low) * 2 / size + 1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_has_stays(dtype):
    numbers = np.arange(2**16 if jnp.finfo(dtype).bits == 16 else 2**8)
    numbers = numbers.astype(f"uint{jnp.finfo(dtype).bits}").view(jnp.dtype(dtype))
    numbers = numbers.astype(np.float32)
    numbers = numbers[np.isfinite(numbers) & ((numbers == 0) | (np.abs(numbers) > 1.2e-38))]
    numbers = jnp.asarray(numbers)  # without float32's subnormal numbers, which XLA on CPU takes for 0
    for threshold in (0, 1, 2**31, 2**32 - 1):
        rounded = to_dtype(numbers, dtype, jnp.full(numbers.shape, threshold, jnp.uint32))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_finite_stays_finite_and_nan_stays_nan(dtype):
    largest = float(jnp.finfo(jnp.float32).max)
    loudest = jnp.asarray(np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32))
    for threshold in (0, 2**32 - 1):
        thresholds = jnp.full(2, threshold, jnp.uint32)
        chex.assert_tree_all_finite(to_dtype(jnp.array([largest, -largest]), dtype, thresholds))
        assert jnp.all(jnp.isnan(to_dtype(loudest, dtype, thresholds)))


def test_wide_dtypes_are_a_cast():
    x = jnp.array([1.1, jnp.inf])
    np.testing.assert_array_equal(to_dtype(x, jnp.float32, uniform(2)), x)


def test_thresholds_are_even_in_time_for_each_element_and_over_the_elements():
    count, shape = jnp.arange(1000), (7, 11)
    over_time = jax.vmap(lambda t: rounding.thresholds(shape, 3, t))(count).reshape(1000, -1) / 2.0**32
    gaps = np.diff(np.sort(over_time, axis=0), axis=0)
    assert gaps.max() < 4e-3  # of random ones the largest gap would be about log(1000) / 1000 = 7e-3
    over_elements = rounding.thresholds((100, 100), 3, 5).ravel() / 2.0**32
    counts, _ = np.histogram(over_elements, 50, (0, 1))
    assert np.all(np.abs(counts / 200 - 1) < 0.3)
    other_leaf = rounding.thresholds((100, 100), 4, 5).ravel() / 2.0**32
    assert jnp.all(over_elements != other_leaf)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(256, 256), (65536,), (3, 3, 64, 128)], ids=str)
def test_the_errors_of_any_two_leaves_are_uncorrelated(shape):
    """Over 65,536 elements random ones are correlated by 0.004, some of half a million pairs by 0.02."""
    thresholds = jax.jit(jax.vmap(lambda leaf: rounding.thresholds(shape, leaf, 7)))(jnp.arange(1000))
    # The error of rounding up below its threshold, in the mean over what is rounded.
    errors = np.asarray(thresholds).reshape(1000, -1).astype(np.float32) / 2.0**32 - 0.5
    errors -= errors.mean(axis=1, keepdims=True)
    errors /= np.linalg.norm(errors, axis=1, keepdims=True)
    correlation = np.abs(errors @ errors.T) - np.eye(1000, dtype=np.float32)
    assert correlation.max() < 0.05


def test_thresholds_are_these():
    """On every machine, and in the next version, where a run goes on as it would have."""
    for leaf, count, expected in [
        (0, 0, 0),
        (0, 1, 0x46EE73E7),  # 0.277076 of 2^32
        (1, 0, 0x86D2FA73),
        (2**32 - 1, 7, 0x8A3B11D4),
        (12, 2**31 - 1, 0x93A331CF),
    ]:
        assert int(rounding.thresholds((), np.uint32(leaf), count)) == expected
    some = np.asarray(rounding.thresholds((3,) * 9, 3, 5)).ravel()
    expected = [
        0x5016627D,
        0x73155C3B,
        0xBA3EF55F,
        0xE2A058C3,
        0x23BEB747,
        0x599FBE6B,
        0x159D0BE3,
        0x776C1653,
    ]
    expected += [0x78F05737, 0x73155C3B]
    np.testing.assert_array_equal(some[[0, *(2 * 3 ** np.arange(9))]], np.array(expected, np.uint32))
    seeded = np.asarray(rounding.random_thresholds((2, 2), 1, jnp.array([5, 7], jnp.uint32)))
    np.testing.assert_array_equal(
        seeded, np.array([[0x49D1E071, 0xF85ED004], [0xCD25297D, 0x5BDBF2B7]], np.uint32)
    )


def test_random_thresholds_are_random_over_elements_leaves_and_seeds():
    def some(leaf, *seed):
        thresholds = rounding.random_thresholds((100, 100), leaf, jnp.array(seed, jnp.uint32))
        return np.asarray(thresholds).ravel() / 2**32

    first = some(0, 1, 2)
    counts, _ = np.histogram(first, 50, (0, 1))
    assert np.all(np.abs(counts / 200 - 1) < 0.3)  # four standard deviations
    for other in (some(1, 1, 2), some(0, 2, 2)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.04
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.04


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2,) * 9])
def test_every_shape(shape):
    assert rounding.thresholds(shape, 0, 0).shape == shape
    assert to_dtype(jnp.ones(shape), "bfloat16", rounding.thresholds(shape, 0, 0)).shape == shape
