r"""Optimizer state in from PyTorch, Keras and Optax, and out to them.

A run that is carried over goes on as if nothing had happened: the accumulators, the momentum buffer and the
number of updates move, with what differs between the frameworks,

    ===========  =============================  =======================  ====================================
    what         here                           PyTorch, timm            Keras
    ===========  =============================  =======================  ====================================
    nu           E[g^2]                         square_avg               velocity
    nu, centred  E[g^2] - E[g]^2                square_avg, grad_avg     velocity, average_gradient
    mu           E[g]                           grad_avg                 average_gradient
    trace        -(learning rate in b), or b    momentum_buffer, b       momentum, the learning rate in b
    count        updates so far                 step                     iteration
    ===========  =============================  =======================  ====================================

`from_torch` and `from_keras` take a state that ``init`` made and return it with all of these replaced;
`to_torch` and `to_keras` do the same for the other framework's state. The accumulators are found by their
type, so the optimizer may be any chain or wrapper of Optax's around :func:`rmsprop_jax.rmsprop`.

Accumulators of :mod:`rmsprop_jax.accumulators` are decoded on the way out and encoded on the way in.

**Names.** `names` maps the other framework's parameter names to paths in the parameters' tree, such as
``{"fc.bias": "fc/bias", "fc.weight": ("fc/kernel", (1, 0))}``: the keys and indices on the way to the leaf,
joined by "/" (:func:`paths` lists them), and for an array that is laid out differently the axes to transpose
theirs with, as in :func:`jax.numpy.transpose`. :func:`weights` carries the parameters over by the same
mapping.

Nothing is unpickled here: pass dictionaries of arrays that are loaded already, or a safetensors file.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import accumulators
from rmsprop_jax._states import ScaleByRmsState

Names = Mapping[str, str | tuple[str, Sequence[int]]]
Tensors = Mapping[str, Any] | str | os.PathLike

# The raw moments and the momentum buffer, (what, path): array, are what the frameworks have in common.
_TORCH = {"E[g^2]": "square_avg", "E[g]": "grad_avg", "b": "momentum_buffer"}
_KERAS = {"E[g^2]": "velocity", "E[g]": "average_gradient", "b": "momentum"}
_OPTAX = {"E[g^2]": "nu", "E[g]": "mu", "b": "trace"}


def paths(tree: optax.Params) -> dict[str, tuple[int, ...]]:
    """The path of each leaf, as `names` has it, and the leaf's shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import interop
      >>> interop.paths({"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}})
      {'fc/bias': (2,), 'fc/kernel': (3, 2)}
    """
    return {_path(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def weights(tensors: Tensors, params: optax.Params, names: Names) -> optax.Params:
    """Parameters from another framework's: `params` with every leaf replaced.

    Args:
      tensors: arrays of NumPy, PyTorch or Keras by their name, such as ``model.state_dict()``, or the path
        of a safetensors file; names that `names` lacks are left out.
      params: the tree to fill; dtypes and shardings are its leaves'.
      names: from their names to paths in `params`, see the module.

    Returns:
      A tree as `params`.

    Raises:
      ValueError: listing every name that is missing and every shape that does not fit.
    """
    loaded = _loaded(tensors)
    shapes = paths(params)
    arrays = _matched(
        {("tensor", path): shape for path, shape in shapes.items()},
        shapes,
        names,
        lambda name, what: loaded.get(name),
        {"tensor": "tensor"},
    )
    return jax.tree_util.tree_map_with_path(lambda path, p: _placed(arrays["tensor", _path(path)], p), params)


def from_torch(
    optimizer_state: Tensors,
    state: optax.OptState,
    params: optax.Params,
    names: Names,
    *,
    order: Sequence[str] | None = None,
    learning_rate: float | None = None,
    lr_in_momentum: bool | None = None,
) -> optax.OptState:
    """The state of `torch.optim.RMSprop`, or of timm's or Stable-Baselines3's, as this package's.

    Args:
      optimizer_state: ``optimizer.state_dict()``, or its flat form, ``{"state.fc.weight.square_avg": ...}``
        as `torch.distributed.checkpoint` has it, or the path of a safetensors file in that form.
      state: what ``init`` returns for the optimizer that goes on, such as `conventions.torch`'s.
      params: the parameters.
      names: from PyTorch's parameter names to paths in `params`, see the module. Parameters that it leaves
        out stay behind.
      order: the names of the parameters that PyTorch's optimizer was given, in its order, by which its state
        counts them: ``[name for name, _ in model.named_parameters()]``. Not needed where the state has the
        names itself (the flat form, or an optimizer that was built from ``named_parameters()``).
      learning_rate: the one that PyTorch's next step would take; by default ``param_groups``'. Only used
        where one of the two momentum buffers has it in and the other has not.
      lr_in_momentum: whether the learning rate is in the buffer of the optimizer that goes on, the argument
        of :func:`rmsprop_jax.rmsprop`; by default as in PyTorch's, where only timm's has it in.

    Returns:
      A state as `state`. Its `nu` is a variance where it is centred, at least 0.

    Raises:
      ValueError: listing every name that is missing and every shape that does not fit.
    """
    entries = _torch_entries(_loaded(optimizer_state), order)

    def lookup(name, what):
        entry = entries.get(name, {})
        array = entry.get(_TORCH[what])
        if what != "b" or array is None:
            return array
        return _numpy(array) * _torch_buffer(entry, learning_rate, lr_in_momentum)

    count = max((int(e["step"]) for name, e in entries.items() if name in names and "step" in e), default=0)
    return _carried(state, params, names, lookup, _TORCH, count)


def to_torch(
    state: optax.OptState,
    optimizer_state: Mapping[str, Any],
    params: optax.Params,
    names: Names,
    *,
    order: Sequence[str] | None = None,
    learning_rate: float | None = None,
    lr_in_momentum: bool | None = None,
) -> dict[str, Any]:
    """This package's state as that of `torch.optim.RMSprop`, for ``optimizer.load_state_dict``.

    Args:
      state: this package's, inside any chain.
      optimizer_state: ``optimizer.state_dict()`` of the optimizer that goes on, which may be new.
      params: the parameters.
      names: as for :func:`from_torch`.
      order: as for :func:`from_torch`.
      learning_rate: as for :func:`from_torch`, of the next step.
      lr_in_momentum: whether the learning rate is in the buffer in `state`.

    Returns:
      A new dictionary as `optimizer_state`, with PyTorch's tensors in place of the parameters' states.

    Raises:
      ValueError: listing every name that is missing.
    """
    import torch

    if "param_groups" not in optimizer_state:
        raise ValueError("Invalid optimizer_state: it has no param_groups, expected optimizer.state_dict().")
    entries = _torch_entries(optimizer_state, order)
    arrays, count = _named(state, params, names, entries)
    new: dict[str, dict[str, Any]] = {}
    for (what, name), array in arrays.items():
        if what == "b":
            array = array / _torch_buffer(entries[name], learning_rate, lr_in_momentum)
        entry = new.setdefault(name, {"step": torch.tensor(float(count))})
        entry[_TORCH[what]] = torch.from_numpy(np.array(array))
    indexed = {entries[name]["index"]: entry for name, entry in new.items()}
    return {**optimizer_state, "state": {**optimizer_state["state"], **indexed}}


def from_keras(
    variables: Tensors,
    state: optax.OptState,
    params: optax.Params,
    names: Names,
    *,
    learning_rate: float | None = None,
    lr_in_momentum: bool = True,
) -> optax.OptState:
    """The state of `keras.optimizers.RMSprop` (Keras 3) as this package's.

    Args:
      variables: the optimizer's, ``{v.path: v.numpy() for v in optimizer.variables}``, or the path of a
        safetensors file with those names.
      state: what ``init`` returns for the optimizer that goes on, such as `conventions.keras`'s.
      params: the parameters.
      names: from the paths of the model's variables, such as "sequential/dense/kernel", to paths in `params`.
      learning_rate: the one that Keras's next step would take; by default its variable's. Only used for
        ``lr_in_momentum=False``.
      lr_in_momentum: whether the learning rate is in the buffer of the optimizer that goes on, as in Keras's.

    Returns:
      A state as `state`. Its `nu` is a variance where it is centred, at least 0.

    Raises:
      ValueError: listing every name that is missing and every shape that does not fit.
    """
    ends = _keras_ends(_loaded(variables))

    def lookup(name, what):
        array = ends.get(_keras_end(name, what), (None, None))[1]
        if what != "b" or array is None:
            return array
        return _numpy(array) * _keras_buffer(ends, learning_rate, lr_in_momentum)

    count = int(ends["iteration"][1]) if "iteration" in ends else 0
    return _carried(state, params, names, lookup, _KERAS, count)


def to_keras(
    state: optax.OptState,
    variables: Mapping[str, Any],
    params: optax.Params,
    names: Names,
    *,
    learning_rate: float | None = None,
    lr_in_momentum: bool = True,
) -> dict[str, Any]:
    """This package's state as the variables of `keras.optimizers.RMSprop` (Keras 3).

    Args:
      state: this package's, inside any chain.
      variables: ``{v.path: v.numpy() for v in optimizer.variables}`` of the optimizer that goes on, built.
      params: the parameters.
      names: as for :func:`from_keras`.
      learning_rate: as for :func:`from_keras`, of the next step.
      lr_in_momentum: whether the learning rate is in the buffer in `state`.

    Returns:
      A new dictionary as `variables`, with NumPy arrays in place of the accumulators and the iteration, to be
      assigned: ``for v in optimizer.variables: v.assign(new[v.path])``.

    Raises:
      ValueError: listing every name that is missing.
    """
    ends = _keras_ends(variables)
    known = {name for name in names if _keras_end(name, "E[g^2]") in ends}
    arrays, count = _named(state, params, names, known)
    new = {**variables, **({ends["iteration"][0]: np.asarray(count)} if "iteration" in ends else {})}
    problems = []
    for (what, name), array in arrays.items():
        if what == "b":
            array = array / _keras_buffer(ends, learning_rate, lr_in_momentum)
        key, old = ends.get(_keras_end(name, what), (None, None))
        if key is None or np.shape(old) != array.shape:
            problems.append(f"{name!r} has no {_KERAS[what]} of shape {array.shape}.")
        else:
            new[key] = array
    _raise_if(problems)
    return new


def from_optax(
    optax_state: optax.OptState, state: optax.OptState, *, count: int | None = None
) -> optax.OptState:
    """The state of `optax.rmsprop` as this package's; the parameters' tree is the same.

    Args:
      optax_state: a state of Optax's RMSProp, inside any chain.
      state: what ``init`` returns for the optimizer that goes on. Its momentum buffer is Optax's as it is, so
        both have the learning rate in it, or neither.
      count: number of updates so far. By default Optax's: it counts them where there is a schedule or bias
        correction, else this is 0.

    Returns:
      A state as `state`.

    Raises:
      ValueError: listing every path where the two do not have the same accumulators, of the same shapes.
    """
    arrays, counted = _moments(optax_state)
    return _carried_over(state, arrays, counted if count is None else count)


def to_optax(state: optax.OptState, optax_state: optax.OptState) -> optax.OptState:
    """This package's state as that of `optax.rmsprop`; the parameters' tree is the same.

    Args:
      state: this package's, inside any chain.
      optax_state: what ``init`` returns for the optimizer that goes on.

    Returns:
      A state as `optax_state`.

    Raises:
      ValueError: as :func:`from_optax`.
    """
    return _carried_over(optax_state, *_moments(state))


# PyTorch: {"state": {index: {"square_avg": ...}}, "param_groups": [{"params": [index, ...], "lr": ...}]}


def _torch_entries(optimizer_state, order):
    """Each parameter's state by its name, with its group's lr and lr_in_momentum and its index."""
    if "param_groups" not in optimizer_state:
        entries: dict[str, dict[str, Any]] = {}
        for key, value in optimizer_state.items():
            kind, _, rest = key.partition(".")
            name, _, what = rest.rpartition(".")
            if kind in ("state", "param_groups") and name:
                entries.setdefault(name, {})[what] = value
        return entries

    groups = optimizer_state["param_groups"]
    if order is None and all("param_names" in group for group in groups):
        order = [name for group in groups for name in group["param_names"]]
    if order is None:
        raise ValueError(
            "PyTorch's state counts its parameters and does not name them: "
            "pass order=[name for name, _ in model.named_parameters()]."
        )
    placed = [(index, group) for group in groups for index in group["params"]]
    if len(placed) != len(order):
        raise ValueError(f"order has {len(order)} names, PyTorch's optimizer {len(placed)} parameters.")
    return {
        name: {
            **optimizer_state["state"].get(index, {}),
            "index": index,
            "lr": group["lr"],
            "lr_in_momentum": group.get("lr_in_momentum", False),
        }
        for name, (index, group) in zip(order, placed, strict=True)
    }


def _torch_buffer(entry, learning_rate, ours_has_it):
    theirs_has_it = bool(entry.get("lr_in_momentum", False))
    learning_rate = entry.get("lr") if learning_rate is None else learning_rate
    return _buffer(theirs_has_it, theirs_has_it if ours_has_it is None else ours_has_it, learning_rate)


# Keras: {"rmsprop/sequential_dense_kernel_velocity": ..., "rmsprop/iteration": ...}


def _keras_ends(variables):
    """Each variable's path and value by the last part of its path."""
    return {path.rpartition("/")[2]: (path, value) for path, value in variables.items()}


def _keras_end(name, what):
    return f"{name.replace('/', '_')}_{_KERAS[what]}"


def _keras_buffer(ends, learning_rate, ours_has_it):
    if learning_rate is None and "learning_rate" in ends:
        learning_rate = ends["learning_rate"][1]
    return _buffer(True, ours_has_it, learning_rate)


def _buffer(theirs_has_it, ours_has_it, learning_rate):
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


# This package's states and Optax's: the moments out of them, and into them.


def _moments(state):
    """The moments and momentum buffers, {(what, path): array}, and the number of updates so far."""
    state = accumulators.convert(state, "float32")
    arrays = {key: _numpy(x) for key, x in _accumulators(state).items()}
    if not any(what == "E[g^2]" for what, _ in arrays):
        raise ValueError("The state has no RMSProp in it.")
    for node in _nodes(state):
        if isinstance(node, ScaleByRmsState) and node.mu is not None:  # whose nu is the variance
            for path in paths(node.nu):
                nu = arrays["E[g^2]", path]
                arrays["E[g^2]", path] = (nu + _abs_sq(arrays["E[g]", path])).astype(nu.dtype)
    counts = [int(node.count) for node in _nodes(state) if "count" in getattr(node, "_fields", ())]
    return arrays, max(counts, default=0)


def _accumulators(state):
    """The leaves of all moments and momentum buffers, {(what, path): leaf}."""
    leaves = {}
    for node in _nodes(state):
        if _is_rms(node):
            trees = {"E[g^2]": node.nu, "E[g]": getattr(node, "mu", None)}
        else:
            trees = {"b": node.trace} if isinstance(node, optax.TraceState) else {}
        for what, tree in trees.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                leaves[what, _path(path)] = leaf
    return leaves


def _nodes(state):
    for node in jax.tree.leaves(state, is_leaf=_is_node):
        yield node
        if _is_counter(node):
            yield from _nodes([value for name, value in node._asdict().items() if name != "count"])


def _with_moments(state, arrays, count):
    """`state` with its moments and momentum buffers from `arrays`, and every count from `count`."""
    filled = _with_moments_in_float32(accumulators.convert(state, "float32"), arrays, count)
    kept = {
        leaf.dtype.name
        for node in _nodes(state)
        if isinstance(node, ScaleByRmsState)
        for leaf in jax.tree.leaves(node.nu)
    }
    return accumulators.convert(filled, kept.pop()) if kept in ({"bfloat16"}, {"uint8"}) else filled


def _with_moments_in_float32(state, arrays, count):

    def filled(what, tree):
        return jax.tree_util.tree_map_with_path(lambda path, x: _placed(arrays[what, _path(path)], x), tree)

    def variance(path, nu):
        path = _path(path)  # the other framework's rounding may have left the difference below 0
        return _placed(np.maximum(arrays["E[g^2]", path] - _abs_sq(arrays["E[g]", path]), 0), nu)

    def new(node):
        if isinstance(node, optax.TraceState):
            return node._replace(trace=filled("b", node.trace))
        if "count" in getattr(node, "_fields", ()):
            node = node._replace(count=_placed(np.asarray(count), node.count))
        if _is_counter(node):
            inner = {name: value for name, value in node._asdict().items() if name != "count"}
            return node._replace(**_with_moments_in_float32(inner, arrays, count))
        if not _is_rms(node):
            return node
        if getattr(node, "mu", None) is None:
            return node._replace(nu=filled("E[g^2]", node.nu))
        if isinstance(node, ScaleByRmsState):
            nu = jax.tree_util.tree_map_with_path(variance, node.nu)
        else:
            nu = filled("E[g^2]", node.nu)
        return node._replace(nu=nu, mu=filled("E[g]", node.mu))

    return jax.tree.map(new, state, is_leaf=_is_node)


def _is_node(x):
    return _is_rms(x) or isinstance(x, optax.TraceState) or _is_counter(x)


def _is_rms(x):
    """Whether `x` is a state of this package's RMSProp or of one of Optax's four, two of which it exports."""
    name = type(x).__name__
    return isinstance(x, ScaleByRmsState) or name in (
        *("ScaleByRmsState", "ScaleByRmsWithCountState"),
        *("ScaleByRStdDevState", "ScaleByRStdDevWithCountState"),
    )


def _is_counter(x):
    """Whether `x` counts updates, as a schedule's state or that of `optax.inject_hyperparams` does."""
    return "count" in getattr(x, "_fields", ()) and "nu" not in x._fields


# Names, paths and shapes.


def _carried(state, params, names, lookup, labels, count):
    """`state` with what `lookup(name, what)` finds under the other framework's names."""
    needed = {key: leaf.shape for key, leaf in _accumulators(state).items()}
    return _with_moments(state, _matched(needed, paths(params), names, lookup, labels), count)


def _carried_over(state, arrays, count):
    """`state` with the arrays, which have its paths for names."""
    needed = {key: leaf.shape for key, leaf in _accumulators(state).items()}
    shapes = {path: shape for (_, path), shape in needed.items()}
    names = {path: path for path in shapes}
    found = _matched(needed, shapes, names, lambda name, what: arrays.get((what, name)), _OPTAX)
    return _with_moments(state, found, count)


def _matched(needed, shapes, names, lookup, labels):
    """The arrays that are needed, {(what, path): shape}, by the names that `names` gives to their paths."""
    by_path, problems = _by_paths(names, shapes)
    problems += [f"{path!r} has no name in `names`." for path in _unique(needed) if path not in by_path]
    found = {}
    for path, (name, axes) in by_path.items():
        for what, label in labels.items():
            array = lookup(name, what)
            if (what, path) not in needed:
                if array is not None and (next(iter(labels)), path) in needed:
                    problems.append(f"{name!r} has {_a(label)}, for which this optimizer has no place.")
            elif array is None:
                problems.append(f"{name!r} has no {label}, which {path!r} needs.")
            elif (problem := _misfit(array := _numpy(array), axes, needed[what, path], what)) is not None:
                problems.append(f"{name!r} has {_a(label)} {problem}, which {path!r} needs.")
            else:
                found[what, path] = array if axes is None else array.transpose(axes)
    _raise_if(problems)
    return found


def _named(state, params, names, known):
    """The moments in `state` by the other framework's names, laid out as there, and the count."""
    arrays, count = _moments(state)
    by_path, problems = _by_paths(names, paths(params))
    problems += [f"{path!r} has no name in `names`." for path in _unique(arrays) if path not in by_path]
    problems += [
        f"{name!r} is not among the other optimizer's parameters." for name in names if name not in known
    ]
    _raise_if(problems)
    named = {}
    for (what, path), array in arrays.items():
        name, axes = by_path[path]
        named[what, name] = array if axes is None else array.transpose(np.argsort(axes))
    return named, count


def _by_paths(names, shapes):
    """{path: (name, axes)}, and what is wrong with `names`."""
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
    return by_path, problems


def _misfit(array, axes, shape, what):
    if what == "E[g^2]" and np.iscomplexobj(array):
        return "of complex numbers (two reals there), not of real ones"
    if axes is not None and array.ndim == len(axes):
        expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    else:
        expected = tuple(shape)
    return None if array.shape == expected else f"of shape {array.shape}, not {expected}"


def _raise_if(problems):
    if problems:
        raise ValueError("\n  ".join(["The states do not fit:", *problems]))


def _unique(keys):
    return dict.fromkeys(path for _, path in keys)


def _a(label):
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def _path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


# Arrays.


def _abs_sq(x):
    return np.square(np.abs(x), dtype=np.float64)


def _numpy(x):
    """A NumPy array of float32 at least, of an array of NumPy, JAX, PyTorch or Keras."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() and x.element_size() < 4 else x
    x = np.asarray(x)
    return x if x.dtype.kind in "fc" and x.dtype.itemsize >= 4 else x.astype(np.float32)


def _placed(x, old):
    """`x` as a JAX array with the dtype and the sharding of `old`."""
    x = np.asarray(x).astype(old.dtype)
    return jax.device_put(x, old.sharding) if getattr(old, "committed", False) else jnp.asarray(x)


def _loaded(tensors: Tensors) -> Mapping[str, Any]:
    """The dictionary itself, or the contents of a safetensors file."""
    if isinstance(tensors, Mapping):
        return tensors
    if not str(tensors).endswith(".safetensors"):
        raise ValueError(
            f"Invalid file: {str(tensors)!r}, expected a dictionary of arrays or a .safetensors file."
        )
    from safetensors.numpy import load_file

    return load_file(tensors)
