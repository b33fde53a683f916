"""`nu` of a matrix from the means of its rows and of its columns: Adafactor's second moment.

    row_t    = decay * row_{t-1}    + (1 - decay) * mean(g_t^2, over columns)
    column_t = decay * column_{t-1} + (1 - decay) * mean(g_t^2, over rows)
    nu_t     = max(row_t * column_t / mean(row_t), (1 - decay) * g_t^2)

The product is nu itself where nu has rank one, and of all matrices with these means the nearest to it in the
generalized Kullback-Leibler divergence (Shazeer and Stern, 2018). What is below what g_t alone adds to `nu`
cannot be `nu`: so updates are at most 1 / sqrt(1 - decay), as they are with the whole of it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rmsprop_jax._accumulator import Accumulator, Float32, Thresholds
from rmsprop_jax._dtypes import full_like
from rmsprop_jax._states import Stored


class _Means(NamedTuple):
    row: jax.Array
    column: jax.Array


class FactoredMoments(_Means, Stored):
    """A parameter's `nu` as :class:`Factored` stores it. Both arrays have the parameter's rank.

    Attributes:
      row: the mean over columns, that is over the last of the two dimensions, where its size is 1.
      column: the mean over rows, the first of the two dimensions, where its size is 1.
    """

    kind = "factored"

    @property
    def axes(self) -> tuple[int, int]:
        """The dimension of the rows, and that of the columns."""
        sizes = list(zip(self.row.shape, self.column.shape, strict=True))
        return (
            next(d for d, (row, column) in enumerate(sizes) if column == 1 and row != 1),
            next(d for d, (row, column) in enumerate(sizes) if row == 1 and column != 1),
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

    kind = "factored"
    elementwise = False

    def __post_init__(self) -> None:
        if not isinstance(self.min_dim, int) or self.min_dim < 2:
            raise ValueError(f"Invalid {self.min_dim=}, expected an integer, 2 or more.")

    def axes(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The dimensions of rows and of columns for a parameter's shape, None where it is not factored."""
        if len(shape) < 2:
            return None
        # Of two there is nothing to compare, so that `jax.export` may leave a size open.
        order = range(2) if len(shape) == 2 else sorted(range(len(shape)), key=lambda d: (shape[d], d))
        first, last = sorted(order[-2:])
        return (first, last) if shape[first] >= self.min_dim and shape[last] >= self.min_dim else None

    def init(
        self,
        param: jax.typing.ArrayLike,
        value: jax.typing.ArrayLike,
        dtype: jax.typing.DTypeLike,
        thresholds: Thresholds,
    ) -> Any:
        axes = self.axes(jnp.shape(param))
        if axes is None:
            return full_like(param, value, dtype)
        return FactoredMoments(*(full_like(_summed(param, axis), value, dtype) for axis in reversed(axes)))

    def store(self, nu: jax.Array, thresholds: Thresholds) -> Any:
        axes = self.axes(nu.shape)
        return nu if axes is None else FactoredMoments(*(_mean(nu, axis) for axis in reversed(axes)))

    def read(self, stored: Any) -> jax.Array:
        return _product(*stored, stored.axes[0]) if isinstance(stored, FactoredMoments) else stored

    def fits(self, stored: Any) -> bool:
        axes = self.axes(stored.shape)
        if axes is not None:
            return isinstance(stored, FactoredMoments) and stored.axes == axes and Float32().fits(stored)
        return not isinstance(stored, Stored) and Float32().fits(stored)

    def average(
        self, old: Any, now: jax.Array, decay: jax.Array, thresholds: Thresholds
    ) -> tuple[Any, jax.Array]:
        if not isinstance(old, FactoredMoments):
            return Float32().average(old, now, decay, thresholds)
        means = (
            _mean(now, axis) + decay * mean.astype(now.dtype)
            for axis, mean in zip(reversed(old.axes), old, strict=True)
        )
        row, column = means
        nu = jnp.maximum(_product(row, column, old.axes[0]), now)
        return FactoredMoments(row.astype(old.row.dtype), column.astype(old.column.dtype)), nu


def _summed(param, axis):
    """An array, or a `jax.ShapeDtypeStruct`, that is sharded as a mean over `axis` is."""
    summed = partial(jnp.sum, axis=axis, keepdims=True)
    return jax.eval_shape(summed, param) if isinstance(param, jax.ShapeDtypeStruct) else summed(param)


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
    return x / jnp.where(mean > 0, mean, 1)


@_quotient.defjvp
def _quotient_jvp(primals, tangents):
    """(dx - x / mean * dmean) / mean: nothing is squared, so that nothing overflows."""
    (x, mean), (dx, dmean) = primals, tangents
    out = _quotient(x, mean)
    return out, _quotient(dx - out * dmean, mean)
