"""Rows looked up in tables: the gradient of a loss by them, and a check of the ids."""

from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._tree import leaf_name
from rmsprop_jax._xla import ordered_after
from rmsprop_jax.rows._gradient import RowGradient, gathered, in_range, take

Params = TypeVar("Params")
Rest = ParamSpec("Rest")
Value = TypeVar("Value")


def value_and_grad(
    loss_fn: Callable[Concatenate[Any, Params, Rest], Value], *, has_aux: bool = False
) -> Callable[Concatenate[Any, Any, Params, Rest], tuple[Value, tuple[Any, Params]]]:
    """Like `jax.value_and_grad`, by the rows looked up in tables, and by other parameters.

    The loss is differentiated by what it is handed, the rows: a gradient of a table's shape never exists.

    Args:
      loss_fn: ``loss_fn(rows, params, *args, **kwargs)`` returns a scalar. `rows` is `tables` with its arrays
        replaced by the rows looked up: ``ids.shape + table.shape[1:]`` for ids and a table.
      has_aux: whether `loss_fn` returns a pair, of the scalar and anything else.

    Returns:
      A function of ``(tables, ids, params, *args, **kwargs)`` that returns
      ``(value, (table_grads, param_grads))``, where the value is ``(value, aux)`` if `has_aux`.

      `tables`: an array of shape (num_rows, ...) or a tree of them. `ids`: for each table an integer array
      of any shape, or a tree of such arrays where a table is used more than once; the loss is handed the
      same tree of rows. `table_grads`: a :class:`RowGradient` for each table. `params` and `param_grads`:
      a tree of arrays, or None.

    Raises:
      ValueError: for ids that are not integers or whose tree does not fit the tables'.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rows
      >>> def loss_fn(rows, bias):
      ...     return jnp.sum(rows["words"] ** 2) + bias
      >>> tables = {"words": jnp.arange(10.0).reshape(5, 2)}
      >>> value, (grads, _) = rows.value_and_grad(loss_fn)(tables, {"words": jnp.array([1, 1, 4])}, 1.0)
      >>> print(value, grads["words"].indices, grads["words"].shape)
      172.0 [1 1 4] (5, 2)
    """

    def wrapped(tables, ids, params, *args, **kwargs):
        _check_ids_fit(tables, ids)
        rows = jax.tree.map(lambda table, of_table: jax.tree.map(partial(take, table), of_table), tables, ids)

        def loss_of(rows, params):
            return loss_fn(rows, params, *args, **kwargs)

        value, grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=has_aux)(rows, params)
        of_table = partial(_row_gradient, loss=value[0] if has_aux else value)
        return value, (jax.tree.map(of_table, tables, ids, grads[0]), grads[1])

    return wrapped


def check_ids(indices: jax.typing.ArrayLike, num_rows: int) -> None:
    """Raises ValueError if an id is not a row of the table; the rest of this module drops such ids.

    For use outside of jit, on batches as they are made.

    Example:
      >>> from rmsprop_jax import rows
      >>> rows.check_ids([[3, 0], [-1, 7]], num_rows=7)
      Traceback (most recent call last):
      ...
      ValueError: Id -1 at position (1, 0) is outside of the table's 7 rows.
    """
    indices = np.asarray(indices)
    if indices.size and not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"Ids have dtype {indices.dtype}, expected integers.")
    outside = np.argwhere((indices < 0) | (indices >= num_rows))
    if len(outside):
        position = tuple(outside[0].tolist())
        at = position[0] if len(position) == 1 else position
        raise ValueError(
            f"Id {indices[position]} at position {at} is outside of the table's {num_rows} rows."
        )


def _row_gradient(table, ids, grads, loss):
    """The gradient of a table; `grads` are those of its rows at `ids`, an array or a tree of them."""
    columns = table.shape[1:]
    indices = [gathered(in_range(x, table.shape[0]), columns=0).ravel() for x in jax.tree.leaves(ids)]
    values = [gathered(g, columns=len(columns)).reshape(-1, *columns) for g in jax.tree.leaves(grads)]
    if not indices:  # a table that is not used
        return RowGradient(
            jnp.zeros(0, jnp.int32), jnp.zeros_like(table, shape=(0, *columns)), table.shape[0]
        )
    flat = jnp.concatenate(indices)
    # The loss reads the table. Where it is linear in the rows, XLA could write the table first.
    flat = ordered_after(flat, (flat < 0) & jnp.isnan(loss))
    return RowGradient(flat, jnp.concatenate(values), table.shape[0])


def _check_ids_fit(tables, ids):
    """Raises ValueError unless `ids` has integers for each table, naming the table."""

    def check_dtypes(path, table, of_table):
        for dtype in map(dtype_of, jax.tree.leaves(of_table)):
            if not jnp.issubdtype(dtype, jnp.integer):
                raise ValueError(f"Ids for table {leaf_name(path)!r} have dtype {dtype}, expected integers.")

    try:
        jax.tree.map(lambda table, of_table: None, tables, ids)
    except ValueError as error:
        raise ValueError(f"The tree of ids does not fit the tables': {error}") from None
    jax.tree_util.tree_map_with_path(check_dtypes, tables, ids)
