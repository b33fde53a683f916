"""Whose parameter is which, and the arrays themselves: as NumPy's, as JAX's, out of a file.

A key (what, path) says which array: `what` is "E[g^2]", "E[g]" or "b", the raw moments and the momentum
buffer that the frameworks have in common, and `path` a leaf's name here. A dialect's labels are its own words
for `what`.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax._dtypes import dtype_of
from rmsprop_jax._leaves import leaf_name, named_leaves

Names = Mapping[str, str | tuple[str, Sequence[int]]]
Tensors = Mapping[str, Any] | str | os.PathLike

Key = tuple[str, str]
Shapes = Mapping[str, tuple[int, ...]]


def paths(tree: optax.Params) -> dict[str, tuple[int, ...]]:
    """The path of each array in a tree, as `names` has it, and the array's shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop
      >>> interop.paths({"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}})
      {'fc/bias': (2,), 'fc/kernel': (3, 2)}
    """
    return {name: leaf.shape for name, leaf in named_leaves(tree).items() if _is_array(leaf)}


def params_from(tensors: Tensors, params: optax.Params, names: Names) -> optax.Params:
    """Parameters from another framework's: `params` with every array replaced.

    Args:
      tensors: arrays of NumPy, PyTorch or Keras by their name, such as ``model.state_dict()``, or the path
        of a safetensors file; those that `names` does not list are not transferred.
      params: the tree to fill; dtypes and shardings are its arrays'. Leaves that are no arrays, such as an
        Equinox module's functions, stay as they are.
      names: from their names to paths in `params`, see the module.

    Returns:
      A tree as `params`.

    Raises:
      ValueError: listing every name that is missing and every shape that does not fit.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rmsprop_jax import interop
      >>> tensors = {"fc.weight": np.array([[1.0, 2.0, 3.0]])}
      >>> interop.params_from(tensors, {"kernel": jnp.zeros((3, 1))}, {"fc.weight": ("kernel", (1, 0))})
      {'kernel': Array([[1.],
             [2.],
             [3.]], dtype=float32)}
    """
    loaded, shapes = load(tensors), paths(params)
    needed = {("tensor", name): shape for name, shape in shapes.items()}
    arrays = matched(needed, shapes, names, lambda name, what: loaded.get(name), {"tensor": "tensor"})

    def filled(path, p):
        return placed(arrays["tensor", leaf_name(path)], p) if _is_array(p) else p

    return jax.tree_util.tree_map_with_path(filled, params)


def matched(
    needed: Mapping[Key, tuple[int, ...]],
    shapes: Shapes,
    names: Names,
    lookup: Callable[[str, str], Any],
    labels: Mapping[str, str],
) -> dict[Key, np.ndarray]:
    """The arrays that are needed, laid out as here, out of what `lookup(their name, what)` finds.

    Args:
      needed: the shape of each.
      shapes: of all parameters, by path.
      names: from their names to paths.
      lookup: an array of the other framework's, None where it has none.
      labels: its words for each `what`, those of the second moment first.

    Raises:
      ValueError: listing all that is missing, left over or misshapen.
    """
    by_path, problems = by_paths(names, shapes, needed)
    found = {}
    for path, (name, axes) in by_path.items():
        for what, label in labels.items():
            array = lookup(name, what)
            if (what, path) not in needed:
                if array is not None and (next(iter(labels)), path) in needed:
                    problems.append(f"{name!r} has {_a(label)}, for which this optimizer has no place.")
            elif array is None:
                problems.append(f"{name!r} has no {label}, which {path!r} needs.")
            elif (problem := _misfit(array := as_numpy(array), axes, needed[what, path], what)) is not None:
                problems.append(f"{name!r} has {_a(label)} {problem}, which {path!r} needs.")
            else:
                found[what, path] = array if axes is None else array.transpose(axes)
    raise_if(problems)
    return found


def by_paths(names: Names, shapes: Shapes, needed: Iterable[Key]) -> tuple[dict[str, tuple], list[str]]:
    """{path: (their name, axes or None)}, and what is wrong with `names`."""
    by_path: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    problems = []
    for name, target in names.items():
        path, axes = (target, None) if isinstance(target, str) else (target[0], tuple(target[1]))
        if path not in shapes:
            problems.append(f"{name!r} is mapped to {path!r}, which is no path of a parameter.")
        elif path in by_path:
            problems.append(f"{name!r} is mapped to {path!r}, as {by_path[path][0]!r} is.")
        elif axes is not None and sorted(axes) != list(range(len(shapes[path]))):
            problems.append(f"{name!r} is to be transposed with {axes}, {path!r} has shape {shapes[path]}.")
        else:
            by_path[path] = name, axes
    unnamed = dict.fromkeys(path for _, path in needed if path not in by_path)
    return by_path, problems + [f"{path!r} has no name in `names`." for path in unnamed]


def raise_if(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("\n  ".join(["The states do not fit:", *problems]))


def _misfit(array, axes, shape, what):
    if what == "E[g^2]" and np.iscomplexobj(array):
        return "of complex numbers (two reals there), not of real ones"
    if axes is not None and array.ndim == len(axes):
        expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    else:
        expected = tuple(shape)
    return None if array.shape == expected else f"of shape {array.shape}, not {expected}"


def _a(label):
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


# Arrays.


def as_numpy(x: Any) -> np.ndarray:
    """A NumPy array of float32 at least, of an array of NumPy, JAX, PyTorch or Keras."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() and x.element_size() < 4 else x
    x = np.asarray(x)
    return x if x.dtype.kind in "fc" and x.dtype.itemsize >= 4 else x.astype(np.float32)


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` in `dtype`; what is finite stays finite."""
    if x.dtype != dtype and x.dtype.kind == "f" and jnp.issubdtype(dtype, jnp.floating):
        limit = float(jnp.finfo(dtype).max)
        x = np.clip(x, -limit, limit)
    return x.astype(dtype)


def placed(x: Any, old: Any) -> jax.Array:
    """`x` as a JAX array with the dtype and the sharding of `old`, an array or its shape alone."""
    sharding = getattr(old, "sharding", None) if getattr(old, "committed", True) else None
    return jax.device_put(cast(np.asarray(x), dtype_of(old)), sharding)


def load(tensors: Tensors) -> Mapping[str, Any]:
    """The dictionary itself, or the contents of a safetensors file."""
    if isinstance(tensors, Mapping):
        return tensors
    if not str(tensors).endswith(".safetensors"):
        raise ValueError(
            f"Invalid file: {str(tensors)!r}, expected a dictionary of arrays or a .safetensors file."
        )
    from safetensors.numpy import load_file

    return load_file(tensors)


def _is_array(x):
    """Whether `x` is an array of numbers or its shape: of NumPy or JAX, but none of random keys."""
    return hasattr(x, "shape") and isinstance(getattr(x, "dtype", None), np.dtype)
