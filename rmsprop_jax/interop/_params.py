"""Parameters from another framework's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rmsprop_jax._tree import Tree, leaf_name
from rmsprop_jax.interop._arrays import placed
from rmsprop_jax.interop._files import Tensors, load
from rmsprop_jax.interop._match import Source, matched
from rmsprop_jax.interop._names import Names, finder, is_array, paths
from rmsprop_jax.interop._report import Reporter, tell

_NESTS = ("state_dict", "model_state_dict", "model")


def params_from(
    tensors: Tensors,
    params: Tree,
    names: Names,
    *,
    strict: bool = True,
    report: Reporter | None = None,
) -> Tree:
    """Parameters from another framework's: `params` with every array replaced.

    Args:
      tensors: arrays of NumPy, PyTorch or Keras by their name, such as ``model.state_dict()``, or the path
        of a file of them, see the module; of a checkpoint its `state_dict`, `model_state_dict` or `model`.
        What `names` does not list is not transferred.
      params: the tree to fill; dtypes and shardings are its arrays'. Leaves that are no arrays, such as an
        Equinox module's functions, stay as they are.
      names: from their names to paths in `params`, see the module.
      strict: False leaves arrays that have no name in `names`, or nothing under it there, as they are.
      report: called with the :class:`Report` of what was carried over; by default it is logged where
        `strict` is False.

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
    shapes = paths(params)
    needed = {path: Weight(shape) for path, shape in shapes.items()}
    found, told = matched(needed, shapes, names, Weights(_model(load(tensors))), strict)

    def filled(path, p):
        name = leaf_name(path)
        return placed(found[name][0], p) if is_array(p) and name in found else p

    tell(told, report, strict)
    return jax.tree_util.tree_map_with_path(filled, params)


class Weight(NamedTuple):
    """The one array of a parameter."""

    tensor: Any


class Weights(Source):
    """A model's weights by their names."""

    labels = Weight("tensor")
    count = None

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.names, self.find = tensors, finder(tensors)

    def arrays(self, name: str) -> tuple:
        return Weight(self.names[name])


def _model(loaded):
    nests = [key for key in _NESTS if isinstance(loaded.get(key), Mapping)]
    return loaded[nests[0]] if len(nests) == 1 else loaded
