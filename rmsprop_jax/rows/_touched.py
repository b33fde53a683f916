"""Optimizers on the touched rows of tables: `exact` and `lazy`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax._dtypes import narrow
from rmsprop_jax._tree import is_none, map_rms_states, named_leaves, rms_states, tree_mismatch
from rmsprop_jax._xla import full_like, ordered_after
from rmsprop_jax.rows._gradient import RowGradient, check_row_sparse, map_gradients, put, take


@partial(jax.export.register_namedtuple_serialization, serialized_name="rmsprop_jax.RowsState")
class RowsState(NamedTuple):
    """State of `exact` and `lazy`.

    Attributes:
      last: for each table the update that last touched each row, int32 of shape (num_rows,), 0 for none
        yet; None for `lazy`.
      dense: the state of the optimizer for the tables; the accumulators of a row are those of update `last`.
    """

    last: Any
    dense: Any


def exact(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """RMSProp on the touched rows of tables: the steps that it would take on dense gradients.

    Takes a :class:`RowGradient` for each table, and returns one as its update. Work and memory are
    proportional to the rows in the gradients. The updates have each row once and padding out of range;
    :func:`rmsprop_jax.apply_updates` adds them to the tables.

    Args:
      tx: :func:`rmsprop_jax.rmsprop` or one of :mod:`rmsprop_jax.conventions`, without momentum, centring and
        weight decay, which move or change rows whose gradient is zero, and with accumulators in float32.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with state :class:`RowsState`, for a table or a tree
      of tables, each of shape (num_rows, ...). Other parts of a model: :func:`optax.partition`.

    Raises:
      ValueError: when it is built, for what it cannot skip, by name; in ``update``, for gradients that do not
        fit the state or are not row-sparse, naming the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import apply_updates, rmsprop, rows
      >>> table = jnp.zeros((1_000_000, 2))
      >>> tx = rows.exact(rmsprop(0.1, decay=0.75, eps=0.0))
      >>> state = tx.init(table)
      >>> grads = rows.RowGradient(jnp.array([7, 3, 7]), jnp.array([[1.0, 2], [5, 0], [3, 2]]), 1_000_000)
      >>> updates, state = tx.update(grads, state)
      >>> table = apply_updates(table, updates)
      >>> print(table[jnp.array([3, 7])])
      [[-0.2  0. ]
       [-0.2 -0.2]]
    """
    settings = getattr(tx, "settings", None)
    if settings is None:
        raise ValueError(
            "Invalid tx: rows.exact has to know its decay, as of this package's rmsprop and conventions, not "
            "inside Optax's chains. rows.lazy takes any optimizer."
        )
    if tx.moves_untouched_rows_by:
        raise ValueError(
            f"Invalid {tx.moves_untouched_rows_by[0]}: it moves or changes rows whose gradient is zero, and "
            "rows.exact could not skip those. rows.lazy leaves untouched rows alone, as TensorFlow does."
        )
    _check_elementwise(settings.accumulator)
    if settings.accumulator.rounds:
        raise ValueError(
            f"Invalid accumulator: rows.exact cannot round {settings.accumulator.name!r} as each missed "
            "update would have. rows.lazy takes it, where there is none."
        )
    return _on_touched_rows(tx, settings.decay)


def lazy(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Any optimizer on the touched rows of tables: those that are not touched neither move nor decay.

    As TensorFlow's sparse updates. A count, as of a schedule or of bias correction, is still of all updates,
    not of the row's own. For gradients, updates and cost see :func:`exact`.

    Args:
      tx: any optimizer whose state follows its parameters: this package's with any option, Optax's
        ``adam``, ``adagrad``, ``sgd``, ...

    Returns:
      As :func:`exact`.

    Raises:
      ValueError: when it is built or in ``init``, for an optimizer whose state does not follow its
        parameters, as that of "factored"; in ``update``, as :func:`exact`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import rows
      >>> tx = rows.lazy(optax.adam(0.1))
      >>> grads = rows.RowGradient(jnp.array([2]), jnp.ones((1, 2)), num_rows=3)
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros((3, 2))))
      >>> print(updates.to_dense().round(3))
      [[ 0.   0. ]
       [ 0.   0. ]
       [-0.1 -0.1]]
    """
    settings = getattr(tx, "settings", None)
    if settings is not None:
        _check_elementwise(settings.accumulator)
    return _on_touched_rows(tx)


def _check_elementwise(accumulator):
    if not accumulator.elementwise:
        raise ValueError(
            f"Invalid accumulator: {accumulator.name!r} stores what depends on a whole table, not on its "
            "touched rows. 'float32' does not, and for rows.lazy neither do 'bfloat16' and 'uint8'."
        )


def _on_touched_rows(tx, decay=None):
    """`tx` on the touched rows of its state; given a decay, with `nu` as if it had decayed at each update."""
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        for name, table in named_leaves(params).items():
            if not jnp.shape(table):
                raise ValueError(f"Parameter {name!r} is a scalar, expected a table of shape (rows, ...).")
        state = tx.init(params)
        _of_each_copy(tx, partial(_check_follows, params), state)
        return RowsState(None if decay is None else jax.tree.map(_no_updates, params), state)

    def update_fn(updates, state, params=None, **extra_args):
        check_row_sparse(updates)
        grads = map_gradients(RowGradient.summed, updates)
        indices, values = map_gradients(lambda g: g.indices, grads), map_gradients(lambda g: g.values, grads)
        shapes = map_gradients(lambda g: jax.ShapeDtypeStruct(g.shape, g.dtype), updates)

        # That state with the rows' indices in place of its copies of the tables' tree, and None for all else.
        def indices_for(copy):
            _check_fits(shapes, copy)
            return indices

        where = _of_each_copy(tx, indices_for, state.dense)
        touched = map_gradients(lambda i, x: take(x, i), where, state.dense, untouched=lambda x: x)
        if decay is not None:
            last = map_gradients(lambda i, s: take(s, i), indices, state.last)

            def caught_up(rms):
                missed = map_gradients(lambda s: rms.count - s, last)
                return rms._replace(
                    nu=map_gradients(partial(_decayed, decay), missed, rms.nu, untouched=lambda x: x)
                )

            touched = map_rms_states(caught_up, touched)
        if params is not None:
            params = map_gradients(lambda i, p: take(p, i), indices, params)
        steps, touched = tx.update(values, touched, params, **extra_args)
        steps = map_gradients(
            lambda g, i, u: RowGradient(i, narrow(u, g.dtype), g.num_rows), updates, indices, steps
        )
        new = map_gradients(
            lambda i, x, y: put(x, i, y), where, state.dense, touched, untouched=lambda x, y: y
        )
        if decay is None:
            return steps, RowsState(None, new)
        count = next(rms_states(new)).count
        now = map_gradients(lambda s: ordered_after(jnp.full_like(s, count), s < 0), last)
        last = map_gradients(lambda i, s, t: put(s, i, t), indices, state.last, now, untouched=lambda s, t: s)
        return steps, RowsState(last, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _no_updates(table):
    """A zero for each row, on the row's device."""
    return full_like(jnp.sum(table, axis=range(1, jnp.ndim(table))), 0, jnp.int32)


def _decayed(decay, steps, nu):
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


def _check_follows(params, copy):
    """`copy`, a tree in the state, has for each parameter an array of the parameter's shape."""
    shapes = {name: jnp.shape(x) for name, x in named_leaves(params).items()}
    for name, x in named_leaves(copy).items():
        if jnp.shape(x) != shapes.get(name):
            raise ValueError(
                f"Invalid tx: its state for parameter {name!r} of shape {shapes.get(name)} has shape "
                f"{jnp.shape(x)}. rows.lazy takes optimizers whose state follows its parameters; the means "
                "of 'factored' depend on a whole table."
            )


def _check_fits(grads, copy):
    """Raises ValueError unless `copy`, a tree in the state, has the gradients' tree and shapes."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(grads, is_leaf=is_none)
    try:
        arrays = treedef.flatten_up_to(copy)
    except ValueError:
        raise ValueError(tree_mismatch(grads, copy)) from None
    for name, g, x in zip(named_leaves(grads, is_none), leaves, arrays, strict=True):
        if g is not None and g.shape != (expected := getattr(x, "shape", "a subtree")):
            raise ValueError(
                f"Gradient {name!r} has shape {g.shape}, the state was initialised for {expected}."
            )


def _of_each_copy(tx, f, state):
    """`state` with f(tree) in place of each tree that follows the parameters, and None for all else."""
    return optax.tree.map_params(tx, f, state, transform_non_params=lambda _: None, is_leaf=lambda _: True)
