"""`nu` of a matrix from the means of its rows and of its columns: Adafactor's second moment.

    row_t    = decay * row_{t-1}    + (1 - decay) * mean(g_t^2, over columns)
    column_t = decay * column_{t-1} + (1 - decay) * mean(g_t^2, over rows)
    nu_t     = max(row_t * column_t / mean(row_t), (1 - decay) * g_t^2)

The product is nu itself where nu has rank one, and of all matrices with these means the nearest to it in the
generalized Kullback-Leibler divergence (Shazeer and Stern, 2018). `nu` is at least the term of g_t, so that
updates are at most 1 / sqrt(1 - decay), as they are with the whole of `nu`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from rmsprop_jax._division import quotient
from rmsprop_jax._xla import full_like
from rmsprop_jax.accumulators._base import Accumulator, Float32, Stored, Thresholds, at_least


@dataclass(frozen=True)
class Factored(Accumulator):
    """Means over rows and columns, for parameters of two dimensions or more; others are stored as float32.

    The two largest dimensions are rows and columns; of equal ones, the last. Along all others each index has
    means of its own. A parameter with one of the two below `min_dim` is stored as it is.

    In a state, ``{"factored": {"row_mean": tree, "column_mean": tree}}`` are two trees of the parameters'
    structure, of arrays of the parameter's rank. `row_mean` has size 1 on the last of the two dimensions,
    `column_mean` on the first. A parameter that is not factored stands whole in `row_mean`, and has a zero of
    shape (1,) in `column_mean`.

    Means are shared: a NaN in a gradient stays in all of its parameter's `nu`, and an infinity leaves its row
    and its column large. :func:`optax.apply_if_finite` skips such steps. In `jax.shard_map` the part that a
    device has is a parameter of its own, with means of its own.

    Attributes:
      min_dim: 2 or more.
    """

    min_dim: int = 128

    parts: ClassVar[tuple[str, ...]] = ("row_mean", "column_mean")
    elementwise: ClassVar[bool] = False
    _title: ClassVar[str | None] = "factored"

    def __post_init__(self) -> None:
        if not isinstance(self.min_dim, int) or self.min_dim < 2:
            raise ValueError(f"Invalid {self.min_dim=}, expected an integer, 2 or more.")

    def over(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The dimensions that `row_mean` and `column_mean` are means over; None for a shape not factored."""
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
    ) -> Stored:
        over = self.over(jnp.shape(param))
        if over is None:
            return _whole(full_like(param, value, dtype))
        return tuple(full_like(_summed(param, axis), value, dtype) for axis in over)

    def store(self, nu: jax.Array, thresholds: Thresholds) -> Stored:
        over = self.over(nu.shape)
        return _whole(nu) if over is None else tuple(_mean(nu, axis) for axis in over)

    def read(self, stored: Stored) -> jax.Array:
        row, column = stored
        axes = _averaged_axes(row, column)
        return row if axes is None else _product(row, column, axes[1])

    def average(
        self,
        old: Stored,
        g: jax.Array,
        added: Callable[[jax.Array], jax.Array],
        decay: jax.Array,
        thresholds: Thresholds,
    ) -> tuple[Stored, jax.Array]:
        over = self.over(g.shape)
        if over is None:
            whole, nu = Float32().average(old[:1], g, added, decay, thresholds)
            return (*whole, old[1]), nu
        now = added(g)
        row, column = (
            mean + decay * before.astype(now.dtype)
            for mean, before in zip(_means(g, added, over), old, strict=True)
        )
        nu = at_least(_product(row, column, over[1]), now)
        return (row.astype(old[0].dtype), column.astype(old[1].dtype)), nu


def _whole(nu):
    """A parameter that is not factored. Orbax does not save arrays without elements, so the other has one."""
    return nu, jnp.zeros(1, nu.dtype)


def _averaged_axes(row, column):
    """The dimension that `row` is a mean over, and the one of `column`; None for a parameter stored whole."""
    if row.ndim != column.ndim:
        return None
    sizes = list(enumerate(zip(row.shape, column.shape, strict=True)))
    over_last = [axis for axis, (n, m) in sizes if n == 1 and m != 1]
    over_first = [axis for axis, (n, m) in sizes if m == 1 and n != 1]
    return (over_last[0], over_first[0]) if over_last and over_first else None


def _summed(param, axis):
    """An array, or a `jax.ShapeDtypeStruct`, with the sharding of a mean over `axis`."""
    summed = partial(jnp.sum, axis=axis, keepdims=True)
    return jax.eval_shape(summed, param) if isinstance(param, jax.ShapeDtypeStruct) else summed(param)


def _means(g, added, over):
    """The means of added(g) over each of two dimensions."""

    def whole(g):
        now = added(g)
        return tuple(_mean(now, axis) for axis in over)

    # XLA on CPUs and GPUs stores the squares before it sums them: four bytes for each element, as many as
    # there are to save. On a CPU it stores those of one block instead, but on a mesh it would collect the
    # blocks from all devices.
    size = math.prod(g.shape)
    if not isinstance(size, int) or size <= _BLOCK:
        return whole(g)
    on_cpu = whole if jax.device_count() > 1 else partial(_means_in_blocks, added, over)
    on_gpu = partial(_means_of_parts, added, over)
    return jax.lax.platform_dependent(g, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=whole)


_BLOCK = 2**16  # elements: 2^18 take the same time


def _means_of_parts(added, over, g):
    """The same, over rows first in 16 parts: XLA on GPUs stores squares where few threads sum many rows."""
    now = added(g)
    last, first = over
    parts = math.gcd(now.shape[first], 16)
    split = now.reshape(*now.shape[:first], parts, -1, *now.shape[first + 1 :])
    return _mean(now, last), _mean(jnp.squeeze(_mean(split, first + 1), first + 1), first)


def _means_in_blocks(added, over, g):
    """The same, in blocks along the larger of the two dimensions."""
    along = max(reversed(over), key=lambda axis: g.shape[axis])  # of equal ones the first: in one piece
    total = g.shape[along]
    width = max(32, total * _BLOCK // g.size)  # of a mean over `along` each block has one: not too many

    def block(start, width=width):
        """A share of the mean over `along`, and a piece of the other."""
        now = added(jax.lax.dynamic_slice_in_dim(g, start, width, along))
        return tuple(_share(now, axis, total if axis == along else now.shape[axis]) for axis in over)

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


def _share(x, axis, count):
    """The sum over `axis`, divided by `count`, before it is summed as in `_mean`."""
    weight = jnp.asarray(1 / count, x.dtype)
    if x.ndim > 2:
        return jnp.sum(x * weight, axis, keepdims=True)
    # As a dot product, for which XLA on CPU takes less than half of the time.
    factors = (x, jnp.full(x.shape[axis], weight))
    sums = jnp.matmul(*(factors if axis else reversed(factors)), precision=jax.lax.Precision.HIGHEST)
    return jnp.expand_dims(sums, axis)


def _mean(x, axis):
    """The mean over `axis`. It divides first, since the sum of 32 squares may reach 2^129."""
    return jnp.sum(x * (1 / jnp.asarray(x.shape[axis]).astype(x.dtype)), axis, keepdims=True)


def _product(row, column, axis):
    """row * column / mean(row), finite. In this order nothing overflows on the way: row <= n * mean."""
    nu = quotient(row, _mean(row, axis)) * column
    return jnp.minimum(nu, float(jnp.finfo(nu.dtype).max))
