"""Accumulators in one and two bytes: what is stored, against what would be in float32, and the codes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CODES, each_accumulator

from rmsprop_jax import accumulators, scale_by_rms

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
    names = ("float32", *CODES)
    txs = [scale_by_rms(request.param, accumulator=name) for name in names]

    def step(states, t):
        g = gradients(t)
        states = [tx.update(g, state)[1] for tx, state in zip(txs, states, strict=True)]
        exact, *stored = (jnp.sqrt(accumulators.convert(state, "float32").nu) for state in states)
        return states, jnp.stack(stored) / exact

    @jax.jit
    def run(states):
        states, _ = jax.lax.scan(lambda s, t: (step(s, t)[0], None), states, jnp.arange(STEPS - LAST))
        return jax.lax.scan(step, states, jnp.arange(STEPS - LAST, STEPS))[1][::7]

    measured = run([tx.init(jnp.zeros((len(KINDS), ELEMENTS))) for tx in txs])
    return dict(zip(CODES, np.moveaxis(np.asarray(measured), 1, 0), strict=True))


class Within(NamedTuple):
    mean: float
    periodic_mean: float  # where rounding errors repeat with the gradients, and do not cancel
    quantiles: tuple[float, float]  # 5% and 95%


WITHIN = {
    "bfloat16": Within(0.005, 0.005, (0.95, 1.05)),
    "uint8": Within(0.02, 0.08, (0.78, 1.28)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@each_accumulator(CODES)
def test_the_mean_is_right_after_thousands_of_steps(ratios, accumulator, kind):
    some, within = ratios[accumulator][:, KINDS.index(kind)], WITHIN[accumulator]
    assert abs(some.mean() - 1) < (within.periodic_mean if kind == "periodic" else within.mean)


@pytest.mark.slow
@each_accumulator(CODES)
def test_nine_in_ten_lie_close_over_four_decades(ratios, accumulator):
    some = ratios[accumulator][:, KINDS.index("decades")]
    low, high = WITHIN[accumulator].quantiles
    assert low < np.quantile(some, 0.05) < np.quantile(some, 0.95) < high


# The codes.


def test_every_code_is_its_own_whatever_the_threshold():
    codes = jnp.arange(256).astype(jnp.uint8)
    for exponent in (-126, -50, 0, 64):
        uint8 = accumulators.Uint8(exponent)
        encode, decode = jax.jit(uint8.encode), jax.jit(uint8.decode)
        for threshold in (0, 1, 2**31, 2**32 - 1):
            again = encode(decode(codes), jnp.full(256, threshold, jnp.uint32))
            np.testing.assert_array_equal(again, codes)


def test_one_byte_is_even_in_the_logarithm():
    numbers = np.asarray(accumulators.Uint8(-50).decode(jnp.arange(256).astype(jnp.uint8)), np.float64)
    assert numbers[0] == 0
    np.testing.assert_allclose(np.log2(numbers[1:]), -50 + np.arange(1, 256) / 4, atol=1e-6)


def test_between_two_codes_the_mean_lies_between_that_of_the_number_and_of_its_logarithm():
    encode, size = jax.jit(accumulators.Uint8().encode), 2**14
    thresholds = jnp.asarray((np.arange(size) + 0.5) / size * 2**32, jnp.uint32)
    for x in np.linspace(0.02, 3.98, 41):
        nu, low, part = 2.0 ** (x / 4), 200 + int(x), x % 1
        codes = np.asarray(encode(jnp.full(size, nu, jnp.float32), thresholds), np.float64)
        # 0.013 * x * (1 - x) below the logarithm, to 5e-5 and a threshold
        np.testing.assert_allclose(codes.mean() - low, part - 0.013 * part * (1 - part), atol=1.5e-4)
        assert set(codes) <= {low, low + 1}


def test_beyond_its_range_a_byte_is_the_nearest_and_never_zero():
    encode = jax.jit(accumulators.Uint8(-40).encode)
    numbers = jnp.array([0.0, 1e-37, 2.0**-50, 2.0**30, 3e38, jnp.inf, jnp.nan, -jnp.nan])
    for threshold in (0, 2**32 - 1):
        codes = encode(numbers, jnp.full(8, threshold, jnp.uint32))
        np.testing.assert_array_equal(codes, [0, 1, 1, 255, 255, 255, 255, 255])


@pytest.mark.parametrize("exponent", [-127, 65, 0.5])
def test_a_byte_s_exponent_is_checked(exponent):
    with pytest.raises(ValueError, match="exponent"):
        accumulators.Uint8(exponent)
