"""Moments and momentum buffers, out of this package's states and Optax's, and into them.

They leave as NumPy arrays, the second moment always raw, and come back likewise. Each state is read and
filled by its own accumulator.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rmsprop_jax import accumulators
from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._tree import Tree, is_ours, is_rms_state, leaf_name, named_leaves, raw_moment, variance
from rmsprop_jax.interop._arrays import as_numpy, cast, placed


class Moments(NamedTuple):
    """What an optimizer keeps for a parameter: arrays, or what stands for them; None for what it does not."""

    square: Any = None  # the mean of squared gradients, E[g^2], also where centred
    mean: Any = None  # the mean of gradients, E[g], where centred
    buffer: Any = None  # of momentum


def shapes_of(state: Tree) -> dict[str, Moments]:
    """The shape of each moment and momentum buffer in a state, by the parameter's path."""
    return _by_path(_nodes(state), lambda node: jax.eval_shape(accumulators.decoded, node), np.shape)


def moments_of(state: Tree) -> tuple[dict[str, Moments], int | None]:
    """The moments and momentum buffers in a state, and the number of updates so far, None if it has none."""
    nodes = _nodes(state)
    if not any(map(is_rms_state, nodes)):
        raise ValueError("The state has no RMSProp in it.")
    counts = [int(node.count) for node in nodes if _counts(node)]
    counts += [int(node.gradient_step) for node in nodes if is_multi_steps(node)]
    return _by_path(nodes, _raw, as_numpy), max(counts, default=None)


def filled(state: Tree, new: Mapping[str, Moments], count: int) -> Tree:
    """`state` with the moments and momentum buffers in `new`, by path, and every count from `count`.

    What is not in `new` stays as it is, and so does the count of a part of `optax.partition` of which nothing
    is in it.
    """

    def fill(node):
        if is_multi_steps(node):
            return node._replace(gradient_step=placed(count, node.gradient_step))
        if _counts(node):
            node = node._replace(count=placed(count, node.count))
        if isinstance(node, optax.TraceState):
            return node._replace(trace=_replaced(node.trace, new, "buffer"))
        if not is_rms_state(node):
            return node
        nu = _stored(node, new, count) if is_ours(node) else _replaced(node.nu, new, "square")
        mu = getattr(node, "mu", None)
        return node._replace(nu=nu, **({} if mu is None else {"mu": _replaced(mu, new, "mean")}))

    def is_touched(part):
        own = shapes_of(part)
        return not own or not own.keys().isdisjoint(new)

    return _map_nodes(fill, state, is_touched)


def older(state: Tree, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `paths` whose count in a state is not 0."""
    nodes = [node for node in _nodes(state) if is_rms_state(node) and _counts(node) and int(node.count)]
    # A complex parameter may be two leaves in the state: optax.contrib.split_real_and_imaginary.
    found = {path for node in nodes for path in shapes_of(node)}
    return tuple(path for path in paths if {path, f"{path}/real"} & found)


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


def is_multi_steps(x: Any) -> bool:
    """Whether `x` is the state of `optax.MultiSteps`."""
    return isinstance(x, optax.MultiStepsState)


# One state.


def _raw(node):
    """E[g^2] of a state of this package, which keeps the variance where it is centred."""
    nu = jax.tree.map(as_numpy, accumulators.decoded(node))
    if node.mu is None:
        return nu
    return jax.tree.map(lambda v, m: cast(raw_moment(v, _double(m)), v.dtype), nu, node.mu)


def _stored(node, new, count):
    """`nu` of a state of this package, with what is in `new`."""

    def number(path, old):
        square, mean, _ = new.get(leaf_name(path), Moments())
        if square is None:
            return None
        return cast(square if node.mu is None else variance(square, _double(mean)), old.dtype)

    shapes = jax.eval_shape(accumulators.decoded, node)
    numbers = jax.tree_util.tree_map_with_path(number, shapes)
    nu = accumulators.with_numbers(node, numbers, count).nu
    return jax.tree.map(lambda x, old: old if x is old else placed(x, old), nu, node.nu)


def _replaced(tree, new, field):
    """A tree of one field of `Moments`, with what is in `new`."""

    def leaf(path, old):
        x = getattr(new.get(leaf_name(path), Moments()), field)
        return old if x is None else placed(x, old)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _double(x):
    """In float64, in which the square of a float32 is exact."""
    x = as_numpy(x)
    return x.astype(np.result_type(x, np.float64))


# All the states in a tree.


def _by_path(nodes: list, squares: Callable[[Any], Tree], leaf: Callable[[Any], Any]) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    for node in nodes:
        trees: dict[str, Tree] = {}
        if is_rms_state(node):
            trees = {"square": squares(node) if is_ours(node) else node.nu, "mean": getattr(node, "mu", None)}
        elif isinstance(node, optax.TraceState):
            trees = {"buffer": node.trace}
        for field, tree in trees.items():
            for path, x in named_leaves(tree).items():
                found[path] = found.get(path, Moments())._replace(**{field: leaf(x)})
    return found


def _nodes(state: Tree) -> list:
    """The states in a tree that average, buffer or count."""
    found = []

    def see(node):
        found.append(node)
        return node

    _map_nodes(see, state)
    return found


def _map_nodes(
    f: Callable[[Any], Any], state: Tree, enters: Callable[[Any], bool] = lambda part: True
) -> Tree:
    """`state` with `f` of each state that averages, buffers or counts, in the parts that it enters."""

    def inside(tree):
        return jax.tree.map(new, tree, is_leaf=_is_node)

    def new(x):
        if isinstance(x, optax.transforms.PartitionState):
            parts = {label: inside(part) if enters(part) else part for label, part in x.inner_states.items()}
            return x._replace(inner_states=parts)
        if is_multi_steps(x):
            x = x._replace(inner_opt_state=inside(x.inner_opt_state))
        elif _is_counter(x):
            x = x._replace(**inside({name: value for name, value in x._asdict().items() if name != "count"}))
        return f(x) if _is_node(x) else x

    return inside(state)


def _is_node(x):
    kinds = optax.TraceState, optax.MultiStepsState, optax.transforms.PartitionState
    return is_rms_state(x) or isinstance(x, kinds) or _is_counter(x)


def _counts(x):
    return "count" in getattr(x, "_fields", ())


def _is_counter(x):
    """Whether `x` counts updates, as a schedule's state or that of `optax.inject_hyperparams` does."""
    return _counts(x) and "nu" not in x._fields
