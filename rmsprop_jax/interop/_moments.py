"""Moments and momentum buffers, out of this package's states and Optax's, and into them.

They leave as NumPy arrays by the keys of `_names`, the second moment always raw, and come back likewise. Each
state is read and filled by its own accumulator.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import accumulators
from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._tree import (
    Tree,
    is_ours,
    is_rms_state,
    leaf_name,
    named_leaves,
    raw_moment,
    variance,
)
from rmsprop_jax.interop._arrays import as_numpy, cast, placed
from rmsprop_jax.interop._names import Key


def shapes_of(state: Tree) -> dict[Key, tuple[int, ...]]:
    """The shape of each moment and momentum buffer in a state."""
    return {
        (what, name): jnp.shape(leaf)
        for node in _nodes(state)
        for what, tree in _trees(node).items()
        for name, leaf in named_leaves(tree).items()
    }


def moments(state: Tree) -> tuple[dict[Key, np.ndarray], int | None]:
    """The moments and momentum buffers in a state, and the number of updates so far, None if it has none.

    Raises:
      ValueError: where there is no RMSProp in it, or codes that no accumulator is known for.
    """
    nodes = list(_nodes(state))
    if not any(map(is_rms_state, nodes)):
        raise ValueError("The state has no RMSProp in it.")
    arrays = {}
    for node in nodes:
        read = {what: named_leaves(tree) for what, tree in _trees(node).items()}
        if is_ours(node):
            read["E[g^2]"] = _raw(node, read)
        arrays.update({(what, name): as_numpy(x) for what, xs in read.items() for name, x in xs.items()})
    counts = [int(node.count) for node in nodes if _counts(node)]
    counts += [int(node.gradient_step) for node in nodes if is_multi_steps(node)]
    return arrays, max(counts, default=None)


def filled(state: Tree, arrays: Mapping[Key, np.ndarray], count: int) -> Tree:
    """`state` with its moments and momentum buffers from `arrays`, and every count from `count`.

    What is not in `arrays` stays as it is.
    """

    def tree_of(what, tree):
        def leaf(path, x):
            key = what, leaf_name(path)
            return placed(arrays[key], x) if key in arrays else x

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def new(node):
        if is_multi_steps(node):
            inner = filled(node.inner_opt_state, arrays, count)
            return node._replace(gradient_step=placed(count, node.gradient_step), inner_opt_state=inner)
        if _counts(node):
            node = node._replace(count=placed(count, node.count))
        if _is_counter(node):
            return node._replace(**filled(_uncounted(node), arrays, count))
        if isinstance(node, optax.TraceState):
            return node._replace(trace=tree_of("b", node.trace))
        if not is_rms_state(node):
            return node
        nu = _stored(node, arrays, count) if is_ours(node) else tree_of("E[g^2]", node.nu)
        mu = {} if getattr(node, "mu", None) is None else {"mu": tree_of("E[g]", node.mu)}
        return node._replace(nu=nu, **mu)

    return jax.tree.map(new, state, is_leaf=_is_node)


# One state of this package.


def _raw(node, read):
    """E[g^2] by leaf, of a state whose leaves are `read`."""
    raw = {}
    for name, nu in read["E[g^2]"].items():
        nu = as_numpy(nu)
        raw[name] = nu if node.mu is None else cast(raw_moment(nu, _double(read["E[g]"][name])), nu.dtype)
    return raw


def _stored(node, arrays, count):
    """`nu` as the state stores it."""

    def numbers(path, old):
        name = leaf_name(path)
        if ("E[g^2]", name) not in arrays:
            return None
        nu = arrays["E[g^2]", name]
        if node.mu is not None:
            nu = variance(nu, _double(arrays["E[g]", name]))
        return cast(nu, dtype_of(old) if dtype_of(old) == np.float64 else np.dtype(np.float32))

    tree = jax.tree_util.tree_map_with_path(numbers, accumulators.decoded(node))
    return jax.tree.map(placed, accumulators.with_numbers(node, tree, count).nu, node.nu)


def _double(x):
    """In float64, in which the square of a float32 is exact."""
    x = as_numpy(x)
    return x.astype(np.result_type(x, np.float64))


# All the states in a tree.


def _trees(node):
    if is_rms_state(node):
        nu = accumulators.decoded(node) if is_ours(node) else node.nu
        return {"E[g^2]": nu, "E[g]": getattr(node, "mu", None)}
    return {"b": node.trace} if isinstance(node, optax.TraceState) else {}


def _nodes(state: Tree) -> Iterator[Any]:
    for node in jax.tree.leaves(state, is_leaf=_is_node):
        yield node
        if _is_counter(node):
            yield from _nodes(_uncounted(node))
        if is_multi_steps(node):
            yield from _nodes(node.inner_opt_state)


def is_multi_steps(x: Any) -> bool:
    """Whether `x` is the state of `optax.MultiSteps`."""
    return isinstance(x, optax.MultiStepsState)


def _is_node(x):
    return is_rms_state(x) or isinstance(x, optax.TraceState) or _is_counter(x) or is_multi_steps(x)


def _counts(x):
    return "count" in getattr(x, "_fields", ())


def _is_counter(x):
    """Whether `x` counts updates, as a schedule's state or that of `optax.inject_hyperparams` does."""
    return _counts(x) and "nu" not in x._fields


def _uncounted(counter):
    return {name: value for name, value in counter._asdict().items() if name != "count"}


def count_reasons(state: Tree) -> Iterator[str]:
    """What in a state depends on the number of updates."""
    for node in _nodes(state):
        if _is_counter(node):
            yield "a schedule's or another count"
        elif is_ours(node) and accumulators.stored_by(node).rounds:
            yield "the accumulator's rounding"
        elif isinstance(node, optax.TraceState) and any(
            dtype_of(x).itemsize < 4 for x in jax.tree.leaves(node.trace)
        ):
            yield "the momentum buffer's rounding"
