"""One code for each element of `nu`, rounded without bias, in two bytes or in one."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import rounding
from rmsprop_jax.accumulators._base import Accumulator, Stored, Thresholds


class Codes(Accumulator):
    """One code for each element, rounded without bias: an accumulator of the two methods below.

    ``decode(encode(nu, threshold))`` is `nu` in the mean over thresholds, which are uint32, each equally
    likely; and it is `nu` itself where `nu` came out of ``decode``. Both are elementwise: same shapes out as
    in. A finite number leaves a finite one. Both run in float32 also for 64-bit parameters.
    """

    rounds: ClassVar[bool] = True

    @abstractmethod
    def encode(self, nu: jax.Array, threshold: jax.Array) -> jax.Array:
        """Codes, of any one dtype, for non-negative float32 numbers."""

    @abstractmethod
    def decode(self, codes: jax.Array) -> jax.Array:
        """Numbers, float32."""

    def store(self, nu: jax.Array, thresholds: Thresholds) -> Stored:
        nu = jnp.minimum(nu, float(jnp.finfo(jnp.float32).max)).astype(jnp.float32)
        return (self.encode(nu, thresholds(nu.shape)),)

    def read(self, stored: Stored) -> jax.Array:
        return self.decode(*stored)


@dataclass(frozen=True)
class Bfloat16(Codes):
    """float32's range in two bytes."""

    _title: ClassVar[str | None] = "bfloat16"

    def encode(self, nu: jax.Array, threshold: jax.Array) -> jax.Array:
        return rounding.to_dtype(nu, jnp.bfloat16, threshold)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32)


@dataclass(frozen=True)
class Uint8(Codes):
    """One byte: 0, and 255 numbers a factor of 2^(1/4) apart, 2**(exponent + 1/4) to 2**(exponent + 63.75).

    Rounding is unbiased between the logarithm and the number: in the number alone, the root would fall too
    far where gradients shrink; in the logarithm alone, its mean would be 2% too high.

    A number beyond the largest is stored as that one. One below the smallest, except for 0, is stored as the
    smallest, whose root is a floor of the rms: by default 2^-24.9 = 3.2e-8, where eps=1e-8 under the root
    already dominates. The largest rms is then 2^6.9 = 117.

    Attributes:
      exponent: of the numbers' lower end, -126 to 64.
    """

    exponent: int = -50

    _title: ClassVar[str | None] = "uint8"

    def __post_init__(self) -> None:
        if not isinstance(self.exponent, int) or not -126 <= self.exponent <= 64:
            raise ValueError(f"Invalid {self.exponent=}, expected an integer in [-126, 64].")

    def encode(self, nu: jax.Array, threshold: jax.Array) -> jax.Array:
        # Multiplied by a random factor from 1 to 2^(1/4), and then down to the next code: four for each power
        # of two. Which of the four it is, the exponent of the fourth power of the fraction tells.
        # u in [1, 2) is in steps of 2^-17, and 2^-18 from the ends: there the factor differs from 1 and from
        # 2^(1/4) by more than a rounding, so that a code's own number stays.
        u = _float(threshold >> 9 & 0x7FFFC0 | 0x20 | _ONE)
        bits = _bits(nu * (_FACTOR[0] + u * (_FACTOR[1] + u * (_FACTOR[2] + u * _FACTOR[3]))))
        power = _bits(jnp.square(jnp.square(_float(bits & 0x7FFFFF | _ONE))))
        code = ((bits >> 21 & 0x7FC) + (power >> 23)).astype(jnp.int32) - ((self.exponent + 127) * 4 + 127)
        return jax.lax.platform_dependent(nu == 0, code, tpu=_cast_last, default=_select_last)

    def decode(self, codes: jax.Array) -> jax.Array:
        code = codes.astype(jnp.int32)
        odd, upper = code & 1 != 0, code & 2 != 0
        # Shifted, a code is an exponent and two bits of a fraction: for each of the four, what is missing.
        first, second, third, fourth = (
            np.int32(((self.exponent + 127) << 23) + fraction - (k << 21))
            for k, fraction in enumerate(_FRACTIONS)
        )
        rest = jnp.where(upper, jnp.where(odd, fourth, third), jnp.where(odd, second, first))
        return jnp.where(code == 0, np.float32(0), _float((code << 21) + rest))


def _select_last(is_zero, code):
    # XLA on CPU duplicates a unary operation, with its producers, into every consumer's loop.
    return jnp.where(is_zero, np.uint8(0), jnp.clip(code, 1, 255).astype(jnp.uint8))


def _cast_last(is_zero, code):
    # On a TPU an array of bytes has tiles of another shape than one of floats. A cast goes between them; XLA
    # copies for any other operation on bytes, and the accumulator is not written in place.
    return jnp.where(is_zero, 0, jnp.clip(code, 1, 255)).astype(jnp.uint8)


def _float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


_ONE = np.uint32(0x3F800000)  # the bits of 1.0
# Fractions of 2^0, 2^(1/4), 2^(1/2), 2^(3/4), in the 23 bits of a float32.
_FRACTIONS = [np.int32(round((2 ** (k / 4) - 1) * 2**23)) for k in range(4)]
# The part x of a step goes up with probability x - tilt * x * (1 - x). Unbiased in nu, tilt would be
# log(2) / 8 = 0.087; in log(nu), 0.
_TILT = 0.013


def _factor():
    """Coefficients of the factor, a cubic in u from 1 to 2 with the probability's slopes at both ends."""
    step, log = 2**0.25, np.log(2) / 4
    slopes = log / (1 + _TILT), log * step / (1 - _TILT)
    rows = [[1, u, u**2, u**3] for u in (1, 2)] + [[0, 1, 2 * u, 3 * u**2] for u in (1, 2)]
    return np.linalg.solve(rows, [1, step, *slopes]).astype(np.float32)


_FACTOR = _factor()
