"""Accumulators stored in fewer bytes: one code for each element, rounded without bias.

What each takes and how close it stays::

    accumulator    bytes    stored rms / exact rms, standard deviation at decay 0.9 / 0.99 / 0.999
    "float32"      4        0
    "bfloat16"     2        0.2 / 0.6 / 1.5%
    "uint8"        1        6 / 11 / 12%

A code has its parameter's shape and stands for its element alone, so that it is sharded, masked, donated and
saved as the parameter is, and XLA fuses encoding and decoding with the step. `ScaleByRmsState.nu` holds the
codes; :func:`convert` turns them into those of another accumulator, or into numbers. Rounding follows
:mod:`rmsprop_jax.rounding`, and leaves nothing behind when the gradients shrink.

A state says which accumulator its codes are of, by their dtype or, where that does not tell, as
`ScaleByRmsState.accumulator`: so they are converted, carried over and restored by the right one.

**One of your own** is any hashable object with the two methods of :class:`Accumulator`, passed as
``accumulator=``. Frozen dataclasses are, and two that are equal then share their compiled code::

    @dataclass(frozen=True)
    class Float16Root:
        def encode(self, nu, threshold):
            return rounding.to_dtype(jnp.sqrt(nu), jnp.float16, threshold)

        def decode(self, codes):
            return jnp.square(codes.astype(jnp.float32))
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import rounding
from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._states import is_ours, map_rms_states
from rmsprop_jax._types import SameTree

__all__ = ["NAMED", "Accumulator", "Bfloat16", "Name", "Uint8", "convert"]

Name: TypeAlias = Literal["float32", "bfloat16", "uint8"]
"""What `accumulator=` takes as a string: the name of the codes' dtype, see `NAMED`."""


def convert(
    state: SameTree, accumulator: "Name | Accumulator", *, source: "Name | Accumulator | None" = None
) -> SameTree:
    """A state with its `nu` stored by another accumulator, such as a checkpoint's for a new setting.

    Args:
      state: this package's, inside any chain or wrapper; what else is in it stays as it is.
      accumulator: how `nu` is to be stored, as for :func:`rmsprop_jax.rmsprop`; "float32" leaves float64 as
        it is.
      source: how `nu` is stored; by default as the state says, which knows an accumulator without a name, or
        else by its dtype: numbers, or codes of "bfloat16" or "uint8".

    Returns:
      A state as ``init`` returns it for `accumulator`.

    Raises:
      ValueError: if `source` is needed, or is not what the state says.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import accumulators, scale_by_rms
      >>> tx = scale_by_rms(accumulator="uint8")
      >>> _, state = tx.update(jnp.array([10.0, 0.0]), tx.init(jnp.zeros(2)))
      >>> print(state.nu, accumulators.convert(state, "float32").nu)
      [213 0] [9.513657 0. ]
    """
    target, given = named(accumulator), None if source is None else named(source)

    def converted(node):
        if not is_ours(node):
            return node
        if source is not None and node.accumulator not in (None, given):
            raise ValueError(f"Invalid source: {source=}, but nu is stored by {node.accumulator}.")
        leaves, treedef = jax.tree.flatten(node.nu)
        leaves = [decoded(x, given or node.accumulator) for x in leaves]
        if target is not None:
            leaves = [encoded(x, target, leaf, node.count) for leaf, x in enumerate(leaves)]
        return node._replace(nu=jax.tree.unflatten(treedef, leaves), accumulator=unnamed(target))

    return map_rms_states(converted, state)


def decoded(codes: jax.Array, accumulator: "Accumulator | None" = None) -> jax.Array:
    """The numbers that an accumulator's codes stand for; by default the one named as the codes' dtype.

    Raises:
      ValueError: for a dtype that does not tell.
    """
    accumulator = reader(codes.dtype) if accumulator is None else accumulator
    return codes if accumulator is None else accumulator.decode(codes)


def reader(dtype: np.dtype) -> "Accumulator | None":
    """The accumulator that is named as its codes' dtype, None for float32 and float64.

    Raises:
      ValueError: for a dtype that does not tell.
    """
    if dtype == jnp.float64:
        return None
    if dtype.name not in NAMED:
        raise ValueError(f"nu is stored as {dtype}: pass the accumulator as `source`.")
    return NAMED[dtype.name]


def encoded(
    nu: jax.Array,
    accumulator: "Accumulator",
    leaf: jax.typing.ArrayLike,
    count: jax.typing.ArrayLike,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Codes for a leaf's numbers, which may be float64; `leaf` to `rows` as in `rounding.thresholds`."""
    nu = jnp.minimum(nu, float(jnp.finfo(jnp.float32).max)).astype(jnp.float32)
    return accumulator.encode(nu, rounding.thresholds(nu.shape, leaf, count, rows))


@cache
def dtype_of_codes(accumulator: Any) -> np.dtype:
    """The dtype in which an accumulator stores."""
    scalars = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.uint32))
    return jax.eval_shape(accumulator.encode, *scalars).dtype


@runtime_checkable
class Accumulator(Protocol):
    """How non-negative float32 numbers are stored between updates.

    ``decode(encode(nu, threshold))`` is `nu` in the mean over thresholds, which are uint32, each equally
    likely; and it is `nu` itself where `nu` came out of ``decode``. Both are elementwise: same shapes out as
    in. A finite number leaves a finite one. Both run in float32 also for 64-bit parameters.
    """

    def encode(self, nu: jax.Array, threshold: jax.Array) -> jax.Array:
        """Codes, of any one dtype."""

    def decode(self, codes: jax.Array) -> jax.Array:
        """Numbers, float32."""

    def __hash__(self) -> int:
        """Of equal ones the same: they share their compiled code."""


@dataclass(frozen=True)
class Bfloat16:
    """float32's range in two bytes."""

    def encode(self, nu: jax.Array, threshold: jax.Array) -> jax.Array:
        return rounding.to_dtype(nu, jnp.bfloat16, threshold)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32)


@dataclass(frozen=True)
class Uint8:
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
        # Select in uint8, do not cast last: XLA duplicates a unary operation, with its producers, into every
        # consumer's loop.
        return jnp.where(nu == 0, np.uint8(0), jnp.clip(code, 1, 255).astype(jnp.uint8))

    def decode(self, codes: jax.Array) -> jax.Array:
        code = codes.astype(jnp.int32)
        odd, upper = code & 1 != 0, code & 2 != 0
        fraction = jnp.where(
            upper,
            jnp.where(odd, _FRACTIONS[3], _FRACTIONS[2]),
            jnp.where(odd, _FRACTIONS[1], _FRACTIONS[0]),
        )
        bits = ((code >> 2) + (self.exponent + 127)) << 23 | fraction
        return jnp.where(codes == 0, np.float32(0), _float(bits))


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

# One line for each `Name`: what `accumulator=` takes as a string, which is the name of the codes' dtype.
NAMED: dict[str, Accumulator | None] = {"float32": None, "bfloat16": Bfloat16(), "uint8": Uint8()}


def named(accumulator: str | Accumulator) -> Accumulator | None:
    """The accumulator of that name, None for float32, or `accumulator` itself, if it has the methods.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(accumulator, str) and accumulator in NAMED:
        return NAMED[accumulator]
    if isinstance(accumulator, str | type) or not isinstance(accumulator, Accumulator):
        names = ", ".join(map(repr, NAMED))
        raise ValueError(
            f"Invalid accumulator: {accumulator=}, expected {names}, as a string, or a hashable object "
            "with the methods of rmsprop_jax.accumulators.Accumulator."
        )
    return accumulator


def unnamed(accumulator: Accumulator | None) -> Accumulator | None:
    """The accumulator, as a state has to say it; None for one that the dtype of its codes tells."""
    if accumulator is None or NAMED.get(dtype_of_codes(accumulator).name) == accumulator:
        return None
    return accumulator


def title(accumulator: Accumulator | None) -> Any:
    """What to write for `accumulator=`: its name or, where it has none, itself."""
    names = (name for name, other in NAMED.items() if other == accumulator)
    return next(names, accumulator)


def is_stored_by(nu: jax.Array, found: Accumulator | None, expected: Accumulator | None) -> bool:
    """Whether a leaf of a state, which says that `found` stores it, is as `expected` stores it."""
    dtype = dtype_of(nu)
    if expected is None:
        return found is None and dtype.kind == "f" and dtype.itemsize >= 4
    return found == unnamed(expected) and dtype == dtype_of_codes(expected)
