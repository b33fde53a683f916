"""Accumulators stored in fewer bytes, and one for all the elements of a row or of a column.

What each takes and how close it stays::

    accumulator    bytes    stored rms / exact rms, standard deviation at decay 0.9 / 0.99 / 0.999
    "float32"      4        0
    "bfloat16"     2        0.2 / 0.6 / 1.5%
    "uint8"        1        6 / 11 / 12%
    "factored"     0.01     what a matrix of rank one leaves out

**Codes**, one for each element: a code has its parameter's shape and stands for its element alone, so that it
is sharded, masked, donated and saved as the parameter is, and XLA fuses encoding and decoding with the step.
Rounding follows :mod:`rmsprop_jax.rounding`: without bias, and it leaves nothing behind when the gradients
shrink.

**Means**, one for each row and one for each column: :class:`Factored`, of matrices, kernels and whatever else
has two large dimensions. A step moves no accumulators then, and the means are sharded as the rows and columns
are.

`ScaleByRmsState.nu` holds what is stored; :func:`convert` turns it into what another accumulator stores, or
into numbers. A state says which accumulator it is of, by what is stored or, where that does not tell, as
`ScaleByRmsState.accumulator`: so states are converted, carried over and restored by the right one.

**One of your own** is a hashable object of a subclass of :class:`Accumulator`, passed as ``accumulator=``.
Frozen dataclasses are, and two that are equal then share their compiled code. Of :class:`Codes` there are two
methods to write::

    @dataclass(frozen=True)
    class Float16Root(Codes):
        def encode(self, nu, threshold):
            return rounding.to_dtype(jnp.sqrt(nu), jnp.float16, threshold)

        def decode(self, codes):
            return jnp.square(codes.astype(jnp.float32))
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import rounding
from rmsprop_jax._accumulator import Accumulator, Codes, Float32, Thresholds
from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._factored import Factored, FactoredMoments
from rmsprop_jax._states import Stored, is_ours, is_stored, map_rms_states
from rmsprop_jax._types import SameTree

__all__ = [
    "NAMED",
    "Accumulator",
    "Bfloat16",
    "Codes",
    "Factored",
    "FactoredMoments",
    "Float32",
    "Name",
    "Stored",
    "Uint8",
    "convert",
]

Name: TypeAlias = Literal["float32", "bfloat16", "uint8", "factored"]
"""What `accumulator=` takes as a string, see `NAMED`."""


def convert(
    state: SameTree, accumulator: "Name | Accumulator", *, source: "Name | Accumulator | None" = None
) -> SameTree:
    """A state with its `nu` stored by another accumulator, such as a checkpoint's for a new setting.

    Args:
      state: this package's, inside any chain or wrapper; what else is in it stays as it is.
      accumulator: how `nu` is to be stored, as for :func:`rmsprop_jax.rmsprop`; "float32" leaves float64 as
        it is.
      source: how `nu` is stored; by default as the state says, which knows an accumulator without a name, or
        else as `nu` tells: numbers, codes of "bfloat16" or "uint8", or means.

    Returns:
      A state as ``init`` returns it for `accumulator`.

    Raises:
      ValueError: if `source` is needed, or is not what the state says, and for a centred state's means.

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
        check_centered(target, node.mu is not None)
        leaves, treedef = jax.tree.flatten(node.nu, is_leaf=is_stored)
        for leaf, x in enumerate(leaves):
            reads = given or node.accumulator or reader(x)
            if reads != target:
                leaves[leaf] = target.store(reads.read(x), thresholds_of(leaf, node.count))
        return node._replace(nu=jax.tree.unflatten(treedef, leaves), accumulator=unnamed(target))

    return map_rms_states(converted, state)


def stored_by(state: Any) -> Accumulator:
    """The accumulator that stores the `nu` of a state of this package.

    Raises:
      ValueError: where the state does not tell.
    """
    first = next(iter(jax.tree.leaves(state.nu, is_leaf=is_stored)), None)
    return state.accumulator or (NAMED["float32"] if first is None else reader(first))


def decoded(state: Any) -> Any:
    """The numbers of a state's `nu`: the parameters' tree, float32 or float64, in the parameters' shapes."""
    accumulator = stored_by(state)
    return jax.tree.map(accumulator.read, state.nu, is_leaf=is_stored)


def with_numbers(state: Any, numbers: Any, count: jax.typing.ArrayLike) -> Any:
    """A state whose `nu` stores other numbers, rounded as at update `count`; None leaves a parameter as it is.

    Args:
      state: of this package.
      numbers: the parameters' tree of arrays and None.
      count: updates so far, an integer.
    """
    accumulator = stored_by(state)
    leaves, treedef = jax.tree.flatten(state.nu, is_leaf=is_stored)
    given = treedef.flatten_up_to(numbers)
    for leaf, nu in enumerate(given):
        if nu is not None:
            leaves[leaf] = accumulator.store(nu, thresholds_of(leaf, count))
    return state._replace(nu=jax.tree.unflatten(treedef, leaves))


def thresholds_of(
    leaf: jax.typing.ArrayLike, count: jax.typing.ArrayLike, rows: jax.Array | None = None
) -> Thresholds:
    """What an accumulator rounds by, at a step: `rounding.thresholds` of a leaf, or of some of its rows."""
    return partial(rounding.thresholds, leaf=leaf, count=count, rows=rows)


def numbers(stored: Any, accumulator: "Accumulator | None" = None) -> jax.Array:
    """The numbers of one leaf of `nu`; by default as what is stored tells.

    Raises:
      ValueError: where that does not tell.
    """
    return (reader(stored) if accumulator is None else accumulator).read(stored)


def reader(stored: Any) -> "Accumulator":
    """The accumulator that a leaf of `nu` is of, as far as it tells.

    Raises:
      ValueError: where it does not.
    """
    kind = kind_of(stored)
    if kind not in NAMED:
        raise ValueError(f"nu is stored as {kind}: pass the accumulator as `source`.")
    return NAMED[kind]


def kind_of(stored: Any) -> str:
    """What a leaf of `nu` tells of its accumulator, see `Accumulator.kind`; float64 is "float32" too."""
    if isinstance(stored, Stored):
        return str(stored.kind)
    dtype = dtype_of(stored)
    return "float32" if dtype == jnp.float64 else dtype.name


@dataclass(frozen=True)
class Bfloat16(Codes):
    """float32's range in two bytes."""

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

# One line for each `Name`, which is what tells the accumulator from what is stored: `Accumulator.kind`.
NAMED: dict[str, Accumulator] = {
    "float32": Float32(),
    "bfloat16": Bfloat16(),
    "uint8": Uint8(),
    "factored": Factored(),
}


def named(accumulator: Any) -> Accumulator:
    """The accumulator of that name, or `accumulator` itself, if it is one.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(accumulator, str) and accumulator in NAMED:
        return NAMED[accumulator]
    if not isinstance(accumulator, Accumulator) or type(accumulator).__hash__ is None:
        names = ", ".join(map(repr, NAMED))
        raise ValueError(
            f"Invalid accumulator: {accumulator=}, expected {names}, as a string, or a hashable object, such "
            "as of a frozen dataclass, that derives from accumulators.Accumulator; with encode and decode, "
            "from accumulators.Codes."
        )
    return accumulator


def check_centered(accumulator: Accumulator, centered: bool) -> None:
    """Raises ValueError for an accumulator whose savings `mu`, of the parameter's size, would undo."""
    if centered and not accumulator.elementwise:
        raise ValueError(
            f"Invalid accumulator: {title(accumulator)!r} is not for centered=True, whose mu has the "
            "parameters' size; 'uint8' and 'bfloat16' are."
        )


def unnamed(accumulator: Accumulator) -> Accumulator | None:
    """The accumulator, as a state has to say it; None for one that tells itself by what is stored."""
    return None if NAMED.get(accumulator.kind or "") == accumulator else accumulator


def title(accumulator: Accumulator) -> Any:
    """What to write for `accumulator=`: its name or, where it has none, itself."""
    names = (name for name, other in NAMED.items() if other == accumulator)
    return next(names, accumulator)
