"""The state of PyTorch's optimizers, by position or by name.

{"state": {index: {"square_avg": ...}}, "param_groups": [{"params": [index, ...], "lr": ...}]}
{"state.fc.weight.square_avg": ..., "param_groups.fc.weight.lr": ...}
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax

from rmsprop_jax.interop._moments import buffer_factor, carried, named
from rmsprop_jax.interop._names import Names, Tensors, as_numpy, load

_LABELS = {"E[g^2]": "square_avg", "E[g]": "grad_avg", "b": "momentum_buffer"}


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
      state: what ``init`` returns for the target optimizer, such as `conventions.torch`'s.
      params: the parameters.
      names: from PyTorch's parameter names to paths in `params`, see the module. Parameters it does not list
        are not transferred.
      order: the names of the parameters that PyTorch's optimizer was given, in its order, by which its state
        counts them: ``[name for name, _ in model.named_parameters()]``. Not needed where the state has the
        names itself (the flat form, or an optimizer that was built from ``named_parameters()``).
      learning_rate: the one that PyTorch's next step would take; by default ``param_groups``'. Only used
        where one of the two momentum buffers has it in and the other has not.
      lr_in_momentum: whether the learning rate is in the buffer of the target optimizer, the argument
        of :func:`rmsprop_jax.rmsprop`; by default as in PyTorch's, where only timm's has it in.

    Returns:
      A state as `state`. Its `nu` is a variance where it is centred, at least 0.

    Raises:
      ValueError: listing every name that is missing and every shape that does not fit.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from rmsprop_jax import conventions, interop
      >>> theirs = {  # as optimizer.state_dict() of PyTorch's
      ...     "state": {0: {"step": np.array(7.0), "square_avg": np.array([[1.0, 2.0, 3.0]])}},
      ...     "param_groups": [{"lr": 0.01, "params": [0]}],
      ... }
      >>> params = {"kernel": jnp.zeros((3, 1))}
      >>> state = conventions.torch(lr=0.01).init(params)
      >>> names = {"fc.weight": ("kernel", (1, 0))}
      >>> state = interop.from_torch(theirs, state, params, names, order=["fc.weight"])
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "nu")["kernel"].T)
      7 [[1. 2. 3.]]
    """
    entries = _entries(load(optimizer_state), order)

    def lookup(name, what):
        entry = entries.get(name, {})
        array = entry.get(_LABELS[what])
        if what != "b" or array is None:
            return array
        return as_numpy(array) * _buffer(entry, learning_rate, lr_in_momentum)

    count = max((int(e["step"]) for name, e in entries.items() if name in names and "step" in e), default=0)
    return carried(state, params, names, lookup, _LABELS, count)


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
      optimizer_state: ``optimizer.state_dict()`` of the target optimizer, which may be new.
      params: the parameters.
      names: as for :func:`from_torch`.
      order: as for :func:`from_torch`.
      learning_rate: as for :func:`from_torch`, of the next step.
      lr_in_momentum: whether the learning rate is in the buffer in `state`.

    Returns:
      A new dictionary as `optimizer_state`, with PyTorch's tensors in place of the parameters' states:
      float32, or float64 where `state` is.

    Raises:
      ValueError: listing every name that is missing.
    """
    import torch

    if "param_groups" not in optimizer_state:
        raise ValueError("Invalid optimizer_state: it has no param_groups, expected optimizer.state_dict().")
    entries = _entries(optimizer_state, order)
    arrays, count = named(state, params, names, entries)
    new: dict[str, dict[str, Any]] = {}
    for (what, name), array in arrays.items():
        if what == "b":
            array = array / _buffer(entries[name], learning_rate, lr_in_momentum)
        entry = new.setdefault(name, {"step": torch.tensor(float(count))})
        entry[_LABELS[what]] = torch.from_numpy(np.array(array))
    indexed = {entries[name]["index"]: entry for name, entry in new.items()}
    return {**optimizer_state, "state": {**optimizer_state["state"], **indexed}}


def _entries(optimizer_state, order):
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


def _buffer(entry, learning_rate, ours_has_it):
    theirs_has_it = bool(entry.get("lr_in_momentum", False))
    learning_rate = entry.get("lr") if learning_rate is None else learning_rate
    return buffer_factor(theirs_has_it, theirs_has_it if ours_has_it is None else ours_has_it, learning_rate)
