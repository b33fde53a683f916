"""Another framework's weights and state into trees of this package's, and back, by their names."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rmsprop_jax._tree import Tree, leaf_name
from rmsprop_jax.interop._arrays import placed, whole_number
from rmsprop_jax.interop._files import Tensors, load
from rmsprop_jax.interop._match import LOGGER, Reporter, Source, hand_over, matched, raise_if
from rmsprop_jax.interop._moments import Moments, count_reasons, filled, moments_of, older, shapes_of
from rmsprop_jax.interop._names import Names, by_paths, finder, is_array, paths

_NESTS = ("state_dict", "model_state_dict", "model")


def carry(
    state: Tree,
    params: Tree,
    names: Names | None,
    source: Source,
    *,
    count: Any = None,
    strict: bool = True,
    report: Reporter | None = None,
) -> Tree:
    """`state` with what is in `source`; without `names`, its names are paths."""
    count = count_for(state, count, source)
    needed, pairs, shapes = _needed(state, params)
    names = {path: path for path in shapes} if names is None else names
    found, made = matched(needed, shapes, names, source, strict, pairs)
    if made.kept and any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)):
        kept = ", ".join(map(repr, made.kept))
        raise ValueError(
            f"Invalid state: it is only shapes, and {kept} keep what is in it: pass tx.init(params)."
        )
    state = filled(state, _split(found, pairs), count)
    aged = older(state, made.kept)
    hand_over(made._replace(older=aged, updates=count if aged else 0, groups=source.groups), report, strict)
    return state


def outward(
    state: Tree, params: Tree, names: Names, source: Source, strict: bool = True
) -> tuple[dict[str, Moments], int]:
    """The moments in `state` by the names in `source`, laid out and scaled as there, and the count."""
    arrays, count = moments_of(state)
    needed, pairs, shapes = _needed(state, params)
    by_path, problems, missing = by_paths(names, shapes, needed, source.names)
    missing += [
        f"{name!r} is not among the other optimizer's parameters." for name in names if not source.find(name)
    ]
    raise_if([*missing, *problems] if strict else problems)
    found = {}
    for path, moments in _joined(arrays, pairs, _complex).items():
        name, axes = by_path.get(path, ("", None))
        if (key := source.find(name)) is not None:
            if moments.buffer is not None:
                moments = moments._replace(buffer=moments.buffer / source.factor(key))
            found[key] = _each(moments, lambda x: x if axes is None else x.transpose(np.argsort(axes)))  # noqa: B023
    return found, count or 0


def count_for(state: Tree, count: Any, source: Source) -> int:
    """How many updates there were: `count`, the caller's, or what `source` says.

    Where neither says, it is an error if something in `state` depends on it, or the source has to say.
    """
    found = source.count
    if count is not None:
        return whole_number(count, "count")
    if found is not None:
        return found
    reasons = list(dict.fromkeys(count_reasons(state)))
    if source.needs_count or reasons:
        needs = f", which {' and '.join(reasons)} needs" if reasons else ""
        raise ValueError(f"The other state does not say how many updates it has seen{needs}: pass count=.")
    LOGGER.warning("The other state has no count of updates, 0 is stored: bias_correction would need count=.")
    return 0


def buffer_factor(theirs_has_it: bool, ours_has_it: bool, learning_rate: Any) -> float:
    """The factor from their momentum buffer to ours, given which of them has the learning rate in it.

    Ours is what Optax's trace holds: with the learning rate it is what is added to the parameters, -lr * b.
    """
    sign = -1.0 if ours_has_it else 1.0
    if theirs_has_it == ours_has_it:
        return sign
    lr = 0.0 if learning_rate is None else float(learning_rate)
    if not 0 < lr < float("inf"):
        raise ValueError(
            f"Invalid {learning_rate=}: the momentum buffers differ in it, expected one above 0."
        )
    return sign * (lr if ours_has_it else 1 / lr)


def _needed(state, params):
    """The shapes of what a state holds, which of the parameters are two reals in it, and all their shapes."""
    needed, parameters = shapes_of(state), paths(params)
    pairs = [path for path in parameters if f"{path}/real" in needed and f"{path}/real" not in parameters]
    needed = _joined(needed, pairs, lambda real, imaginary: real)
    # Of the state's, also those of what is no array, such as a Python number.
    own = {path: next(x for x in moments if x is not None) for path, moments in needed.items()}
    return needed, pairs, {**own, **parameters}


# Complex parameters in `optax.contrib.split_real_and_imaginary`: two leaves here for one there.


def _each(moments, f):
    return Moments(*(None if x is None else f(x) for x in moments))


def _split(found, pairs):
    """With two in place of one."""
    new = {path: Moments(*arrays) for path, arrays in found.items()}
    for path in new.keys() & set(pairs):
        z = new.pop(path)
        new |= {f"{path}/real": _each(z, np.real), f"{path}/imaginary": _each(z, np.imag)}
    return new


def _joined(moments: Mapping[str, Moments], pairs: Collection[str], join: Callable) -> dict[str, Moments]:
    """With one in place of two."""
    new = dict(moments)
    for path in pairs:
        parts = zip(new.pop(f"{path}/real"), new.pop(f"{path}/imaginary"), strict=True)
        new[path] = Moments(*(None if real is None else join(real, imaginary) for real, imaginary in parts))
    return new


def _complex(real, imaginary):
    z = np.empty(real.shape, np.result_type(real, np.complex64))
    z.real, z.imag = real, imaginary
    return z


# Parameters.


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
        of a file of them; of a checkpoint its `state_dict`, `model_state_dict` or `model`.
      params: the tree to fill; dtypes and shardings are its arrays'. Leaves that are no arrays stay.
      names, strict, report: as for :func:`from_torch`.

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
    loaded = load(tensors)
    nests = [key for key in _NESTS if isinstance(loaded.get(key), Mapping)]
    source = Weights(loaded[nests[0]] if len(nests) == 1 else loaded)
    found, made = matched(needed, shapes, names, source, strict)

    def filled(path, p):
        name = leaf_name(path)
        return placed(found[name][0], p) if is_array(p) and name in found else p

    hand_over(made, report, strict)
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
