"""Whose parameter is which: paths here, names there, and what `names` says of both."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rmsprop_jax._tree import Tree, named_leaves

Names = Mapping[str, str | tuple[str, Sequence[int]]]

FLATTENED = (
    "flattened, as FSDP and DeepSpeed's ZeRO store it: FSDP.optim_state_dict, or "
    "deepspeed.checkpoint.ds_to_universal, gives each parameter's own"
)


def paths(tree: Tree) -> dict[str, tuple[int, ...]]:
    """The path of each array in a tree, as `names` has it, and the array's shape.

    Raises:
      ValueError: for two leaves of one path, such as those of ``{"a": {"b": x}, "a/b": y}``.

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


def path_of(target: str | tuple[str, Sequence[int]]) -> str:
    """The path in one of the values of `names`."""
    return target if isinstance(target, str) else target[0]


def bare(name: str) -> str:
    """A name of PyTorch's without what `torch.compile`, DDP and FSDP put before it."""
    name = re.sub(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
    return name.removeprefix("module.")


def finder(known: Collection[str]) -> Callable[[str], str | None]:
    """A function that says which of PyTorch's names one is, with and without their prefixes."""
    by_bare: dict[str, list[str]] = {}
    for name in known:
        by_bare.setdefault(bare(name), []).append(name)

    def find(name):
        if name in known:
            return name
        found = by_bare.get(bare(name), [])
        return found[0] if len(found) == 1 else None

    return find


def by_paths(
    names: Names, shapes: Mapping[str, tuple[int, ...]], needed: Iterable[str], known: Iterable[str] = ()
) -> tuple[dict[str, tuple[str, tuple[int, ...] | None]], list[str], list[str]]:
    """{path: (their name, axes or None)}; what is wrong with `names`, and what is missing."""
    by_path: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    problems, missing = [], []
    for name, target in names.items():
        path, axes = path_of(target), None if isinstance(target, str) else tuple(target[1])
        if path not in shapes:
            near = nearest(path, shapes)
            missing.append(f"{name!r} is mapped to {path!r}, which is no path of a parameter{near}.")
        elif path in by_path:
            problems.append(f"{name!r} is mapped to {path!r}, as {by_path[path][0]!r} is.")
        elif axes is not None and sorted(axes) != list(range(len(shapes[path]))):
            problems.append(f"{name!r} is to be transposed with {axes}, {path!r} has shape {shapes[path]}.")
        else:
            by_path[path] = name, axes
    return by_path, problems, missing + _unnamed([x for x in needed if x not in by_path], names, known)


def _unnamed(unnamed, names, known):
    rest = [name for name in known if name not in names]
    return [f"{path!r} has no name in `names`{nearest(path, rest)}." for path in unnamed]


def nearest(name: str, others: Iterable[str]) -> str:
    """What to add to a sentence about a name that is not among the others."""
    originals = {x.replace("/", "."): x for x in others}
    near = difflib.get_close_matches(name.replace("/", "."), list(originals), n=3)
    return f" (nearest: {', '.join(repr(originals[x]) for x in near)})" if near else ""
