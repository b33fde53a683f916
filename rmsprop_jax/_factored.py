"""`nu` of a matrix from the means of its rows and of its columns: Adafactor's second moment.

    row_t    = decay * row_{t-1}    + (1 - decay) * mean(g_t^2, over columns)
    column_t = decay * column_{t-1} + (1 - decay) * mean(g_t^2, over rows)
    nu_t     = max(row_t * column_t / mean(row_t), (1 - decay) * g_t^2)

The product is nu itself where nu has rank one, and of all matrices with these means the nearest to it in the
generalized Kullback-Leibler divergence (Shazeer and Stern, 2018). What is below what g_t alone adds to `nu`
cannot be `nu`: so updates are at most 1 / sqrt(1 - decay), as they are with the whole of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rmsprop_jax._accumulator import Accumulator, Float32, Thresholds, is_wide
from rmsprop_jax._dtypes import full_like
from rmsprop_jax._states import Stored


class _Means(NamedTuple):
    row_mean: jax.Array
    column_mean: jax.Array


class FactoredMoments(_Means, Stored):
    """A parameter's `nu` as :class:`Factored` stores it. Both arrays have the parameter's rank.

    Attributes:
      row_mean: of each row, that is over the last of the two dimensions, where its size is 1.
      column_mean: of each column, that is over the first of the two dimensions, where its size is 1.
    """

    kind: ClassVar[str | None] = "factored"

    @property
    def over(self) -> tuple[int, int]:
        """The dimension that `row_mean` is a mean over, and the one that `column_mean` is."""
        sizes = list(enumerate(zip(self.row_mean.shape, self.column_mean.shape, strict=True)))
        return (
            next(axis for axis, (row, column) in sizes if row == 1 and column != 1),
            next(axis for axis, (row, column) in sizes if column == 1 and row != 1),
        )


jax.export.register_namedtuple_serialization(FactoredMoments, serialized_name="rmsprop_jax.FactoredMoments")


@dataclass(frozen=True)
class Factored(Accumulator):
    """Means over rows and columns, for parameters of two dimensions or more; others as float32.

    The two largest dimensions are rows and columns; of equal ones, the last. Along all others each index has
    means of its own. A parameter with one of the two below `min_dim` is stored as float32 is: it has not much
    to save.

    Means are shared: a NaN in a gradient stays in all of its parameter's `nu`, and an infinity leaves its row
    and its column large. :func:`optax.apply_if_finite` skips such steps. In `jax.shard_map` the part that a
    device has is a parameter of its own, with means of its own.

    Attributes:
      min_dim: 2 or more.
    """

    min_dim: int = 128

    kind: ClassVar[str | None] = "factored"
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.min_dim, int) or self.min_dim < 2:
            raise ValueError(f"Invalid {self.min_dim=}, expected an integer, 2 or more.")

    def over(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The dimensions to take means over, see `FactoredMoments`; None for a shape that is not factored."""
        if len(shape) < 2:
            return None
        # Of two there is nothing to compare, so that `jax.export` may leave a size open.
        order = range(2) if len(shape) == 2 else sorted(range(len(shape)), key=lambda d: (shape[d], d))
        first, last = sorted(order[-2:])
        return (last, first) if shape[first] >= self.min_dim and shape[last] >= self.min_dim else None

    def init(
        self,
        param: jax.typing.ArrayLike,
        value: jax.typing.ArrayLike,
        dtype: jax.typing.DTypeLike,
        thresholds: Thresholds,
    ) -> Any:
        over = self.over(jnp.shape(param))
        if over is None:
            return full_like(param, value, dtype)
        return FactoredMoments(*(full_like(_summed(param, axis), value, dtype) for axis in over))

    def store(self, nu: jax.Array, thresholds: Thresholds) -> Any:
        over = self.over(nu.shape)
        return nu if over is None else FactoredMoments(*(_mean(nu, axis) for axis in over))

    def read(self, stored: Any) -> jax.Array:
        return _product(*stored, stored.over[1]) if isinstance(stored, FactoredMoments) else stored

    def fits(self, stored: Any) -> bool:
        found = stored.over if isinstance(stored, FactoredMoments) else None
        is_whole = found is None and Float32().fits(stored)
        return found == self.over(stored.shape) and (is_whole or is_wide(stored.dtype))

    def average(
        self,
        old: Any,
        g: jax.Array,
        added: Callable[[jax.Array], jax.Array],
        decay: jax.Array,
        thresholds: Thresholds,
    ) -> tuple[Any, jax.Array]:
        if not isinstance(old, FactoredMoments):
            return Float32().average(old, g, added, decay, thresholds)
        now = added(g)
        row, column = (
            mean + decay * before.astype(now.dtype)
            for mean, before in zip(_means(g, added, old.over), old, strict=True)
        )
        nu = jnp.maximum(_product(row, column, old.over[1]), now)
        return FactoredMoments(row.astype(old.row_mean.dtype), column.astype(old.column_mean.dtype)), nu


def _summed(param, axis):
    """An array, or a `jax.ShapeDtypeStruct`, that is sharded as a mean over `axis` is."""
    summed = partial(jnp.sum, axis=axis, keepdims=True)
    return jax.eval_shape(summed, param) if isinstance(param, jax.ShapeDtypeStruct) else summed(param)


def _means(g, added, over):
    """Of added(g)."""

    def whole(g):
        now = added(g)
        return tuple(_mean(now, axis) for axis in over)

    # XLA on CPU stores the squares before it sums them, of all parameters at once: four bytes for each, which
    # is what there is to save. In blocks it stores those of one block, in 0.7 of the time. On a mesh it
    # would collect the blocks from all devices.
    size = math.prod(g.shape)
    if not isinstance(size, int) or size <= _BLOCK or jax.device_count() > 1:
        return whole(g)
    return jax.lax.platform_dependent(g, cpu=partial(_means_in_blocks, added, over), default=whole)


_BLOCK = 2**16  # elements: 2^18 take the same time


def _means_in_blocks(added, over, g):
    """The same, in blocks along the larger of the two dimensions."""
    along = max(over, key=lambda axis: g.shape[axis])
    total = g.shape[along]
    width = max(32, total * _BLOCK // g.size)  # of a mean over `along` each block has one: not too many

    def block(start, width=width):
        """A share of the mean over `along`, and a piece of the other."""
        now = added(jax.lax.dynamic_slice_in_dim(g, start, width, along))
        return tuple(_mean(now, axis) * (width / total if axis == along else 1) for axis in over)

    def joined(axis, pieces):
        return sum(pieces) if axis == along else jnp.concatenate(pieces, along)

    def unstacked(axis, pieces):
        if axis == along:
            return jnp.sum(pieces, 0)
        return jax.lax.collapse(jnp.moveaxis(pieces, 0, along), along, along + 2)

    stacked = jax.lax.map(block, jnp.arange(total // width) * width)
    parts = [tuple(map(unstacked, over, stacked))]
    if left := total % width:
        parts.append(block(total - left, left))
    return tuple(map(joined, over, zip(*parts, strict=True)))


def _mean(x, axis):
    """Of finite numbers a finite one: divided before they are summed, as 32 squares may reach 2^129."""
    return jnp.sum(x * (1 / jnp.asarray(x.shape[axis]).astype(x.dtype)), axis, keepdims=True)


def _product(row, column, axis):
    """row * column / mean(row), finite. In this order nothing overflows on the way: row <= n * mean."""
    nu = _quotient(row, _mean(row, axis)) * column
    return jnp.minimum(nu, float(jnp.finfo(nu.dtype).max))


@jax.custom_jvp
def _quotient(x, mean):
    """x / mean, where the mean is 0 x itself."""
    return x / jnp.where(mean == 0, 1, mean)


@_quotient.defjvp
def _quotient_jvp(primals, tangents):
    """(dx - x / mean * dmean) / mean: nothing is squared, so that nothing overflows."""
    (x, mean), (dx, dmean) = primals, tangents
    out = _quotient(x, mean)
    return out, _quotient(dx - out * dmean, mean)
