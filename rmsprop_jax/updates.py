"""Updates added to parameters: dense ones, as Optax adds them, and row-sparse ones.

p <- p + u                          dense
p[indices] <- p[indices] + values   row-sparse: each index as often as it is there, those out of range dropped
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import rounding
from rmsprop_jax._dtypes import dtype_of, narrow, wide
from rmsprop_jax._tree import SameTree, Tree, leaf_name
from rmsprop_jax.rows._gradient import add as add_rows
from rmsprop_jax.rows._gradient import is_gradient, is_row_gradient, put, take

__all__ = ["apply_updates"]


def apply_updates(params: SameTree, updates: Tree, *, key: jax.Array | None = None) -> SameTree:
    """Adds updates to parameters: `optax.apply_updates`, also for row-sparse updates.

    In a jitted function that donates `params`, tables are updated in place, at a cost proportional to the
    rows in the update. Exceptions: to write rows of a bfloat16 table on CPU, XLA converts the whole table; on
    a TPU it copies a table of fewer than 128 columns, unless its layout is row-major.

    **Parameters in bfloat16 or float16.** Rounded to nearest, an update below half a unit in a parameter's
    last place, 1/512 of it in bfloat16, is lost, each time. With a `key`, new for each step, the sum is taken
    in float32 and rounded up or down at random: such updates add up in the mean, as in
    :mod:`rmsprop_jax.rounding`. An update may be small in a small dtype too: bfloat16 gradients give bfloat16
    updates, right to 1/512 of themselves. For float32 updates, cast the gradients before ``tx.update``, whose
    updates come back in the gradients' dtype; XLA fuses the cast::

        grads = optax.tree.cast(jax.grad(loss)(params), jnp.float32)
        updates, state = tx.update(grads, state, params)
        params = apply_updates(params, updates, key=jax.random.fold_in(key, step))

    Args:
      params: a tree of arrays; leaves whose update is None stay as they are, and may be anything.
      updates: a tree of the same structure, of arrays, :class:`rmsprop_jax.rows.RowGradient` and None.
      key: a `jax.random` key for rounding parameters of less than float32; None rounds to nearest, as Optax
        does. Other parameters are written as without it.

    Returns:
      The new parameters, in the parameters' dtypes.

    Raises:
      ValueError: if an update's shape does not fit its parameter's, naming the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import apply_updates, rows
      >>> params = {"bias": jnp.zeros(2), "table": jnp.zeros((3, 2))}
      >>> update = rows.RowGradient(jnp.array([2]), jnp.array([[5.0, 6.0]]), num_rows=3)
      >>> print(apply_updates(params, {"bias": jnp.ones(2), "table": update})["table"])
      [[0. 0.]
       [0. 0.]
       [5. 6.]]
    """
    seed = None if key is None else _seed(key)
    leaf = itertools.count()

    def add(path, u, p):
        where = None if seed is None else (next(leaf), seed)
        return p if u is None else _add(path, p, u, where)

    return jax.tree_util.tree_map_with_path(add, updates, params, is_leaf=is_gradient)


def _seed(key):
    if not isinstance(key, jax.Array) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    ):
        raise ValueError(f"Invalid key: {key=}, expected one of jax.random, such as jax.random.key(0).")
    return jax.random.bits(key, (2,), "uint32")


# Jitted for eager callers: one program for each shape. Inlined under an outer jit.
_add_dense = jax.jit(optax.apply_updates, inline=True)


@partial(jax.jit, inline=True)
def _add_rounded(p, u, where):
    return _rounded(p.astype(jnp.float32) + u.astype(jnp.float32), p.dtype, where)


def _add(path, p, u, where):
    if p is None:
        raise ValueError(f"Update {leaf_name(path)!r} has no parameter, which is None.")
    shape, own = getattr(p, "shape", ()), getattr(u, "shape", ())
    if is_row_gradient(u):
        if own != shape:
            name = leaf_name(path)
            raise ValueError(f"Row-sparse update {name!r} has shape {own}, its parameter has shape {shape}.")
        return _add_rows(p, u, where)
    if own != shape and not _broadcasts(own, shape):
        raise ValueError(f"Update {leaf_name(path)!r} has shape {own}, its parameter has shape {shape}.")
    if getattr(u, "dtype", None) == jax.dtypes.float0:
        raise ValueError(
            f"Update {leaf_name(path)!r} has dtype float0: its parameter is not differentiable. optax.masked "
            "leaves it out."
        )
    if where is None or wide(dtype_of(p)) == dtype_of(p):
        return _add_dense(p, u)
    return _add_rounded(p, u, where)


def _broadcasts(small, large):
    try:
        return jnp.broadcast_shapes(small, large) == large
    except ValueError:
        return False


def _add_rows(p, u, where):
    if wide(p.dtype) == p.dtype:
        return add_rows(p, u.indices, u.values)
    # Added up in float32 and rounded once, as for a dense update.
    u = u.summed()
    rows = take(p, u.indices).astype(u.dtype) + u.values
    return put(p, u.indices, _rounded(rows, p.dtype, where))


def _rounded(x, dtype, where):
    if where is None:
        return narrow(x, dtype)
    return rounding.to_dtype(x, dtype, rounding.random_thresholds(x.shape, *where))
