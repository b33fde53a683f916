"""Measuring while training: `watch` around an optimizer, and what it has measured."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks
from rmsprop_jax._rule import Settings
from rmsprop_jax._tree import Tree, array_of, refusal, rms_states
from rmsprop_jax._xla import ordered_after
from rmsprop_jax.diagnostics._figures import FIGURES, Measurement, varying_axes
from rmsprop_jax.diagnostics._measure import columns_of, names_of, settings_from, stacked


@partial(jax.export.register_namedtuple_serialization, serialized_name="rmsprop_jax.WatchState")
class WatchState(NamedTuple):
    """State of `watch`.

    Attributes:
      inner: the state of what is watched.
      seen: updates so far, int32 scalar.
      every: updates between measurements, int32 scalar; doubled whenever `table` is full.
      stored: measurements in `table`, int32 scalar.
      steps: the step of each, int32 of shape (capacity,).
      table: their figures, float32 of shape (capacity, figures, layers); :func:`history` names them. NaN for
        a layer that had no gradient.
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
    settings: Settings | None = None,
    capacity: int = 512,
) -> optax.GradientTransformationExtraArgs:
    """`tx`, measured at its first update and every `every` after it; its updates are the same.

    The measurements are part of the state, so that they are in its checkpoints, and a run that is resumed has
    them all. When there are `capacity` of them, every other one is dropped, and from then on half as many
    are taken: however long a run is, they span it evenly. On the steps between there is nothing to compute.

    Under `jax.vmap`, each member of the population has a history of its own: ``history(state, member=0)``.
    Inside `jax.shard_map`, a state that was made outside has one history for all devices; one that was made
    inside, from parameters that differ between devices, has one for each.

    Args:
      tx: :func:`rmsprop_jax.rmsprop` or one of :mod:`rmsprop_jax.conventions`, whose settings are read from
        it; or an optimizer that has none to read, Optax's or a chain of Optax's with one in it. Under
        :func:`optax.inject_hyperparams` it stands inside:
        ``inject_hyperparams(lambda learning_rate: watch(rmsprop(learning_rate)))(1e-3)``.
      every: updates between measurements, 1 or more.
      settings: of an optimizer that has none to read: its decay, eps and eps_in_sqrt, such as
        ``watch(optax.rmsprop(1e-3), settings=rmsprop_jax.Settings(decay=0.9, eps=1e-8))``.
      capacity: number of measurements that are stored, an even one.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with state :class:`WatchState`, whose ``update`` needs
      the parameters. It has the settings of `tx` as an attribute, if `tx` has.

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
    remedy = "Put watch(...) around rmsprop itself, inside the chain or what optax.inject_hyperparams takes"
    settings = settings_from(tx, settings, remedy)
    every, capacity = _checks.whole_number("every", every, 1), _checks.whole_number("capacity", capacity, 2)
    if capacity % 2:
        raise ValueError(f"Invalid capacity: {capacity=}, expected an even number.")
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        inner = tx.init(params)
        table = jnp.zeros((capacity, len(FIGURES), len(names_of(inner))), jnp.float32)
        for x in jax.tree.leaves([node.nu for node in rms_states(inner)]):
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
            _, columns = columns_of(updates, inner, step, params, settings, seen, varying_axes(state.table))
            # In a shard_map both branches have to vary as the table does, and a sum does if an operand does.
            return stacked(columns) + nothing

        if isinstance(due, jax.core.Tracer):
            row = jax.lax.cond(due, measured, lambda: nothing)
        else:  # outside of jit, cond would compile its branches anew for each update
            row = measured() if due else nothing
        never = jnp.any(row[FIGURES.index("nonfinite_share")] < 0)

        def ordered(g):  # in a shard_map it must not vary more than before
            return ordered_after(g, never) if varying_axes(never) <= varying_axes(g) else g

        updates, inner = tx.update(jax.tree.map(ordered, updates), state.inner, params, **extra_args)
        return updates, WatchState(inner, seen, *_recorded(state._replace(inner=None), row, due, seen))

    return tx._replace(init=init_fn, update=update_fn)  # which leaves its settings, if it has them


@partial(jax.jit, inline=True)
def _recorded(state, row, due, seen):
    """The state's last four fields with one more measurement, if it is due. Jitted for eager callers."""
    capacity = len(state.table)
    place = jnp.where(due, state.stored, capacity)  # written in place, or nowhere
    table = state.table.at[place].set(row, mode="drop")
    steps = state.steps.at[place].set(seen, mode="drop")
    stored = state.stored + due.astype(jnp.int32)
    full = stored == capacity

    def every_other(arrays):
        return jax.tree.map(lambda x: jnp.concatenate([x[::2], jnp.zeros_like(x[::2])]), arrays)

    table, steps = jax.lax.cond(full, every_other, lambda x: x, (table, steps))
    every = jnp.where(full, 2 * state.every, state.every)
    return every, jnp.where(full, capacity // 2, stored), steps, table


def history(state: Tree, member: int | tuple[int, ...] | None = None) -> Measurement:
    """The measurements that `watch` has made, on the host: NumPy arrays with a leading axis of time.

    Layers that never had a gradient are left out.

    Args:
      state: an optimizer state with one :class:`WatchState` in it; Flax NNX's ``optimizer.opt_state`` too.
      member: of a state that was made under `jax.vmap`, whose history it is: an index, or a tuple of one for
        each `vmap`. None where there was none.

    Raises:
      ValueError: if it has none, or several, and if `member` is missing or none of its members.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> def updated(learning_rate):
      ...     tx = diagnostics.watch(rmsprop(learning_rate))
      ...     params = jnp.ones(3)
      ...     return tx.update(params, tx.init(params), params)[1]
      >>> state = jax.vmap(updated)(jnp.array([0.1, 0.01]))
      >>> for member in range(2):
      ...     print(diagnostics.history(state, member).learning_rate["(the whole tree)"].round(3))
      [0.1]
      [0.01]
    """
    return _measurements(state, member)


def latest(state: Tree, member: int | tuple[int, ...] | None = None) -> dict[str, float]:
    """The newest measurement as numbers by name, for TensorBoard, Weights & Biases and other loggers.

    Args:
      state: as for :func:`history`.
      member: as for :func:`history`.

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
    newest = _measurements(state, member, only_newest=True)
    if not len(newest.step):
        return {}
    figures = {
        f"{figure}/{name}": float(x[0]) for figure in FIGURES for name, x in getattr(newest, figure).items()
    }
    return {"step": float(newest.step[0]), **figures}


def _measurements(state, member, only_newest=False):
    """What is stored, of the layers that had a gradient."""
    watched = [x for x in jax.tree.leaves(state, is_leaf=_is_watch) if _is_watch(x)]
    if len(watched) != 1:
        raise ValueError(
            f"Invalid state: it has {len(watched)} of watch's states in it, expected one. "
            "Of Flax NNX, pass optimizer.opt_state."
        )
    inner, _, _, stored, steps, table = watched[0]
    stored, steps, table = map(array_of, (stored, steps, table))
    index = _index(member, stored.shape)
    last = int(stored[index])
    if only_newest and last:  # one row is sliced where the table is, the rest stays there
        steps, table = (np.asarray(x[(*index, last - 1)])[None] for x in (steps, table))
    else:
        steps, table = (np.asarray(x)[index][:last] for x in (steps, table))
    names = np.array(names_of(inner, stored.shape), object)
    had_gradient = ~np.isnan(table[:, FIGURES.index("bias_correction_factor")]).all(axis=0) | (last == 0)
    return Measurement(steps, tuple(names[had_gradient]), table[..., had_gradient])


def _is_watch(x):
    return isinstance(x, WatchState)


def _index(member, members):
    index = () if member is None else tuple(np.atleast_1d(member).tolist())
    if len(index) != len(members) or not all(0 <= i < n for i, n in zip(index, members, strict=True)):
        expected = "None: the state is of one run"
        if members:
            last = members[0] - 1 if len(members) == 1 else tuple(n - 1 for n in members)
            expected = f"one up to {last}: the state is of several runs, made under jax.vmap"
        raise ValueError(f"Invalid member: {member=}, expected {expected}.")
    return index
