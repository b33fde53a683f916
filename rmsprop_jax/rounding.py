"""Unbiased rounding, with thresholds from integer arithmetic on where and when.

Rounding up with a probability of what would be cut off keeps the mean. To nearest, a change below half a unit
is lost, and lost again at every step: an accumulator in bfloat16 that decays by 0.999 never falls.

The threshold of an element at step t is::

    hash(leaf, element) + t * 0.277076 * 2^32    (mod 2^32)

For each element these fill [0, 2^32) more evenly in time than random numbers do (Weyl, 1916), so that errors
cancel sooner; across elements they are scattered, in each leaf in another way. The element's index is the one
in the whole array: under `jax.jit` an array in shards is rounded as it is on one device. These are a few
integer operations that XLA fuses with the step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._division import straight_through

__all__ = ["random_thresholds", "thresholds", "to_dtype"]

# 2^32 times a fraction whose multiples fill [0, 1) evenly. Multiples of the golden ratio are spread most
# evenly, but 8 steps nearly return to the start. This constant has no near-return at lags 2 to 16, periods
# that gradients are likely to have.
_TURN = np.uint32(round(0.277076 * 2**32) | 1)
# One for each axis, odd; the first few are 2^32 times the fractions of the square roots of 2, 3, 5, 7, ...
_AXES = [int(np.sqrt(n) % 1 * 2**32) | 1 for n in (2, 3, 5, 7, 11, 13, 17, 19)]


def thresholds(shape: tuple[int, ...], leaf: jax.typing.ArrayLike, count: jax.typing.ArrayLike) -> jax.Array:
    """Thresholds for every element of a leaf, uint32, each equally likely.

    Args:
      shape: of the leaf.
      leaf: its number in the tree, or any integer that tells it from other leaves, may be traced.
      count: the step, an integer, may be traced.
    """
    salt, index = mixed(jnp.asarray(leaf).astype(jnp.uint32)), _scattered(shape)
    # A quadratic function for each leaf, one to one. Two linear ones may differ by little more than a
    # constant, and then the errors of the two leaves would be correlated.
    hashed = index * ((mixed(salt) | np.uint32(1)) + index * (salt << np.uint32(1)))
    return hashed + (salt + jnp.asarray(count).astype(jnp.uint32) * _TURN)


def random_thresholds(shape: tuple[int, ...], leaf: jax.typing.ArrayLike, seed: jax.Array) -> jax.Array:
    """Thresholds from a seed of two uint32 instead of a step: without a pattern in time."""
    salt = mixed(jnp.asarray(leaf).astype(jnp.uint32) ^ seed[0])
    return mixed(_scattered(shape) ^ salt) + seed[1]


def to_dtype(x: jax.Array, dtype: jax.typing.DTypeLike, threshold: jax.Array) -> jax.Array:
    """Rounds `x` to one of its two neighbours in a lower floating dtype, in the mean to `x` itself.

    A finite value stays finite, and NaN stays NaN. A value that `dtype` has is left as it is. The derivative
    is 1, which unbiased rounding has in the mean.

    Args:
      x: real floating array.
      dtype: floating; where it is no narrower than float32, this is a cast.
      threshold: uint32 array of x's shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rounding
      >>> x = jnp.full(1000, 1 + 2**-10)  # an eighth of the way from 1 to bfloat16's next number
      >>> rounded = rounding.to_dtype(x, jnp.bfloat16, rounding.thresholds(x.shape, leaf=0, count=0))
      >>> print(sorted(set(rounded.tolist())), f"{(rounded > 1).mean():.2f}")
      [1.0, 1.0078125] 0.12
    """
    return straight_through(_to_neighbour(x, jnp.dtype(dtype), threshold), x)


def _to_neighbour(x, dtype, threshold):
    limits = jnp.finfo(dtype)
    if limits.bits >= 32:
        return x.astype(dtype)
    x = jnp.clip(x.astype(jnp.float32), -float(limits.max), float(limits.max))
    x = jnp.where(jnp.isnan(x), jnp.nan, x)  # one NaN, to whose bits a threshold can be added
    cut = 23 - limits.nmant  # bits of a float32's mantissa that dtype has no room for
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + (threshold >> (32 - cut))) >> cut << cut
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    if limits.minexp > jnp.finfo(jnp.float32).minexp:
        # Below its smallest normal number dtype is evenly spaced. In units of 2^-12 the sum is exact.
        unit = float(limits.smallest_subnormal)
        spaced = jnp.floor(x / unit + (threshold >> 20).astype(jnp.float32) * 2.0**-12) * unit
        rounded = jnp.where(jnp.abs(x) < float(limits.tiny), spaced, rounded)
    return rounded.astype(dtype)


def mixed(x: jax.Array) -> jax.Array:
    """A hash of uint32, one to one: a bit that differs changes about half of the bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0x735A2D97)
    return x ^ (x >> 15)


def _scattered(shape):
    """A hash of each element's index in the whole array, linear in the index along each axis."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(_AXES[axis % len(_AXES)])
    return index
