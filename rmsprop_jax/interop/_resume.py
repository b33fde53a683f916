"""PyTorch's optimizer built anew from what its groups say, and filled with its state."""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import conventions
from rmsprop_jax._tree import Tree, leaf_name
from rmsprop_jax.interop._arrays import plain, unknown_in
from rmsprop_jax.interop._carry import carry
from rmsprop_jax.interop._checkpoints import Order, stepped
from rmsprop_jax.interop._files import Tensors, load
from rmsprop_jax.interop._match import Reporter
from rmsprop_jax.interop._names import Names, path_of, paths
from rmsprop_jax.interop._torch import TorchSource

_NEEDED = ("lr", "alpha", "eps", "momentum", "centered", "weight_decay")
# How PyTorch computes it, and what its schedulers note down: no part of the rule.
_TORCH_ONLY = ("foreach", "capturable", "differentiable", "fused")
_NOTES = ("initial_lr", "max_lr", "min_lr", "swa_lr", "name", "lr_scale", "max_lr_snapshot")


def resume_torch(
    checkpoint: Tensors,
    params: Tree,
    names: Names,
    *,
    order: Order | None = None,
    learning_rate: optax.ScalarOrSchedule | Sequence[optax.ScalarOrSchedule] | None = None,
    convention: Callable[..., optax.GradientTransformation] | None = None,
    new_group: int | None = None,
    ignore: Collection[str] = (),
    count: int | None = None,
    strict: bool = True,
    report: Reporter | None = None,
) -> tuple[optax.GradientTransformation, Tree]:
    """The optimizer of a PyTorch run and its state: what :func:`from_torch` does, and its hyper-parameters.

    Args:
      checkpoint: as for :func:`from_torch`, with the optimizer's `param_groups`.
      params: the parameters.
      names, order, count, strict, report: as for :func:`from_torch`.
      learning_rate: in place of the groups' `lr`: a number or a schedule, which a state dict does not hold,
        or a sequence of them, one for each group. A schedule goes on at the count that is carried over.
      convention: whose RMSProp it was, such as `conventions.torch`. By default as the keys of the groups say:
        timm's has ``decoupled_decay``, PyTorch's ``foreach``; Stable-Baselines3's has neither, and PyTorch's
        before 1.12 had neither, so that these two have to be named.
      new_group: the number of the group whose hyper-parameters are taken for parameters that the checkpoint
        does not have, with ``strict=False``. They are a part of their own, whose counts and schedules start
        at 0; without `new_group` the run's count is theirs too. Needed where groups differ.
      ignore: keys of the groups to be ignored. The package does so with what PyTorch has for its own
        computation and its schedulers: ``foreach``, ``capturable``, ``fused``, ``initial_lr``, ...

    Returns:
      The transformation, an :func:`optax.partition` where there are parts, and its state. Complex parameters
      are two reals in both, by :func:`optax.contrib.split_real_and_imaginary`.

    Raises:
      ValueError: as :func:`from_torch`, and naming every key of the groups that has no counterpart.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from rmsprop_jax import interop
      >>> group = {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "momentum": 0, "centered": False}
      >>> group |= {"weight_decay": 0, "foreach": None, "params": [0], "param_names": ["fc.bias"]}
      >>> checkpoint = {  # as Lightning writes it
      ...     "optimizer_states": [{
      ...         "state": {0: {"step": np.array(7.0), "square_avg": np.array([1.0, 2.0])}},
      ...         "param_groups": [group],
      ...     }]
      ... }
      >>> params = {"bias": jnp.zeros(2)}
      >>> tx, state = interop.resume_torch(checkpoint, params, {"fc.bias": "bias"})
      >>> print(tx.settings.decay, optax.tree.get(state, "count"), optax.tree.get(state, "nu"))
      0.99 7 {'bias': Array([1., 2.], dtype=float32)}

      With a new head, whose learning rate warms up from 0 while that of the rest goes on at 7:

      >>> params = {"bias": jnp.zeros(2), "head": jnp.zeros(3)}
      >>> tx, state = interop.resume_torch(
      ...     checkpoint, params, {"fc.bias": "bias"}, strict=False, new_group=0, report=print,
      ...     learning_rate=optax.linear_schedule(0.0, 0.01, 5),
      ... )
      1 carried over. Kept as init made them: 'head'.
    """
    source = TorchSource(load(checkpoint), order)
    stepped(source.names)  # refuses what is no RMSProp's
    group_of = _groups(source, names, new_group)
    here = paths(params)
    new = [path for path in here if path not in group_of]
    used = {number for path, number in group_of.items() if path in here}
    settings = _settings(source, used | ({new_group} - {None}), learning_rate, convention, ignore)
    if new and new_group is None and not strict:
        _check_alike(new, settings)
    tx = _partition(group_of, settings, params, new_group if new else None)
    return tx, carry(tx.init(params), params, names, source, count=count, strict=strict, report=report)


def _groups(source, names, new_group):
    """The number of each parameter's group, by its path."""
    numbers = {entry.number for entry in source.names.values()}
    if new_group is not None and new_group not in numbers:
        raise ValueError(f"Invalid {new_group=}: the checkpoint has the groups {sorted(numbers)}.")
    keys = {path_of(target): source.find(name) for name, target in names.items()}
    return {path: source.names[key].number for path, key in keys.items() if key is not None}


def _settings(source, used, learning_rate, convention, ignore):
    """What builds the optimizer of each group that is used: the function, and its arguments."""
    groups = {entry.number: entry.group for entry in source.names.values()}
    rates = learning_rate if isinstance(learning_rate, list | tuple) else [learning_rate] * len(groups)
    if len(rates) != len(groups):
        raise ValueError(
            f"Invalid learning_rate: {len(rates)} of them, the checkpoint has {len(groups)} groups."
        )
    return {
        number: _arguments(number, groups[number], rates[number], convention, {*ignore})
        for number in sorted(used or groups)
    }


def _arguments(number, group, rate, convention, ignore):
    """What builds the optimizer of a group: the function, and its arguments."""
    function = convention or _convention(group)
    known = inspect.signature(function).parameters
    is_scaled = rate is not None and group.get("lr_scale", 1) != 1
    passed = {*known, *_TORCH_ONLY, *_NOTES} - ({"lr_scale"} if is_scaled else set()) | ignore
    _check_group(number, group, function, known, passed)
    arguments = {key: plain(key, group[key]) for key in known if key in group and key not in _NOTES}
    if "max_lr" in known and group.get("max_lr_snapshot") is not None:
        arguments["max_lr"] = plain("max_lr_snapshot", group["max_lr_snapshot"])
    return function, arguments | ({} if rate is None else {"lr": rate})


def _check_group(number, group, function, known, passed):
    """Raises ValueError for settings that are missing, or that say something and have no counterpart."""
    if missing := [key for key in _NEEDED if key in known and key not in group]:
        raise ValueError(f"Group {number} of the checkpoint has no {', '.join(map(repr, missing))}.")
    unknown, found = unknown_in(group, passed)
    if unknown:
        raise ValueError(
            f"Group {number} of the checkpoint has {found}, without counterpart in "
            f"conventions.{function.__name__}: ignore={unknown} passes over it."
        )


def _check_alike(new, settings):
    first, *rest = settings.values()
    if any(one != first for one in rest):
        raise ValueError(
            f"The checkpoint has no {', '.join(map(repr, new))}, and its groups {list(settings)} differ: "
            "pass new_group=, the number of the one whose hyper-parameters these take."
        )


def _partition(group_of, settings, params, new_group):
    """The optimizer of all parameters: one part for each kind of group, and one for new parameters."""
    parts: dict[str, tuple[Any, dict[str, Any]]] = {}
    labels = {}
    for number, one in settings.items():
        labels[number] = next((x for x, other in parts.items() if other == one), f"group {len(parts)}")
        parts[labels[number]] = one
    if new_group is not None:
        labels[None], parts["new"] = "new", settings[new_group]
    built = {label: _built(*one, params) for label, one in parts.items()}
    if len(built) == 1:
        return built["group 0"]

    def label(path, _):  # if strict, `carry` lists what is missing
        return labels.get(group_of.get(leaf_name(path)), "group 0")

    return optax.partition(built, jax.tree_util.tree_map_with_path(label, params))


def _built(function, arguments, params):
    is_complex = any(jnp.iscomplexobj(x) for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    tx = function(**arguments)
    return optax.contrib.split_real_and_imaginary(tx) if is_complex else tx


def _convention(group):
    if not {"decoupled_decay", "lr_in_momentum"}.isdisjoint(group):
        return conventions.timm
    if not {"foreach", "maximize", "capturable", "differentiable"}.isdisjoint(group):
        return conventions.torch
    raise ValueError(
        "The groups' keys are those of Stable-Baselines3's RMSpropTFLike and of PyTorch's RMSprop before "
        "1.12, which differ: pass convention=conventions.stable_baselines3 or convention=conventions.torch."
    )
