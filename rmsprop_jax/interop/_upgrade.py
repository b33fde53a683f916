"""States of older versions as those of this one.

Before 0.3.0 `nu` was the parameters' tree for every accumulator: 0.1.0 had nothing that says which one, 0.2.0 an
attribute beside the fields, which only pickles keep, and for "factored" a pair of means in the place of a matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._tree import SameTree, ScaleByRmsState, Tree
from rmsprop_jax.accumulators import NAMED, stored_by
from rmsprop_jax.diagnostics import WatchState
from rmsprop_jax.interop._arrays import placed


def upgrade(old: Tree, like: SameTree) -> SameTree:
    """A state that an older version of this package has saved, as this version continues it.

    Args:
      old: the state, inside any chain or wrapper of Optax's and `diagnostics.watch`: as `pickle.load` or
        ``flax.serialization.msgpack_restore`` give it, or Orbax without a target.
      like: ``tx.init(params)`` of the optimizer that is to go on, built with the settings of the old run. It
        says which accumulator the codes in `old` are of, where `old` does not: only pickles of 0.2.0 do.

    Returns:
      A state with the structure, shapes and dtypes of `like`, and the arrays of `old`, bit for bit. Arrays of
      JAX stay on their devices, others are placed as those of `like`. A state of this version comes back as
      it is. Hyper-parameters of :func:`optax.inject_hyperparams` that `old` does not have are those of
      `like`, and so are the measurements of `watch` where it measures other figures, layers or capacities.

    Raises:
      ValueError: where the two do not fit, naming the place in the state and what stands there in both.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop, rmsprop
      >>> tx, params = rmsprop(0.1, accumulator="uint8"), {"w": jnp.zeros(2)}
      >>> codes = jnp.array([213, 0], jnp.uint8)
      >>> old = [{"count": jnp.int32(1), "nu": {"w": codes}, "mu": None}, None, None, None]  # Orbax, 0.2.0
      >>> print(interop.upgrade(old, tx.init(params))[0].nu)
      {'uint8': {'w': Array([213,   0], dtype=uint8)}}
    """
    return _upgraded(like, old, ())


def _upgraded(like, old, path):
    if jax.tree_util.all_leaves([like]):
        if jnp.shape(like) != getattr(old, "shape", None) or dtype_of(like) != dtype_of(old):
            raise _misfit(_described(old), _described(like), path)
        return old if isinstance(old, jax.Array) else placed(old, like)
    entries = _entries(old)
    if isinstance(like, ScaleByRmsState):
        entries["nu"] = _nu(like, old, entries.get("nu"), path)
    elif isinstance(like, optax.schedules.InjectStatefulHyperparamsState):
        entries["hyperparams"] = _hyperparams(like.hyperparams, _entries(entries.get("hyperparams")))
    elif isinstance(like, WatchState):
        entries = _measurements(like, entries)
    children = _entries(like)
    missing = [x for name, x in children.items() if name not in entries]
    extra = [x for name, x in entries.items() if name not in children]
    if jax.tree.leaves((missing, extra)):
        raise _misfit(_described(old), _described(like), path)
    new = [_upgraded(x, entries.get(name), (*path, name)) for name, x in children.items()]
    return jax.tree.structure(like, is_leaf=lambda x: x is not like).unflatten(new)


def _entries(node: Any) -> dict[str, Any]:
    """The nodes one level below, by field, key or index; none of an array."""
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return {jax.tree_util.keystr(path, simple=True): x for path, x in children if path}


def _nu(like, old, nu, path):
    """The old `nu` in the layout of this version."""
    accumulator = stored_by(like)
    stated = getattr(old, "accumulator", accumulator)  # 0.2.0 stated one without a name, and None for others
    if stated != accumulator and not (stated is None and accumulator in NAMED.values()):
        found = "one of " + ", ".join(map(repr, NAMED)) if stated is None else repr(stated.name)
        raise _misfit(f"stored by {found}", repr(accumulator.name), (*path, "nu"))
    if accumulator.trees(nu) is not None:  # "float32", whose layout is the same, or a state of this version
        return nu
    if not accumulator.parts:
        return accumulator.joined((nu,))
    return accumulator.joined(tuple(_part(nu, part, accumulator.parts) for part in accumulator.parts))


def _part(nu, part, parts):
    """The parameters' tree of one of the arrays that stood together in the place of each parameter."""

    def is_stored(x):
        return set(_entries(x)) == set(parts)

    def one(x):
        if is_stored(x):
            return _entries(x)[part]
        return x if part == parts[0] else np.zeros(1, x.dtype)

    return jax.tree.map(one, nu, is_leaf=is_stored)


def _hyperparams(like, old):
    """The old ones, and those of `like` that are new; without 0.1.0's weight_decay=0.0, which is None now."""
    return {**like, **{name: x for name, x in old.items() if name in like or np.any(x)}}


def _measurements(like, entries):
    """Those of the old state of `watch`; none of them where its table is of another shape."""
    entries = {"stored" if name == "kept" else name: x for name, x in entries.items()}  # 0.1.0
    if jnp.shape(entries.get("table")) == jnp.shape(like.table):
        return entries
    own = like._replace(inner=None)._asdict()
    return {**own, **{name: entries[name] for name in ("inner", "seen") if name in entries}}


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
