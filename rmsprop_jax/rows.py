"""RMSProp for embedding tables: gradients, accumulators and updates of the touched rows only.

A step that looks up n rows has a gradient that is zero everywhere else. The dense rule reads and writes the
whole table all the same; but where g = 0 it does not move the parameter, and the accumulator just decays:

    nu_t = decay^(t - s) * nu_s                               a row last touched by update s
    p_t  = p_s

So `rmsprop(mode="exact")` keeps s for each row, in `last`, and catches `nu` up when the row is touched
again: the dense trajectory, at a cost that does not depend on the table's size. Momentum, centring and
weight decay move rows whose gradient is zero; with those, `mode="lazy"` is what TensorFlow and Sonnet
do: rows that are not touched neither move nor decay.

A training step, with `tables` one table or a tree of them, and `params` everything else; the loss
is `loss_fn(rows, params, batch)`:

    tx = optax.partition({"rows": rows.rmsprop(1e-2), "dense": rmsprop(1e-2)}, ("rows", "dense"))

    @partial(jax.jit, donate_argnums=(0, 1, 2))    # donated: tables and state are updated in place
    def step(tables, params, state, ids, batch):
        loss, grads = rows.value_and_grad(loss_fn)(tables, ids, params, batch)
        updates, state = tx.update(grads, state, (tables, params))
        tables, params = apply_updates((tables, params), updates)
        return tables, params, state, loss

**Ids out of range**, negative ones included, are dropped: they look up zeros, and no row moves for them. They
do not count from the end. `check` finds them, outside of jit.

**Flax.** Neither kind of `Embed` has to change; in the loss, the rows take the place of its lookup. NNX:

    graphdef, tables, params = nnx.split(model, nnx.PathContains("embed"), ...)

    def loss_fn(rows, params, tokens):
        model = nnx.merge(graphdef, tables, params)
        model.embed = lambda tokens: rows["embed"]["embedding"][...]
        return loss_of(model(tokens))

    ids = jax.tree.map(lambda table: tokens, tables)
    loss, grads = rows.value_and_grad(loss_fn)(tables, ids, params, tokens)

Linen, where `lookup` is asked first at each call of a module within the model:

    params = model.init(key, tokens)["params"]
    tables = {"embed": params.pop("embed")}

    def loss_fn(rows, params, tokens):
        def lookup(next_call, args, kwargs, context):
            found = context.module.name == "embed" and context.method_name == "__call__"
            return rows["embed"]["embedding"] if found else next_call(*args, **kwargs)

        with nn.intercept_methods(lookup):
            return loss_of(model.apply({"params": params | tables}, tokens))

    loss, grads = rows.value_and_grad(loss_fn)(tables, {"embed": {"embedding": tokens}}, params, tokens)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, optimizer
from rmsprop_jax.transform import dtype_of, full_like, leaf_name, leaves_that_fit, narrow, wide

if TYPE_CHECKING:
    from jax.experimental import sparse


@partial(jax.tree_util.register_dataclass, data_fields=["indices", "values"], meta_fields=["num_rows"])
@dataclass(frozen=True)
class RowGradient:
    """A gradient, or an update, of shape ``(num_rows, *values.shape[1:])`` that is zero outside `indices`.

    Indices may repeat: their values add up. Those outside of ``[0, num_rows)`` count for nothing.

    Attributes:
      indices: the rows, integers of shape (n,).
      values: what belongs to them, shape (n, ...).
      num_rows: the table's number of rows, a Python integer.
    """

    indices: jax.Array
    values: jax.Array
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the gradient it stands for, which is its table's."""
        return (self.num_rows, *self.values.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the values."""
        return dtype_of(self.values)

    @classmethod
    def from_bcoo(cls, matrix: "sparse.BCOO") -> "RowGradient":
        """From a BCOO whose rows are sparse and dense within, as `jax.experimental.sparse` has embeddings.

        Raises:
          ValueError: unless ``n_batch == 0`` and ``n_sparse == 1``.
        """
        if matrix.n_batch != 0 or matrix.n_sparse != 1:
            raise ValueError(
                f"Expected a BCOO with n_batch=0 and n_sparse=1, whole rows; got {matrix.n_batch=} and "
                f"{matrix.n_sparse=}. BCOO.fromdense(x, n_dense=x.ndim - 1) makes one."
            )
        return cls(matrix.indices[:, 0], matrix.data, matrix.shape[0])

    def to_dense(self) -> jax.Array:
        """The gradient it stands for: an array of the table's shape."""
        dense = jnp.zeros(self.shape, self.dtype)
        return dense.at[in_range(self.indices, self.num_rows)].add(self.values, mode="drop")

    def summed(self) -> "RowGradient":
        """The same gradient with each row at most once, in `wide` dtype.

        The shapes stay, as under jit they must: what the repeated indices leave free is padding, whose index
        is `num_rows`, which is out of range.
        """
        # The ids are sorted, and each is then looked up: 0.3 ms for 4,096 of them with values of 64 on CPU,
        # where an argsort alone takes 0.65 ms, and the rest that follows from it as much again.
        ids = in_range(self.indices, self.num_rows)
        in_order = jnp.sort(ids)
        place = jnp.searchsorted(in_order, ids)  # of each id's first occurrence
        values = jnp.zeros_like(self.values, dtype=wide(self.dtype)).at[place].add(self.values)
        is_first = jnp.diff(in_order, prepend=-1) != 0
        return RowGradient(jnp.where(is_first, in_order, self.num_rows), values, self.num_rows)


class RowsState(NamedTuple):
    """State of `rmsprop` on rows.

    Attributes:
      last: for each table the update that last touched each row, int32 of shape (num_rows,), 0 for none
        yet; None in lazy mode.
      dense: the state of `rmsprop_jax.rmsprop` for the tables; the accumulators of a row are those of
        update `last`.
    """

    last: Any
    dense: Any


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    lr_in_momentum: bool = True,
    weight_decay: jax.typing.ArrayLike | None = None,
    mode: str = "exact",
) -> optax.GradientTransformationExtraArgs:
    r"""RMSProp on rows: takes a :class:`RowGradient` for each table, and returns one as its update.

    Work and memory are proportional to the rows in the gradients. The updates have each row once and
    padding out of range; :func:`rmsprop_jax.apply_updates` adds them to the tables. The state is float32 at
    least.

    Args:
      learning_rate: a number at least 0 or a schedule, as for all of these in :func:`rmsprop_jax.rmsprop`.
      decay: decay of the accumulator, in [0, 1).
      eps: at least 0.
      initial_scale: value of :math:`\nu_0`, at least 0.
      eps_in_sqrt: whether `eps` is added under the root or to the root.
      centered: whether to divide by the standard deviation; lazy mode only.
      momentum: decay of the momentum buffer, in [0, 1), or None; lazy mode only.
      nesterov: whether the momentum is Nesterov's.
      bias_correction: whether :math:`\nu_t` is divided by :math:`1 - \beta^t`. In lazy mode t is still the
        number of updates, not the row's own, as in TensorFlow's lazy Adam.
      lr_in_momentum: whether the learning rate enters before the momentum buffer.
      weight_decay: decoupled, of the touched rows, at least 0, or None; lazy mode only.
      mode: "exact", the dense trajectory; or "lazy": rows that are not touched neither move nor decay.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with state :class:`RowsState`, for a table or a tree
      of tables, each of shape (num_rows, ...). Other parts of a model: :func:`optax.partition`.

    Raises:
      ValueError: when it is built, as :func:`rmsprop_jax.rmsprop`, and for what exact mode cannot skip; in
        ``update``, for gradients that do not fit the state or are not by rows, naming the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import apply_updates, rows
      >>> table = jnp.zeros((1_000_000, 2))
      >>> tx = rows.rmsprop(0.1, decay=0.75, eps=0.0)
      >>> state = tx.init(table)
      >>> grads = rows.RowGradient(jnp.array([7, 3, 7]), jnp.array([[1.0, 2], [5, 0], [3, 2]]), 1_000_000)
      >>> updates, state = tx.update(grads, state)
      >>> table = apply_updates(table, updates)
      >>> print(table[jnp.array([3, 7])])
      [[-0.2  0. ]
       [-0.2 -0.2]]
    """
    if mode not in ("exact", "lazy"):
        raise ValueError(f"Invalid mode: {mode=}, expected 'exact' or 'lazy'.")
    weight_decay = 0.0 if weight_decay is None else weight_decay
    decay = _checks.precise_number("decay", decay, below=1)
    dense = optimizer.rmsprop(
        learning_rate,
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        centered,
        momentum,
        nesterov,
        bias_correction,
        lr_in_momentum=lr_in_momentum,
        weight_decay=weight_decay,
    )
    if mode == "exact":
        moves_all_rows = {
            "centered": centered,
            "momentum": momentum is not None,
            "weight_decay": isinstance(weight_decay, jax.Array) or weight_decay != 0,
        }
        refused = [name for name, given in moves_all_rows.items() if given]
        if refused:
            raise ValueError(
                f"Invalid {refused[0]}: it moves or changes rows whose gradient is zero, and mode='exact' "
                "could not skip those. mode='lazy' leaves untouched rows as they are, as TensorFlow does."
            )

    def init_fn(params):
        for path, table in jax.tree_util.tree_leaves_with_path(params):
            if not jnp.shape(table):
                raise ValueError(
                    f"Parameter {leaf_name(path)} is a scalar, expected a table of shape (rows, ...)."
                )
        state = dense.init(params)
        return RowsState(jax.tree.map(_no_updates, state[0].nu) if mode == "exact" else None, state)

    def update_fn(updates, state, params=None, **extra_args):
        grads = _tables_that_fit(updates, state.dense[0])
        indices, values = _map(lambda g: g.indices, grads), _map(lambda g: g.values, grads)

        # The dense optimizer, on the touched rows of its state. `where` is that state with the rows' indices
        # for leaves that have rows, and None for those that have none, such as a count.
        where = optax.tree.map_params(
            dense, lambda _, i: i, state.dense, indices, transform_non_params=lambda _: None
        )
        touched = _map_with_none(lambda i, x: x if i is None else _take(x, i), where, state.dense)
        if mode == "exact":
            rms = touched[0]
            last = jax.tree.map(_take, state.last, indices)
            nu = jax.tree.map(lambda nu, s: _decayed(nu, decay, rms.count - s), rms.nu, last)
            touched = (rms._replace(nu=nu), *touched[1:])
        if params is not None:
            params = jax.tree.map(_take, params, indices)
        steps, touched = dense.update(values, touched, params, **extra_args)
        steps = _map(lambda g, i, u: RowGradient(i, narrow(u, g.dtype), g.num_rows), updates, indices, steps)

        new = _map_with_none(lambda i, x, y: y if i is None else _put(x, i, y), where, state.dense, touched)
        if mode == "lazy":
            return steps, RowsState(None, new)
        # `maximum` only says that `last` is read before it is written: without it XLA copies `last`.
        last = jax.tree.map(lambda s: jnp.maximum(s, new[0].count), last)
        return steps, RowsState(jax.tree.map(_put, state.last, indices, last), new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def value_and_grad(loss_fn: Callable, *, has_aux: bool = False) -> Callable:
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
        _check_ids(tables, ids)
        found = jax.tree.map(lambda table, some: jax.tree.map(partial(_take, table), some), tables, ids)

        def loss_of(found, params):
            return loss_fn(found, params, *args, **kwargs)

        value, grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=has_aux)(found, params)
        row_gradient = partial(_row_gradient, loss=value[0] if has_aux else value)
        return value, (jax.tree.map(row_gradient, tables, ids, grads[0]), grads[1])

    return wrapped


def check(indices: jax.typing.ArrayLike, num_rows: int) -> None:
    """Raises ValueError if an id is not a row of the table; the rest of this module drops such ids.

    For use outside of jit, on batches as they are made.

    Example:
      >>> from rmsprop_jax import rows
      >>> rows.check([[3, 0], [-1, 7]], num_rows=7)
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
        where = position[0] if len(position) == 1 else position
        raise ValueError(
            f"Id {indices[position]} at position {where} is outside of the table's {num_rows} rows."
        )


def _row_gradient(table, ids, grads, loss):
    indices, values = [jnp.zeros(0, jnp.int32)], [jnp.zeros((0, *table.shape[1:]), table.dtype)]
    for some, g in zip(jax.tree.leaves(ids), jax.tree.leaves(grads), strict=True):
        indices.append(in_range(some, table.shape[0]).ravel())
        values.append(g.reshape(-1, *table.shape[1:]))
    flat = jnp.concatenate(indices)
    # It changes nothing, as none is negative, and says that the loss, which reads the table, comes before the
    # table is written. Where the loss is linear in the rows, XLA would copy the table to have both.
    flat = jnp.where((flat < 0) & jnp.isnan(loss), table.shape[0], flat)
    return RowGradient(flat, jnp.concatenate(values), table.shape[0])


def _check_ids(tables, ids):
    def check_dtypes(path, table, some):
        for dtype in map(dtype_of, jax.tree.leaves(some)):
            if not jnp.issubdtype(dtype, jnp.integer):
                raise ValueError(f"Ids for table {leaf_name(path)} have dtype {dtype}, expected integers.")

    try:
        jax.tree.map(lambda table, some: None, tables, ids)
    except ValueError as error:
        raise ValueError(f"The tree of ids does not fit the tables': {error}") from None
    jax.tree_util.tree_map_with_path(check_dtypes, tables, ids)


def _no_updates(nu):
    """A zero for each row, on the row's device."""
    return full_like(nu.sum(axis=range(1, nu.ndim)), 0, jnp.int32)


def _take(table, indices):
    """Rows of a table; zeros for those out of range."""
    return table.at[in_range(indices, table.shape[0])].get(mode="fill", fill_value=0)


def _put(table, indices, rows):
    """The table with other rows at `indices`, those out of range dropped."""
    return table.at[indices].set(rows.astype(table.dtype), mode="drop")


def in_range(indices, num_rows):
    """The ids as int32, those out of range as `num_rows`: JAX would count negative ones from the end."""
    indices = jnp.asarray(indices)
    indices = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))  # int8 cannot hold every num_rows
    return jnp.where((indices >= 0) & (indices < num_rows), indices, num_rows).astype(jnp.int32)


def _decayed(nu, decay, steps):
    """nu * decay**steps, for rows of `nu` and as many int32 `steps`."""
    if isinstance(decay, float):
        # A product over the digits of `steps` in base 256, each factor rounded once: seven roundings in all.
        # In exp(steps * log(decay)) the argument's own rounding is a hundred, where nu falls to 1e-37.
        power = jnp.ones_like(nu, shape=steps.shape)
        powers = decay ** (256.0 ** np.arange(4)[:, None] * np.arange(256))
        for digit, factors in enumerate(powers):
            power *= jnp.asarray(factors, nu.dtype)[steps >> 8 * digit & 255]
    else:
        power = jnp.power(jnp.asarray(decay, nu.dtype), steps)
    return nu * jnp.expand_dims(power, range(1, nu.ndim))


def _tables_that_fit(updates, rms):
    """The gradients with their rows summed, once they fit the state and are by rows."""
    for path, g in jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_rows):
        if not _is_rows(g):
            raise ValueError(
                f"Gradient {leaf_name(path)} is {type(g).__name__}, expected a RowGradient, as from "
                "rows.value_and_grad. For a dense gradient there is rmsprop_jax.rmsprop."
            )
        if jnp.shape(g.indices) != g.values.shape[:1]:
            raise ValueError(
                f"Gradient {leaf_name(path)} has indices of shape {jnp.shape(g.indices)} and values of shape "
                f"{g.values.shape}, expected (n,) and (n, ...)."
            )
    leaves_that_fit(_map(lambda g: jax.ShapeDtypeStruct(g.shape, g.dtype), updates), rms)
    return _map(RowGradient.summed, updates)


def _is_rows(x):
    return isinstance(x, RowGradient)


_map = partial(jax.tree.map, is_leaf=_is_rows)
_map_with_none = partial(jax.tree.map, is_leaf=lambda x: x is None)
