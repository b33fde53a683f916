"""The interface of accumulators: how one parameter's `nu` is started, averaged, stored and read back.

The rule squares and divides; the rest is the accumulator's::

    nu_t = now_t + decay * nu_{t-1}                 now_t = added(g_t) = (1 - decay) * g_t^2
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from rmsprop_jax import rounding
from rmsprop_jax._division import straight_through
from rmsprop_jax._xla import full_like

Thresholds: TypeAlias = Callable[[tuple[int, ...]], jax.Array]
"""From a shape to uint32 of this shape, each equally likely: `rounding.thresholds` of a leaf and a step."""

Stored: TypeAlias = tuple[jax.Array, ...]
"""The arrays that store one parameter's `nu`: one, or one for each of the accumulator's `parts`."""


class Accumulator(ABC):
    """How `nu`, non-negative numbers of a parameter's shape, is stored between updates.

    One class for each way, with the two methods `store` and `read`; the others follow from these. Its objects
    are hashable, as those of a frozen dataclass are: two that are equal share their compiled code.

    In a state the arrays stand under `name`, in trees of the parameters' structure: ``{name: tree}``, or
    ``{name: {part: tree}}`` where there are `parts`.

    Attributes:
      parts: the names of the arrays that are stored for each parameter; empty where that is one array.
      rounds: whether the stored arrays depend on thresholds, and so on the leaf and on the step.
      elementwise: whether each element of `nu` is stored by itself, in one array of the parameter's shape.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    _title: ClassVar[str | None] = None

    @abstractmethod
    def store(self, nu: jax.Array, thresholds: Thresholds) -> Stored:
        """The arrays that store float32 or float64 numbers of a parameter; finite ones stay finite."""

    @abstractmethod
    def read(self, stored: Stored) -> jax.Array:
        """The stored numbers, float32 or float64, in the parameter's shape."""

    @property
    def name(self) -> str:
        """The key of `nu` in a state: the class and its values, ``uint8``, ``uint8(-40)`` or ``Mine(3)``."""
        title = vars(type(self)).get("_title")
        if title is not None and self == type(self)():
            return title
        own: tuple[Any, ...] = fields(self) if is_dataclass(self) else ()
        return f"{title or type(self).__name__}({', '.join(repr(getattr(self, x.name)) for x in own)})"

    def init(
        self,
        param: jax.typing.ArrayLike,
        value: jax.typing.ArrayLike,
        dtype: jax.typing.DTypeLike,
        thresholds: Thresholds,
    ) -> Stored:
        """`value` everywhere, stored for a parameter and sharded like it, without a whole array anywhere."""
        return to_stored(self, full_like(param, value, dtype), thresholds)

    def average(
        self,
        old: Stored,
        g: jax.Array,
        added: Callable[[jax.Array], jax.Array],
        decay: jax.Array,
        thresholds: Thresholds,
    ) -> tuple[Stored, jax.Array]:
        """``now + decay * old``, with ``now = added(g)``: stored, and the numbers to divide by.

        These are `now` at least, which keeps updates below ``1 / sqrt(1 - decay)`` whatever storing loses.
        They are read back from the stored ones: then nothing reads `old` any more, and it can be donated. In
        derivatives, storing counts as the identity, which unbiased rounding is in the mean.

        Args:
          old: the stored numbers before the update.
          g: the gradient, in its own dtype.
          added: elementwise, from `g` or a part of it to its term in `nu`, finite for finite gradients.
          decay: a scalar of the dtype of `now`.
          thresholds: to round by, None for an accumulator that does not.
        """
        now = added(g)
        nu = now + decay * self.read(old).astype(now.dtype)
        stored = self.store(nu, thresholds)
        read = straight_through(self.read(stored), nu)
        return stored, at_least(read.astype(nu.dtype), now)

    def trees(self, nu: Any) -> tuple[Any, ...] | None:
        """The trees of stored arrays in a state's `nu`; None if another accumulator stores it."""
        if not isinstance(nu, Mapping) or list(nu) != [self.name]:
            return None
        if not self.parts:
            return (nu[self.name],)
        parts = nu[self.name]
        is_stored = isinstance(parts, Mapping) and set(parts) == set(self.parts)
        return tuple(parts[part] for part in self.parts) if is_stored else None

    def joined(self, trees: tuple[Any, ...]) -> Any:
        """A state's `nu` from its trees of stored arrays."""
        return {self.name: dict(zip(self.parts, trees, strict=True)) if self.parts else trees[0]}


@dataclass(frozen=True)
class Float32(Accumulator):
    """The numbers themselves: float32, and float64 for 64-bit parameters. `nu` is the parameters' tree."""

    _title: ClassVar[str | None] = "float32"

    def store(self, nu: jax.Array, thresholds: Thresholds) -> Stored:
        return (nu,)

    def read(self, stored: Stored) -> jax.Array:
        return stored[0]

    def average(
        self,
        old: Stored,
        g: jax.Array,
        added: Callable[[jax.Array], jax.Array],
        decay: jax.Array,
        thresholds: Thresholds,
    ) -> tuple[Stored, jax.Array]:
        now, before = added(g), self.read(old)
        nu = now + decay * before.astype(now.dtype)
        return (nu.astype(before.dtype),), nu

    def trees(self, nu: Any) -> tuple[Any, ...]:
        return (nu,)

    def joined(self, trees: tuple[Any, ...]) -> Any:
        return trees[0]


def at_least(x: jax.Array, least: jax.Array) -> jax.Array:
    """The greater of `x` and `least`, both at least 0 or NaN; NaN where `x` is.

    One instruction on x86, where `jnp.maximum`, which looks for NaN in both, takes four.
    """
    return jnp.abs(jnp.where(least > x, least, x))


def thresholds_of(leaf: jax.typing.ArrayLike, count: jax.typing.ArrayLike) -> Thresholds:
    """The thresholds of a leaf at a step: a function, and a pytree of these two numbers."""
    return jax.tree_util.Partial(rounding.thresholds, leaf=leaf, count=count)


def to_stored(accumulator: Accumulator, nu: jax.Array, thresholds: Thresholds) -> Stored:
    """`accumulator.store` of thresholds from `thresholds_of`, as one program for eager callers."""
    return _rounded(accumulator, nu, thresholds) if accumulator.rounds else accumulator.store(nu, thresholds)


# Some thirty operations: jitted, an eager `init` or `convert` compiles one program for each shape. Inlined
# under an outer jit, as is the next.
@partial(jax.jit, static_argnums=0, inline=True)
def _rounded(accumulator, nu, thresholds):
    return accumulator.store(nu, thresholds)


@partial(jax.jit, static_argnums=0, inline=True)
def from_stored(accumulator: Accumulator, stored: Stored) -> jax.Array:
    """`accumulator.read`."""
    return accumulator.read(stored)


def nu_of(accumulator: Accumulator, trees: Iterable[Any], stored: Sequence[Any]) -> Any:
    """A state's `nu` from the stored arrays of each parameter, in trees of the structure of these `trees`."""

    def filled(part, tree):  # with the leaves of a subtree where a gradient is None
        return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves([x[part] for x in stored]))

    return accumulator.joined(tuple(itertools.starmap(filled, enumerate(trees))))


@cache
def stored_like(accumulator: Accumulator, shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the arrays that store the float32 `nu` of a parameter of that shape."""
    nu = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda nu: accumulator.store(nu, thresholds_of(0, 0)), nu)
