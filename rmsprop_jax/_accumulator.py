"""What an accumulator is: how one parameter's `nu` is started, averaged, stored and read back.

The rule squares and divides; all that it leaves to an accumulator is::

    nu_t = now_t + decay * nu_{t-1}                 now_t = added(g_t) = (1 - decay) * g_t^2

and how `nu` lies in the state between updates: as one array of the parameter's shape, or as a `Stored`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._dtypes import dtype_of, full_like
from rmsprop_jax._states import is_stored

Thresholds: TypeAlias = Callable[[tuple[int, ...]], jax.Array]
"""From a shape to uint32 of this shape, each equally likely: `rounding.thresholds` of a leaf and a step."""


class Accumulator(ABC):
    """How `nu`, non-negative numbers of a parameter's shape, is stored between updates.

    One class for each way to do so, which says how numbers are stored and read; the default of the others
    follows from these. Its objects are hashable, as those of a frozen dataclass are: two that are equal share
    their compiled code.

    Attributes:
      kind: what tells from a stored `nu` alone which accumulator it is of: the name of the array's dtype, or
        `kind` of a :class:`Stored`; None where nothing does, so that the state has to say it.
      rounds: whether what is stored depends on thresholds, and so on which leaf it is and on the step.
      elementwise: whether each element of `nu` is stored by itself, in one array of the parameter's shape.
    """

    kind: ClassVar[str | None] = None
    rounds: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True

    @abstractmethod
    def store(self, nu: jax.Array, thresholds: Thresholds) -> Any:
        """Numbers, as they are stored: an array, or a :class:`Stored`. What is finite is stored finite."""

    @abstractmethod
    def read(self, stored: Any) -> jax.Array:
        """The numbers that are stored, float32 or float64, in the parameter's shape."""

    @abstractmethod
    def fits(self, stored: Any) -> bool:
        """Whether a leaf of a state is stored as `store` does it."""

    def init(
        self,
        param: jax.typing.ArrayLike,
        value: jax.typing.ArrayLike,
        dtype: jax.typing.DTypeLike,
        thresholds: Thresholds,
    ) -> Any:
        """`value` everywhere, stored, for a parameter: sharded as it is, and at no place all of it."""
        return self.store(full_like(param, value, dtype), thresholds)

    def average(
        self,
        old: Any,
        g: jax.Array,
        added: Callable[[jax.Array], jax.Array],
        decay: jax.Array,
        thresholds: Thresholds,
    ) -> tuple[Any, jax.Array]:
        """``now + decay * old``, with ``now = added(g)``: as it is stored, and the numbers to divide by.

        These are `now` at least, which keeps updates below ``1 / sqrt(1 - decay)``, whatever is lost in
        storing. They are the numbers that stand in what is stored: then nothing reads `old` any more, and it
        can be donated. In derivatives, storing counts as the identity, which unbiased rounding is in the
        mean.

        Args:
          old: as it is stored.
          g: the gradient, in its own dtype.
          added: elementwise, from `g` to what it adds to `nu`, finite for finite gradients; where `nu` is not
            centred, from any part of `g`.
          decay: a scalar of the dtype of `now`.
          thresholds: to round by, None for an accumulator that does not.
        """
        now = added(g)
        nu = now + decay * self.read(old).astype(now.dtype)
        stored = self.store(nu, thresholds)
        return stored, jnp.maximum(_read_back(self, nu, stored).astype(nu.dtype), now)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _read_back(accumulator, nu, stored):
    """The numbers that stand in `stored`, those of `nu`."""
    return accumulator.read(stored)


@_read_back.defjvp
def _read_back_jvp(accumulator, primals, tangents):
    out = accumulator.read(primals[1])
    return out, tangents[0].astype(out.dtype)


@dataclass(frozen=True)
class Float32(Accumulator):
    """The numbers themselves: float32, and float64 for 64-bit parameters."""

    kind: ClassVar[str | None] = "float32"

    def store(self, nu: jax.Array, thresholds: Thresholds) -> jax.Array:
        return nu

    def read(self, stored: jax.Array) -> jax.Array:
        return stored

    def fits(self, stored: Any) -> bool:
        return not is_stored(stored) and is_wide(dtype_of(stored))

    def average(
        self,
        old: jax.Array,
        g: jax.Array,
        added: Callable[[jax.Array], jax.Array],
        decay: jax.Array,
        thresholds: Thresholds,
    ) -> tuple[jax.Array, jax.Array]:
        now = added(g)
        nu = now + decay * old.astype(now.dtype)
        return nu.astype(old.dtype), nu


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

    @property
    def kind(self) -> str:  # type: ignore[override]
        return _dtype_of_codes(self).name

    def store(self, nu: jax.Array, thresholds: Thresholds) -> jax.Array:
        nu = jnp.minimum(nu, float(jnp.finfo(jnp.float32).max)).astype(jnp.float32)
        return self.encode(nu, thresholds(nu.shape))

    def read(self, stored: jax.Array) -> jax.Array:
        return self.decode(stored)

    def fits(self, stored: Any) -> bool:
        return not is_stored(stored) and dtype_of(stored) == _dtype_of_codes(self)


def is_wide(dtype: np.dtype) -> bool:
    """Whether numbers in a dtype are stored as they are: float32 and float64."""
    return dtype.kind == "f" and dtype.itemsize >= 4


@cache
def _dtype_of_codes(accumulator: Any) -> np.dtype:
    scalars = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.uint32))
    return jax.eval_shape(accumulator.encode, *scalars).dtype
