"""States that older versions of this package saved, in the layout of this version.

Before 0.3.0 `nu` was the parameters' tree for every accumulator. 0.1.0 did not store the accumulator at all.
0.2.0 stored it in an attribute beside the fields, which only pickles keep, and only where it had no name; its
"factored" had a pair of means in the place of each matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._tree import SameTree, ScaleByRmsState, Tree, is_box
from rmsprop_jax.accumulators import NAMED, stored_by
from rmsprop_jax.diagnostics import WatchState
from rmsprop_jax.interop._arrays import placed


def upgrade(old: Tree, like: SameTree) -> SameTree:
    """Turns a state that an older version saved into the state from which this version goes on.

    Args:
      old: the saved state, also inside Optax's chains and wrappers and `diagnostics.watch`: the result of
        `pickle.load`, of ``flax.serialization.msgpack_restore`` or of Orbax without a target; of Flax NNX the
        ``"opt_state"`` of a pure dictionary, with ``optimizer.opt_state`` for `like`.
      like: ``tx.init(params)`` of the optimizer that goes on, built with the settings of the old run; shapes
        as of `jax.eval_shape` will do. The accumulator is that of `like`, since most old states do not name
        theirs: codes of `Uint8(-40)` look like those of "uint8". Only a pickle of 0.2.0 does, and is refused
        where it names another.

    Returns:
      The arrays of `old`, bit for bit, in the structure, shapes and dtypes of `like`. Arrays of JAX stay
      where they are, others are placed as those of `like` are. A state of this version comes back as it is.

      Two things may be missing in `old` and are then those of `like`: hyper-parameters under
      :func:`optax.inject_hyperparams`, and the measurements of `watch` where the number of figures, of layers
      or the capacity has changed.

    Raises:
      ValueError: where `old` and `like` do not fit, naming the place in the state and what each has there.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop, rmsprop
      >>> tx, params = rmsprop(0.1, accumulator="uint8"), {"w": jnp.zeros(2)}
      >>> codes = jnp.array([213, 0], jnp.uint8)
      >>> old = [{"count": jnp.int32(1), "nu": {"w": codes}, "mu": None}, None, None, None]  # Orbax's
      >>> print(interop.upgrade(old, tx.init(params))[0].nu)
      {'uint8': {'w': Array([213,   0], dtype=uint8)}}
    """
    return _upgraded(like, old, ())


def _upgraded(like, old, path):
    if jax.tree_util.all_leaves([like]):
        if jnp.shape(like) != getattr(old, "shape", None) or dtype_of(like) != dtype_of(old):
            raise _misfit(_described(old), _described(like), path)
        return old if isinstance(old, jax.Array) else placed(old, like)
    entries, children = _entries_as_now(like, old, path), _entries(like)
    if jax.tree.leaves([(entries | children)[name] for name in entries.keys() ^ children.keys()]):
        raise _misfit(_described(old), _described(like), path)
    new = [_upgraded(x, entries.get(name), (*path, name)) for name, x in children.items()]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=lambda x: x is not like), new)


def _entries_as_now(like, old, path):
    """The entries of an old node, where versions differ those that this version has."""
    entries = _entries(old)
    if is_box(like) and not entries:  # `nnx.to_pure_dict` has arrays in the place of variables
        entries = dict.fromkeys(_entries(like), old)
    if isinstance(like, ScaleByRmsState):
        entries["nu"] = _nu(like, old, entries.get("nu"), path)
    elif isinstance(like, optax.schedules.InjectStatefulHyperparamsState):
        entries["hyperparams"] = _hyperparams(like.hyperparams, _entries(entries.get("hyperparams")))
    elif isinstance(like, WatchState):
        entries = _measurements(like, entries)
    return entries


def _entries(node: Any) -> dict[str, Any]:
    """The nodes one level below, by field, key or index; an array has none."""
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return {jax.tree_util.keystr(path, simple=True): x for path, x in children if path}


def _nu(like, old, nu, path):
    """The old `nu` in the layout of this version."""
    accumulator = stored_by(like)
    stated = getattr(old, "accumulator", accumulator)  # 0.2.0's is None where the accumulator has a name
    if stated != accumulator and not (stated is None and accumulator in NAMED.values()):
        found = "one of " + ", ".join(map(repr, NAMED)) if stated is None else repr(stated.name)
        raise _misfit(f"stored by {found}", repr(accumulator.name), (*path, "nu"))
    if accumulator.trees(nu) is not None:  # "float32", whose layout is the same, or a state of this version
        return nu
    if not accumulator.parts:
        return accumulator.joined((nu,))
    return accumulator.joined(tuple(_part(nu, part, accumulator.parts) for part in accumulator.parts))


def _part(nu, part, parts):
    """The parameters' tree of one part, out of a tree that has all parts together at each parameter."""

    def is_stored(x):
        return set(_entries(x)) == set(parts)

    def one(x):
        if is_stored(x):
            return _entries(x)[part]
        return x if part == parts[0] else np.zeros(1, x.dtype)

    return jax.tree.map(one, nu, is_leaf=is_stored)


def _hyperparams(like, old):
    """The old ones and those that are new in `like`, without 0.1.0's weight_decay=0.0 and other zeros."""
    return {**like, **{name: x for name, x in old.items() if name in like or np.any(x)}}


def _measurements(like, entries):
    """The entries of the old state of `watch`, without its measurements where the table has another shape."""
    entries = {"stored" if name == "kept" else name: x for name, x in entries.items()}  # 0.1.0
    if getattr(entries.get("table"), "shape", None) == like.table.shape:
        return entries
    fresh = {name: x for name, x in _entries(like).items() if name not in ("inner", "seen")}
    return {**entries, **fresh}


def _misfit(found, expected, path):
    return ValueError(
        f"Invalid old: {'/'.join(path) or 'the state'} is {found}, expected {expected} as in like. Build the "
        "optimizer of like with the settings, wrappers and parameters of the old run, and change them "
        "afterwards: accumulators.convert changes the accumulator, optax.tree.cast a dtype."
    )


def _described(x):
    if hasattr(x, "dtype"):
        return f"{dtype_of(x)} of shape {jnp.shape(x)}"
    entries = ", ".join(map(repr, _entries(x)))
    return f"{type(x).__name__} of {entries}" if entries else repr(x)
