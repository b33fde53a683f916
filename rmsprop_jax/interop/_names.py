"""Whose parameter is which.

A key (what, path) says which array: `what` is "E[g^2]", "E[g]" or "b", the raw moments and the momentum
buffer that the frameworks have in common, and `path` a leaf's name here. A dialect's labels are its own words
for `what`.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop_jax._tree import Tree, named_leaves
from rmsprop_jax.interop._arrays import as_numpy
from rmsprop_jax.interop._report import Report

Names = Mapping[str, str | tuple[str, Sequence[int]]]

Key = tuple[str, str]
Shapes = Mapping[str, tuple[int, ...]]


class Theirs(NamedTuple):
    """What the other framework has.

    Attributes:
      known: the names of its parameters.
      labels: its words for each `what`, those of the second moment first.
      lookup: an array by one of `known` and `what`, None where it has none.
      find: which of `known` a name in `names` is, None if none.
      factor: from its momentum buffer, one of `known`'s, to ours.
    """

    known: Collection[str]
    labels: Mapping[str, str]
    lookup: Callable[[str, str], Any]
    find: Callable[[str], str | None]
    factor: Callable[[str], float] = lambda name: 1.0

    def has(self, name: str) -> bool:
        """Whether one of `known` has a state at all."""
        return any(self.lookup(name, what) is not None for what in self.labels)


def paths(tree: Tree) -> dict[str, tuple[int, ...]]:
    """The path of each array in a tree, as `names` has it, and the array's shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop
      >>> interop.paths({"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}})
      {'fc/bias': (2,), 'fc/kernel': (3, 2)}
    """
    return {name: leaf.shape for name, leaf in named_leaves(tree).items() if is_array(leaf)}


def is_array(x: Any) -> bool:
    """Whether `x` is an array of numbers or its shape: of NumPy or JAX, but none of random keys."""
    return hasattr(x, "shape") and isinstance(getattr(x, "dtype", None), np.dtype)


def finder(known: Collection[str]) -> Callable[[str], str | None]:
    """`find` of PyTorch's names, with and without what `torch.compile`, DDP and FSDP put before them."""
    bare: dict[str, list[str]] = {}
    for name in known:
        bare.setdefault(_bare(name), []).append(name)

    def find(name):
        if name in known:
            return name
        found = bare.get(_bare(name), [])
        return found[0] if len(found) == 1 else None

    return find


def _bare(name):
    name = re.sub(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
    return name.removeprefix("module.")


def matched(
    needed: Mapping[Key, tuple[int, ...]],
    shapes: Shapes,
    names: Names,
    theirs: Theirs,
    strict: bool = True,
    pairs: Collection[str] = (),
) -> tuple[dict[Key, np.ndarray], Report]:
    """The arrays that are needed, laid out as here.

    Args:
      needed: the shape of each.
      shapes: of all parameters, by path.
      names: from their names to paths.
      theirs: where the arrays come from.
      strict: whether every parameter has to have a name, a place and a state.
      pairs: the paths of complex parameters that are two reals, here as there.

    Raises:
      ValueError: listing all that is missing, left over or misshapen; with ``strict=False`` all that is there
        in part or does not fit, or that nothing at all is left.
    """
    by_path, problems, lax = by_paths(names, shapes, needed, theirs.known)
    found: dict[Key, np.ndarray] = {}
    taken: dict[str, str] = {}
    wanted = dict.fromkeys(path for _, path in needed)
    for path, (name, axes) in by_path.items():
        source = theirs.find(name)
        if source is not None and taken.setdefault(source, name) != name:
            problems.append(f"{name!r} and {taken[source]!r} are both {source!r} there: which is it?")
        elif source is None or not theirs.has(source):
            if path in wanted:
                label = next(iter(theirs.labels.values()))
                near = "" if source is not None else nearest(name, theirs.known)
                lax.append(f"{name!r} has no {label}, which {path!r} needs{near}.")
        else:
            problems += _taken(found, needed, path, name, axes, source, theirs, path in pairs)
    if not found:
        strict = True
    raise_if([*lax, *problems] if strict else problems)
    carried = tuple(dict.fromkeys(path for _, path in found))
    kept = tuple(path for path in wanted if path not in set(carried))
    sources = {theirs.find(by_path[path][0]) for path in carried}
    left = tuple(name for name in theirs.known if name not in sources and theirs.has(name))
    return found, Report(carried, kept, left)


def _taken(found, needed, path, name, axes, source, theirs, is_pair):
    """Adds one parameter's arrays to `found`, and returns what is wrong with them."""
    problems = []
    for what, label in theirs.labels.items():
        array = theirs.lookup(source, what)
        if (what, path) not in needed:
            if array is not None and (next(iter(theirs.labels)), path) in needed:
                problems.append(f"{name!r} has {_a(label)}, for which this optimizer has no place.")
            continue
        if array is None:
            problems.append(f"{name!r} has no {label}, which {path!r} needs.")
            continue
        try:
            array = as_numpy(array)
        except ValueError as error:
            problems.append(f"{name!r} has {_a(label)} of type {error}.")
            continue
        if (problem := _misfit(array, axes, needed[what, path], what, is_pair)) is not None:
            problems.append(f"{name!r} has {_a(label)} {problem}, which {path!r} needs.")
        else:
            array = array * theirs.factor(source) if what == "b" else array
            found[what, path] = array if axes is None else array.transpose(axes)
    return problems


def by_paths(
    names: Names, shapes: Shapes, needed: Iterable[Key], known: Iterable[str] = ()
) -> tuple[dict[str, tuple], list[str], list[str]]:
    """{path: (their name, axes or None)}; what is wrong with `names`, and what is in part."""
    by_path: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    problems, lax = [], []
    for name, target in names.items():
        path, axes = (target, None) if isinstance(target, str) else (target[0], tuple(target[1]))
        if path not in shapes:
            near = nearest(path, shapes)
            lax.append(f"{name!r} is mapped to {path!r}, which is no path of a parameter{near}.")
        elif path in by_path:
            problems.append(f"{name!r} is mapped to {path!r}, as {by_path[path][0]!r} is.")
        elif axes is not None and sorted(axes) != list(range(len(shapes[path]))):
            problems.append(f"{name!r} is to be transposed with {axes}, {path!r} has shape {shapes[path]}.")
        else:
            by_path[path] = name, axes
    unnamed = dict.fromkeys(path for _, path in needed if path not in by_path)
    rest = [name for name in known if name not in names]
    lax += [f"{path!r} has no name in `names`{nearest(path, rest)}." for path in unnamed]
    return by_path, problems, lax


def nearest(name: str, others: Iterable[str]) -> str:
    """What to add to a sentence about a name that is not among the others."""
    near = difflib.get_close_matches(name.replace("/", "."), [x.replace("/", ".") for x in others], n=3)
    originals = {x.replace("/", "."): x for x in others}
    return f" (nearest: {', '.join(repr(originals[x]) for x in near)})" if near else ""


def raise_if(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("\n  ".join(["The states do not fit:", *problems]))


def _misfit(array, axes, shape, what, is_pair):
    if what == "E[g^2]" and np.iscomplexobj(array) and not is_pair:
        return (
            "of complex numbers (two reals there: optax.contrib.split_real_and_imaginary), not of real ones"
        )
    if is_pair and not np.iscomplexobj(array):
        return "of real numbers, not of complex ones"
    if axes is not None and array.ndim == len(axes):
        expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    else:
        expected = tuple(shape)
    return None if array.shape == expected else f"of shape {array.shape}, not {expected}"


def _a(label):
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
