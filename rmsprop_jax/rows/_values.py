"""Optax's transformations on trees with row-sparse gradients in them: they get the rows' values alone.

To `jax.tree.map`, a row-sparse gradient is two arrays, one of them its ids, and repeated ids are not summed:
a norm would count the ids, and a clip would move them.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax._dtypes import dtype_of, is_array_like, narrow
from rmsprop_jax._tree import Tree, named_leaves
from rmsprop_jax.rows._gradient import RowGradient, is_row_gradient, map_gradients, take

__all__ = ["global_norm", "values_only"]


def global_norm(tree: Tree) -> jax.Array:
    """`optax.global_norm` of a tree of arrays and row-sparse gradients, as if all of them were dense.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rows
      >>> twice = rows.RowGradient(jnp.array([7, 7]), jnp.array([[1.0], [3.0]]), num_rows=9)
      >>> print(rows.global_norm({"table": twice, "bias": jnp.array([3.0])}))
      5.0
    """
    return optax.tree.norm(_values(_summed(tree)))


def values_only(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` on a tree with row-sparse gradients in it: the result is what it would be of dense ones.

    `tx` is handed the values of the touched rows, each row once, in place of each row-sparse gradient. That
    serves what leaves zeros zero and looks at single values or at sums of them: clipping by value or by
    global norm, scaling, schedules, `optax.zero_nans`. It stands before the optimizers in a chain::

        tx = optax.chain(
            rows.values_only(optax.clip_by_global_norm(1.0)),
            optax.partition({"rows": rows.exact(rmsprop(1e-2)), "dense": rmsprop(1e-2)}, ("rows", "dense")),
        )

    Args:
      tx: a transformation without a state for each row; for optimizers there is :func:`lazy`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with the state of `tx`.

    Raises:
      ValueError: in ``update``, naming the leaf, where the values alone would not do, as with noise, weight
        decay and means over a table. ``init`` finds out by trying `tx` on small arrays.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import rows
      >>> tx = rows.values_only(optax.clip_by_global_norm(1.0))
      >>> grads = rows.RowGradient(jnp.array([1, 1]), jnp.array([[3.0], [1.0]]), num_rows=3)
      >>> updates, _ = tx.update(grads, tx.init(jnp.zeros((3, 1))))
      >>> print(updates.to_dense().T)
      [[0. 1. 0.]]
    """
    tx = optax.with_extra_args_support(tx)
    refused: set[str] = set()

    def init_fn(params):
        refused.update(_refused(tx, params))
        return tx.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        for name, g in named_leaves(updates, is_row_gradient).items():
            if is_row_gradient(g) and name in refused:
                raise ValueError(
                    f"Invalid tx: of a row-sparse gradient it makes something else for {name!r} than of a "
                    "dense one: it moves rows without a gradient, takes means over a table, or has a state "
                    "for whole tables. RowGradient.to_dense makes one dense; rows.lazy is for optimizers."
                )
        summed = _summed(updates)
        if params is not None:
            params = _rows_of(summed, params)
        values, state = tx.update(_values(summed), state, params, **extra_args)

        def sparse_again(g, u, old):
            return RowGradient(g.indices, narrow(u, old.dtype), g.num_rows) if is_row_gradient(g) else u

        return map_gradients(sparse_again, summed, values, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _refused(tx, params):
    """The names of the parameters whose row-sparse gradients `tx` does not treat as it does dense ones.

    It is tried on small gradients: dense ones, and the same row-sparse.
    """
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p if is_array_like(p) else None, params)

    def small(p, scale):
        shape = tuple(min(size, 2) if isinstance(size, int) else 2 for size in jnp.shape(p))
        if not shape:
            return _array(rng, scale, shape, dtype_of(p))
        return RowGradient(jnp.array([4, 0, 4]), _array(rng, scale, (3, *shape[1:]), dtype_of(p)), num_rows=5)

    refused: set[str] = set()
    with jax.ensure_compile_time_eval():
        for scale in (1e-4, 1e4):
            sparse = jax.tree.map(partial(small, scale=scale), params)
            ones = map_gradients(lambda g: _array(rng, 1.0, g.shape, g.dtype), sparse)
            summed = _summed(sparse)
            expected = named_leaves(tx.update(_dense(sparse), tx.init(ones), ones)[0])
            try:
                found, _ = tx.update(_values(summed), tx.init(ones), _rows_of(summed, ones))
            except (TypeError, ValueError):  # its state is for whole tables
                return set(named_leaves(params))
            found = _dense(
                map_gradients(lambda g, u: replace(g, values=u) if is_row_gradient(g) else u, summed, found)
            )
            for name, x in named_leaves(found).items():
                # As far as sums in another order may differ.
                if not np.allclose(x, expected[name], rtol=8 * float(jnp.finfo(x.dtype).eps), atol=0):
                    refused.add(name)
    return refused


def _array(rng, scale, shape, dtype):
    return jnp.asarray(scale * (1 + rng.random(shape)), dtype)


def _summed(tree):
    """Row-sparse gradients with each row once, and zeros for what is out of range."""

    def summed(g):
        g = g.summed()
        inside = jnp.expand_dims(g.indices < g.num_rows, range(1, g.ndim))
        return replace(g, values=jnp.where(inside, g.values, 0))

    return map_gradients(lambda g: summed(g) if is_row_gradient(g) else g, tree)


def _values(tree):
    return map_gradients(lambda g: g.values if is_row_gradient(g) else g, tree)


def _dense(tree):
    return map_gradients(lambda g: g.to_dense() if is_row_gradient(g) else g, tree)


def _rows_of(summed, params):
    """The parameters, of tables the rows that are touched."""
    return map_gradients(lambda g, p: take(p, g.indices) if is_row_gradient(g) else p, summed, params)
