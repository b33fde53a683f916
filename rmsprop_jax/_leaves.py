"""Which leaf is which: a leaf's one name, and whether gradients fit a state.

A leaf is named by the keys and indices on the way to it, joined by "/": `fc/kernel`. Flax NNX's variables
hold their array as `value`, which is not part of the name.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._states import is_stored, whole

_NNX_VALUE = jax.tree_util.GetAttrKey("value")


def leaf_name(path: Any) -> str:
    """The name of the leaf at a path of `jax.tree_util`."""
    if path and path[-1] == _NNX_VALUE:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the whole tree)"


def named_leaves(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """The tree's leaves by their names, in its order."""
    return {leaf_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def array_of(x: Any) -> Any:
    """An array, also out of a variable of Flax NNX."""
    return jax.tree.leaves(x)[0]


def is_none(x: Any) -> bool:
    """For `is_leaf`: where a gradient is None, its leaf is to be left alone."""
    return x is None


def leaf_numbers(leaves: list) -> np.ndarray:
    """The number of each among all leaves, uint32; where a gradient is None, one may be a whole subtree."""
    return np.cumsum([0, *(len(jax.tree.leaves(x)) for x in leaves)])[:-1].astype(np.uint32)


def flatten_matching(grads: Any, nu: Any, mu: Any = None) -> tuple[list, Any, list, list]:
    """Flattens gradients and accumulators together: the leaves, and the gradients' treedef.

    Raises:
      ValueError: naming the first leaf that does not match.
    """
    leaves, treedef = jax.tree.flatten(grads, is_leaf=is_none)
    try:
        nus = [whole(x) for x in treedef.flatten_up_to(nu)]  # type: ignore[attr-defined]
        mus = [None] * len(nus) if mu is None else treedef.flatten_up_to(mu)  # type: ignore[attr-defined]
    except ValueError:
        raise ValueError(_tree_mismatch(grads, nu)) from None
    for index, of_leaf in enumerate(zip(leaves, nus, mus, strict=True)):
        if (problem := _mismatch(*of_leaf)) is not None:
            path, _ = jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_none)[index]
            raise ValueError(f"Gradient {leaf_name(path)!r} {problem}")
    return leaves, treedef, nus, mus


def _mismatch(g, nu, mu):
    if g is None:
        return None
    shape = getattr(g, "shape", ())
    expected = getattr(nu, "shape", "None" if nu is None else "a subtree")
    if shape != expected:
        return f"has shape {shape}, the state was initialised for {expected}."
    dtype = dtype_of(g)
    if dtype == jax.dtypes.float0:
        return "has dtype float0: its parameter is not differentiable. optax.masked leaves it out."
    if not jnp.issubdtype(dtype, jnp.inexact):
        return f"has dtype {dtype}, expected floating or complex."
    if mu is not None and jnp.iscomplexobj(g) and not jnp.iscomplexobj(mu):
        return f"has dtype {dtype}, the state was initialised for real gradients."
    return None


def _tree_mismatch(grads, nu):
    names, expected = set(named_leaves(grads, is_none)), set(named_leaves(nu, is_stored))
    differences = {"lack": sorted(expected - names), "add": sorted(names - expected)}
    parts = [f"{what} {', '.join(map(repr, some))}" for what, some in differences.items() if some]
    return (
        f"The gradients' tree does not fit the state: they {' and '.join(parts) or _other_type(grads, nu)}."
    )


def _other_type(grads, nu, path=()):
    """Where the names are the same: the first node of another type, such as a FrozenDict for a dict."""
    if type(grads) is not type(nu):
        place = f" at {leaf_name(path)!r}" if path else ""
        hint = (
            ", flax.core.unfreeze makes one of the other"
            if "FrozenDict" in f"{type(grads)}{type(nu)}"
            else ""
        )
        return f"are a {type(grads).__name__}{place}, the state has a {type(nu).__name__}{hint}"
    children = (
        jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x, tree=tree: x is not tree)
        for tree in (grads, nu)
    )
    found = (_other_type(g, n, path + key) for (key, g), (_, n) in zip(*children, strict=True))
    return next(filter(None, found), None)
