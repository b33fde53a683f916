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

    def store(self, nu: jax.Array, thresholds: Thresholds) -> jax.Array:
        nu = jnp.minimum(nu, float(jnp.finfo(jnp.float32).max)).astype(jnp.float32)
        return self.encode(nu, thresholds(nu.shape))

    def read(self, stored: Stored) -> jax.Array:
        return self.decode(stored)  # type: ignore[arg-type]


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
        # The bits of a float are its exponent, and its fraction f: log2 = exponent + log2(1 + f).
        bits = jax.lax.bitcast_convert_type(nu, jnp.uint32)
        f = _float(bits & 0x7FFFFF | _ONE) - 1
        quarters = f * 4 + f * (1 - f) * (_LOG[0] + f * (_LOG[1] + f * _LOG[2]))
        # In steps of 2^-18 from 2^-19 to 1 - 2^-19, which is more than the error where quarters is whole.
        u = _float(threshold >> 9 & 0x7FFFE0 | 0x10 | _ONE) - 1
        u = u * (1 - _TILT + _TILT * u)
        # Added to 2^23, a float32 is rounded to a whole number, which its bits then are. To nearest: of
        # x + 1/2, so to the one below x and 1. (With u first: XLA would merge 1/2 and 2^23, to 2^23.)
        whole = jax.lax.bitcast_convert_type(quarters + (u + 0.5) + 2.0**23, jnp.int32) - (0x4B000000 + 1)
        code = ((bits >> 23).astype(jnp.int32) - (self.exponent + 127)) * 4 + whole
        return jax.lax.platform_dependent(nu == 0, code, tpu=_cast_last, default=_select_last)

    def decode(self, codes: jax.Array) -> jax.Array:
        code = codes.astype(jnp.int32)
        odd, upper = code & 1 != 0, code & 2 != 0
        fraction = jnp.where(
            upper,
            jnp.where(odd, _FRACTIONS[3], _FRACTIONS[2]),
            jnp.where(odd, _FRACTIONS[1], _FRACTIONS[0]),
        )
        bits = ((code >> 2) + (self.exponent + 127)) << 23 | fraction
        return jnp.where(code == 0, np.float32(0), _float(bits))


def _select_last(is_zero, code):
    # XLA on CPU duplicates a unary operation, with its producers, into every consumer's loop.
    return jnp.where(is_zero, np.uint8(0), jnp.clip(code, 1, 255).astype(jnp.uint8))


def _cast_last(is_zero, code):
    # On a TPU an array of bytes has tiles of another shape than one of floats. A cast goes between them; XLA
    # copies for any other operation on bytes, and the accumulator is not written in place.
    return jnp.where(is_zero, 0, jnp.clip(code, 1, 255)).astype(jnp.uint8)


def _float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


_ONE = np.uint32(0x3F800000)  # the bits of 1.0
# 4 * log2(1 + f) = 4 * f + f * (1 - f) * polynomial(f): equal where it is 0, 1, 2, 3 and 4, to a thousandth
# between. A polynomial, not log2: XLA does not recompute transcendentals in fusions, so log2 would be
# materialised.
_LOG = [np.float32(c) for c in (1.7565649, -0.972955847, 0.353553391)]
# Fractions of 2^0, 2^(1/4), 2^(1/2), 2^(3/4), in the 23 bits of a float32.
_FRACTIONS = [np.int32(round((2 ** (k / 4) - 1) * 2**23)) for k in range(4)]
# The part x of a step goes up with probability x - tilt * x * (1 - x). Unbiased in nu, tilt would be
# log(2) / 8 = 0.087; in log(nu), 0.
_TILT = np.float32(0.013)
