"""Which state, and which leaf: the state of RMSProp inside any chain or wrapper, and leaves by their names.

Uncentred, `nu` is E[g^2] here and in Optax. Centred, it is the variance E[g^2] - E[g]^2 here, and the raw
moment E[g^2] in Optax; E[g] is `mu` in both.

The name of a leaf joins the keys and indices on the way to it by "/": `fc/kernel`. Flax NNX's variables hold
their array as `value`, which is not part of the name.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

# A pytree has no type that a checker could know. `optax.Params` and the like are recursive, by a name that
# only Optax's own module has, at which `typing.get_type_hints` fails.
Tree: TypeAlias = Any
"""A tree of arrays: of parameters, gradients or updates, or an optimizer's state."""

SameTree = TypeVar("SameTree")
"""What comes back as it was handed in: the tree's structure and type, with other arrays."""

# States --------------------------------------------------------------------------------------------------


@partial(jax.export.register_namedtuple_serialization, serialized_name="rmsprop_jax.ScaleByRmsState")
class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`, the same fields for every option.

    Attributes:
      count: updates so far, int32 scalar.
      nu: running mean of squared gradients, or of squared deviations from `mu` when centred. The parameters'
        tree and shapes, real, float32 (float64 for 64-bit parameters). Another accumulator's arrays stand
        under its name, as in ``{"uint8": tree}``, see :mod:`rmsprop_jax.accumulators`.
      mu: running mean of gradients when centred, else None; the parameters' tree and shapes, float32 or
        float64, complex for complex parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, as in Optax's states
    nu: Tree
    mu: Tree


# Optax exports two of its four.
_OPTAX = (
    *("ScaleByRmsState", "ScaleByRmsWithCountState"),
    *("ScaleByRStdDevState", "ScaleByRStdDevWithCountState"),
)


def is_rms_state(x: Any) -> bool:
    """Whether `x` is a state of this package's RMSProp or of Optax's."""
    return isinstance(x, tuple) and type(x).__name__ in _OPTAX


def is_ours(x: Any) -> bool:
    """Whether `x` is a state of this package's RMSProp."""
    return isinstance(x, ScaleByRmsState)


def map_rms_states(f: Callable[[Any], Any], state: Any) -> Any:
    """`state` with `f` of each state of RMSProp in it; all else as it is."""
    return jax.tree.map(lambda x: f(x) if is_rms_state(x) else x, state, is_leaf=is_rms_state)


def rms_states(state: Any) -> Iterator[Any]:
    """The states of RMSProp in `state`."""
    return filter(is_rms_state, jax.tree.leaves(state, is_leaf=is_rms_state))


def refusal(state: Any) -> str:
    """The error for a state that `init` did not return."""
    kind = type(state).__name__
    if isinstance(state, tuple | list):
        kind += f" of {', '.join(type(x).__name__ for x in state) or 'nothing'}"
    message = (
        f"Invalid state: it is {kind}, expected what tx.init(params) returned: call that first, pass it "
        "as in tx.update(grads, state, params), and restore a checkpoint into its structure."
    )
    hint = " Of a Flax NNX optimizer it is optimizer.opt_state." if hasattr(state, "opt_state") else ""
    return message + hint


def raw_moment(nu: Any, mu: Any) -> Any:
    """E[g^2] from the variance and E[g], arrays of JAX or of NumPy."""
    return nu + (mu.real**2 + mu.imag**2)


def variance(raw: Any, mu: Any) -> Any:
    """E[g^2] - E[g]^2, at least 0: rounding may leave the difference below. Arrays of JAX or of NumPy."""
    return (raw - (mu.real**2 + mu.imag**2)).clip(min=0)


# Leaves --------------------------------------------------------------------------------------------------

_NNX_VALUE = jax.tree_util.GetAttrKey("value")


def leaf_name(path: Any) -> str:
    """The name of the leaf at a path of `jax.tree_util`."""
    if path and path[-1] == _NNX_VALUE:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the whole tree)"


def named_leaves(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """The tree's leaves by their names, in its order.

    Raises:
      ValueError: for two leaves of one name, such as those of ``{"a": {"b": x}, "a/b": y}``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    named = {leaf_name(path): x for path, x in leaves}
    if len(named) < len(leaves):
        paths: dict[str, str] = {}
        for path, _ in leaves:
            name, own = leaf_name(path), jax.tree_util.keystr(path)
            if (other := paths.setdefault(name, own)) != own:
                problem = f"The leaves at {other} and {own} are both named {name!r}"
                raise ValueError(f"{problem}: rename a key that has '/' in it.")
    return named


def array_of(x: Any) -> Any:
    """An array, also out of a variable of Flax NNX."""
    return jax.tree.leaves(x)[0]


def is_none(x: Any) -> bool:
    """For `is_leaf`: where a gradient is None, its leaf is to be left alone."""
    return x is None


def leaf_numbers(leaves: list) -> np.ndarray:
    """The number of each among all leaves, uint32; where a gradient is None, one may be a whole subtree."""
    return np.cumsum([0, *(len(jax.tree.leaves(x)) for x in leaves)])[:-1].astype(np.uint32)


def tree_mismatch(grads: Any, tree: Any) -> str:
    """The error for gradients whose tree is not the state's."""
    names, expected = set(named_leaves(grads, is_none)), set(named_leaves(tree))
    differences = {"lack": sorted(expected - names), "add": sorted(names - expected)}
    parts = [f"{verb} {', '.join(map(repr, some))}" for verb, some in differences.items() if some]
    return (
        f"The gradients' tree does not fit the state: they {' and '.join(parts) or _other_type(grads, tree)}."
    )


def _other_type(grads, tree, path=()):
    """Where the names are the same: the first node of another type, such as a FrozenDict for a dict."""
    if type(grads) is not type(tree):
        place = f" at {leaf_name(path)!r}" if path else ""
        hint = (
            ", flax.core.unfreeze makes one of the other"
            if "FrozenDict" in f"{type(grads)}{type(tree)}"
            else ""
        )
        return f"are a {type(grads).__name__}{place}, the state has a {type(tree).__name__}{hint}"
    children = (
        jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x, node=node: x is not node)
        for node in (grads, tree)
    )
    found = (_other_type(g, n, path + key) for (key, g), (_, n) in zip(*children, strict=True))
    return next(filter(None, found), None)


# Flax's boxes --------------------------------------------------------------------------------------------


def is_box(x: Any) -> bool:
    """Whether `x` is a box of Flax around one array: Linen's `Partitioned`, or a variable of NNX."""
    return hasattr(x, "replace_boxed") or hasattr(x, "get_metadata")


def unboxed(tree: Any) -> Any:
    """The tree with a list of one array for each box, whatever the box says of its axes."""
    return jax.tree.map(lambda x: jax.tree.leaves(x) if is_box(x) else x, tree, is_leaf=is_box)


def fitted_box(x: Any, param: Any) -> Any:
    """A box that was made for `param`, with no name on an axis over which its array is a mean."""
    if not is_box(x):
        return x
    (array,), (whole,) = jax.tree.leaves(x), jax.tree.leaves(param)
    is_linen = hasattr(x, "replace_boxed")
    metadata = vars(x) if is_linen else x.get_metadata()
    key = next((key for key in ("names", "out_sharding", "sharding_names") if metadata.get(key)), None)
    if key is None or array.shape == whole.shape:
        return x
    sizes = zip(array.shape, whole.shape, strict=False)  # an array of no other axes has no names
    names = tuple(name if n == m else None for name, (n, m) in zip(metadata[key], sizes, strict=False))
    return replace(x, **{key: names}) if is_linen else x.replace(array, **{key: names})
