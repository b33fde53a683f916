"""Measuring while training: `watch` around an optimizer, and what it has measured."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, accumulators
from rmsprop_jax._tree import Tree, array_of, refusal
from rmsprop_jax._xla import ordered_after
from rmsprop_jax.diagnostics._figures import FIELDS, Measurement, varying_axes
from rmsprop_jax.diagnostics._measure import accumulators_of, by_name, columns_of, settings_of

_NONFINITE = FIELDS.index("nonfinite_share")
_FACTOR = FIELDS.index("bias_correction_factor")


@partial(jax.export.register_namedtuple_serialization, serialized_name="rmsprop_jax.WatchState")
class WatchState(NamedTuple):
    """State of `watch`.

    Attributes:
      inner: the state of what is watched.
      seen: updates so far, int32 scalar.
      every: updates between measurements, int32 scalar; doubled whenever `table` is full.
      stored: measurements in `table`, int32 scalar.
      steps: the step of each, int32 of shape (capacity,).
      table: their figures, float32 of shape (capacity, fields, layers); :func:`history` names them. NaN for a
        layer that had no gradient.
    """

    inner: Tree
    seen: jax.Array
    every: jax.Array
    stored: jax.Array
    steps: jax.Array
    table: jax.Array


def watch(
    tx: optax.GradientTransformation,
    every: int = 10,
    *,
    decay: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike | None = None,
    eps_in_sqrt: bool | None = None,
    accumulator: str | accumulators.Accumulator | None = None,
    capacity: int = 512,
) -> optax.GradientTransformationExtraArgs:
    """`tx`, measured at its first update and every `every` after it; its updates are the same.

    The measurements are part of the state, so that they are in its checkpoints, and a run that is resumed has
    them all. When there are `capacity` of them, every other one is dropped, and from then on half as many
    are taken: however long a run is, they span it evenly. On the steps between there is nothing to compute.

    Inside `jax.shard_map`, a state that was made outside has one history for all devices; one that was made
    inside, from parameters that differ between devices, has one for each.

    Args:
      tx: :func:`rmsprop_jax.rmsprop` or one of :mod:`rmsprop_jax.conventions`, whose settings are read from
        it; or an optimizer that does not tell them, Optax's or a chain of Optax's with one in it. Under
        :func:`optax.inject_hyperparams` it stands inside:
        ``inject_hyperparams(lambda learning_rate: watch(rmsprop(learning_rate)))(1e-3)``.
      every: updates between measurements, 1 or more.
      decay: of an optimizer that does not tell its settings; the others as for :func:`measure`.
      capacity: number of measurements that are stored, an even one.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with state :class:`WatchState`, whose ``update`` needs
      the parameters. It tells its settings if `tx` does.

    Raises:
      ValueError: as :func:`measure`, when it is built where possible.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> tx = diagnostics.watch(rmsprop(0.01), every=5)
      >>> params = {"w": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> for _ in range(12):
      ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> history = diagnostics.history(state)
      >>> print(history.step, history.bias_correction_factor["w"].round(2))
      [ 1  6 11] [0.1  0.47 0.69]
    """
    instead = "Put watch(...) around rmsprop itself, inside the chain or what optax.inject_hyperparams takes"
    settings = settings_of(tx, decay, eps, eps_in_sqrt, accumulator, instead)
    every, capacity = _checks.whole_number("every", every, 1), _checks.whole_number("capacity", capacity, 2)
    if capacity % 2:
        raise ValueError(f"Invalid capacity: {capacity=}, expected an even number.")
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        inner = tx.init(params)
        layers = accumulators_of(inner).values()
        table = jnp.zeros((capacity, len(FIELDS), len(layers)), jnp.float32)
        for x in jax.tree.leaves([layer.nu for layer in layers]):
            if varying_axes(x):  # in a shard_map: then the table has to vary too
                table += jnp.zeros_like(x, jnp.float32, ())
        return WatchState(
            inner,
            seen=jnp.zeros([], jnp.int32),
            every=jnp.asarray(every, jnp.int32),
            stored=jnp.zeros([], jnp.int32),  # an array of its own, as is `seen`: both may be donated
            steps=jnp.zeros(capacity, jnp.int32),
            table=table,
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("watch needs the parameters: tx.update(grads, state, params).")
        if not isinstance(state, WatchState):
            raise ValueError(refusal(state))
        seen = optax.safe_increment(state.seen)
        due = state.seen % state.every == 0
        nothing = jnp.zeros_like(state.table[0])

        def measured():
            # The update is recomputed inside this branch, so that on unmeasured steps it fuses with
            # apply_updates and needs no temporary.
            step, inner = tx.update(updates, state.inner, params, **extra_args)
            apart = varying_axes(state.table)
            columns, _ = columns_of(updates, inner, step, params, settings, seen, apart)
            absent = jnp.full(len(FIELDS), jnp.nan, jnp.float32)
            row = [absent if column is None else column for column in columns.values()]
            # In a shard_map both branches have to vary as the table does, and a sum does if an operand does.
            return jnp.stack(row, axis=1) + nothing if row else nothing

        if isinstance(due, jax.core.Tracer):
            row = jax.lax.cond(due, measured, lambda: nothing)
        else:  # outside of jit, cond would compile its branches anew for each update
            row = measured() if due else nothing
        never = jnp.any(row[_NONFINITE] < 0)

        def ordered(g):  # in a shard_map it must not vary more than before
            return ordered_after(g, never) if varying_axes(never) <= varying_axes(g) else g

        updates, inner = tx.update(jax.tree.map(ordered, updates), state.inner, params, **extra_args)
        return updates, WatchState(inner, seen, *_recorded(state._replace(inner=None), row, due, seen))

    return tx._replace(init=init_fn, update=update_fn)  # which leaves its settings, if it tells them


@partial(jax.jit, inline=True)
def _recorded(state, row, due, seen):
    """The state's last four fields with one more measurement, if it is due. Jitted for eager callers."""
    capacity = len(state.table)
    place = jnp.where(due, state.stored, capacity)  # written in place, or nowhere
    table = state.table.at[place].set(row, mode="drop")
    steps = state.steps.at[place].set(seen, mode="drop")
    stored = state.stored + due.astype(jnp.int32)
    full = stored == capacity
    table, steps = jax.lax.cond(full, _thinned, lambda x: x, (table, steps))
    every = jnp.where(full, 2 * state.every, state.every)
    return every, jnp.where(full, capacity // 2, stored), steps, table


def _thinned(arrays):
    """Every other row, and then zeros."""
    return jax.tree.map(lambda x: jnp.concatenate([x[::2], jnp.zeros_like(x[::2])]), arrays)


def history(state: Tree) -> Measurement:
    """The measurements that `watch` has made, on the host: NumPy arrays with a leading axis of time.

    Layers that never had a gradient are left out.

    Args:
      state: an optimizer state with one :class:`WatchState` in it; Flax NNX's ``optimizer.opt_state`` too.

    Raises:
      ValueError: if it has none, or several.
    """
    watched = _watched(state)
    stored = int(array_of(watched.stored))
    steps, table = (np.asarray(array_of(x))[:stored] for x in (watched.steps, watched.table))
    return _present(watched, steps, table)


def latest(state: Tree) -> dict[str, float]:
    """The newest measurement as numbers by name, for TensorBoard, Weights & Biases and other loggers.

    Args:
      state: as for :func:`history`.

    Returns:
      "step" and a number for each figure and layer, such as "gradient_rms/dense/kernel"; nothing before the
      first update.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> tx = diagnostics.watch(rmsprop(0.01))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> print({name: round(x, 3) for name, x in list(diagnostics.latest(state).items())[:3]})
      {'step': 1.0, 'gradient_rms/w': 3.536, 'accumulator_rms/w': 1.118}
    """
    watched = _watched(state)
    stored = int(array_of(watched.stored))
    if not stored:
        return {}
    steps, table = (np.asarray(array_of(x)[stored - 1])[None] for x in (watched.steps, watched.table))
    newest = _present(watched, steps, table)
    figures = {
        f"{field}/{name}": float(x[0]) for field in FIELDS for name, x in getattr(newest, field).items()
    }
    return {"step": float(steps[0]), **figures}


def _watched(state: Any) -> WatchState:
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_watch) if _is_watch(x)]
    if len(found) != 1:
        raise ValueError(
            f"Invalid state: it has {len(found)} of watch's states in it, expected one. "
            "Of Flax NNX, pass optimizer.opt_state."
        )
    return found[0]


def _is_watch(x):
    return isinstance(x, WatchState)


def _present(watched, steps, table):
    """A Measurement of the layers that had a gradient."""
    columns = {name: table[..., j] for j, name in enumerate(accumulators_of(watched.inner))}
    return by_name(
        steps,
        {
            name: column
            for name, column in columns.items()
            if not len(steps) or not np.all(np.isnan(column[:, _FACTOR]))
        },
    )
