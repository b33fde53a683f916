"""An optimizer built from what another framework's says of itself, and filled with its state."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import conventions
from rmsprop_jax._tree import Tree, leaf_name
from rmsprop_jax.interop._checkpoints import entries_of, stepped
from rmsprop_jax.interop._files import Tensors, is_keras_file, keras_config, load
from rmsprop_jax.interop._keras import from_keras
from rmsprop_jax.interop._names import Names, finder, paths
from rmsprop_jax.interop._report import Reporter
from rmsprop_jax.interop._torch import from_torch
from rmsprop_jax.interop._variables import rmsprop_config, variables_of

_NEEDED = ("lr", "alpha", "eps", "momentum", "centered", "weight_decay")
# How PyTorch computes it, and what its schedulers note down: no part of the rule.
_TORCH_ONLY = ("foreach", "capturable", "differentiable", "fused")
_NOTES = ("initial_lr", "max_lr", "min_lr", "swa_lr", "name", "lr_scale", "max_lr_snapshot")
_KERAS_ONLY = ("name", "use_ema", "ema_momentum", "loss_scale_factor", "jit_compile")


def resume_torch(
    checkpoint: Tensors,
    params: Tree,
    names: Names,
    *,
    order: Sequence[str] | None = None,
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
      names: as for :func:`from_torch`.
      order: as for :func:`from_torch`, group after group.
      learning_rate: in place of the groups' `lr`: a number or a schedule, which a state dict does not hold,
        or a sequence of them, one for each group. A schedule goes on at the count that is carried over.
      convention: whose RMSProp it was, such as `conventions.torch`. By default as the keys of the groups say:
        timm's has ``decoupled_decay``, PyTorch's ``foreach``; Stable-Baselines3's has neither, and PyTorch's
        before 1.12 had neither, so that these two have to be named.
      new_group: the number of the group whose hyper-parameters are taken for parameters that the checkpoint
        does not have; needed where ``strict=False`` leaves some and groups differ.
      ignore: keys of the groups to be ignored. The package does so with what PyTorch has for its own
        computation and its schedulers: ``foreach``, ``capturable``, ``fused``, ``initial_lr``, ...
      count: as for :func:`from_torch`.
      strict: as for :func:`from_torch`.
      report: as for :func:`from_torch`.

    Returns:
      The transformation, an :func:`optax.partition` where groups differ, and its state. Complex parameters
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
    """
    loaded = load(checkpoint)
    entries = entries_of(loaded, order)
    stepped(entries)  # refuses what is no RMSProp's
    find = finder(entries)
    number_of = {}
    for name, target in names.items():
        if (source := find(name)) is not None:
            number_of[target if isinstance(target, str) else target[0]] = entries[source].number
    groups = {entry.number: entry.group for entry in entries.values()}
    rates = _rates(learning_rate, len(groups))
    used = sorted({number_of[path] for path in paths(params) if path in number_of} or groups)
    if new_group is not None and new_group not in groups:
        raise ValueError(f"Invalid {new_group=}: the checkpoint has the groups {sorted(groups)}.")
    used = sorted({*used, *([] if new_group is None else [new_group])})
    built = {n: _settings(n, groups[n], rates[n], convention, ignore) for n in used}
    kinds: list[tuple[Any, dict[str, Any]]] = []
    for setting in built.values():
        if setting not in kinds:
            kinds.append(setting)
    label_of = {n: f"group {kinds.index(setting)}" for n, setting in built.items()}
    is_complex = any(jnp.iscomplexobj(x) for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    wrap = optax.contrib.split_real_and_imaginary if is_complex else lambda tx: tx
    parts = {f"group {i}": wrap(function(**settings)) for i, (function, settings) in enumerate(kinds)}
    if len(parts) == 1:
        tx = parts["group 0"]
    else:
        new = [path for path in paths(params) if path not in number_of]
        if new and new_group is None and not strict:
            raise ValueError(
                f"The checkpoint has no {', '.join(map(repr, new))}, and its groups {used} differ: "
                "pass new_group=, the number of the one whose hyper-parameters these take."
            )
        default = used[0] if new_group is None else new_group  # if strict, from_torch lists what is missing

        def label(path, _):
            return label_of[number_of.get(leaf_name(path), default)]

        tx = optax.partition(parts, jax.tree_util.tree_map_with_path(label, params))
    state = from_torch(
        loaded, tx.init(params), params, names, order=order, count=count, strict=strict, report=report
    )
    return tx, state


def resume_keras(
    variables: Tensors,
    params: Tree,
    names: Names,
    *,
    config: Mapping[str, Any] | None = None,
    order: Sequence[str] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    count: int | None = None,
    strict: bool = True,
    report: Reporter | None = None,
) -> tuple[optax.GradientTransformation, Tree]:
    """The optimizer of a Keras run and its state: what :func:`from_keras` does, and its hyper-parameters.

    Args:
      variables: as for :func:`from_keras`.
      params: the parameters.
      names: as for :func:`from_keras`.
      config: ``optimizer.get_config()``, also a `LossScaleOptimizer`'s; by default what the `.keras` or `.h5`
        file says. It does not hold what ``exclude_from_weight_decay`` was told.
      order: as for :func:`from_keras`.
      learning_rate: a number or a schedule; by default the variable's value, or the configuration's number.
        To be given where Keras had a schedule. One goes on at the count that is carried over.
      count: as for :func:`from_keras`.
      strict: as for :func:`from_keras`.
      report: as for :func:`from_keras`.

    Returns:
      `conventions.keras` and its state.

    Raises:
      ValueError: as :func:`from_keras`, and naming every part of the configuration that has no counterpart.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from rmsprop_jax import interop
      >>> config = {"learning_rate": 0.01, "rho": 0.95, "momentum": 0.0, "epsilon": 1e-7, "centered": False}
      >>> theirs = {"rmsprop/iteration": np.array(7), "rmsprop/dense_bias_velocity": np.array([1.0, 2.0])}
      >>> params = {"bias": jnp.zeros(2)}
      >>> tx, state = interop.resume_keras(theirs, params, {"dense/bias": "bias"}, config=config)
      >>> print(tx.settings.decay, optax.tree.get(state, "count"))
      0.95 7
    """
    if config is None and is_keras_file(variables):
        config = keras_config(variables)  # type: ignore[arg-type]
    own = rmsprop_config(config)
    if own is None:
        raise ValueError("The optimizer's configuration is not in it: pass config=optimizer.get_config().")
    loaded = load(variables)
    known = inspect.signature(conventions.keras).parameters
    settings = {
        key: _plain(key, value) for key, value in own.items() if key in known and key != "learning_rate"
    }
    passed = {*known, *_KERAS_ONLY, *([] if own.get("use_ema") else ["ema_overwrite_frequency"])}
    passed |= {"gradient_accumulation_steps"} if own.get("gradient_accumulation_steps") == 1 else set()
    unknown = [
        f"{key}={value!r:.60}"
        for key, value in own.items()
        if key not in passed and value is not None and value is not False
    ]
    if unknown:
        raise ValueError(f"Invalid config: {', '.join(unknown)} has no counterpart in conventions.keras.")
    if learning_rate is None:
        learning_rate = _keras_rate(loaded, own, order)
    tx = conventions.keras(learning_rate, **settings)
    state = from_keras(
        loaded,
        tx.init(params),
        params,
        names,
        order=order,
        config=own,
        count=count,
        strict=strict,
        report=report,
    )
    return tx, state


def _rates(learning_rate, groups):
    if not isinstance(learning_rate, list | tuple):
        return [learning_rate] * groups
    if len(learning_rate) != groups:
        raise ValueError(
            f"Invalid learning_rate: {len(learning_rate)} of them, the checkpoint has {groups} groups."
        )
    return learning_rate


def _settings(number, group, learning_rate, convention, ignore):
    """What builds a group's optimizer: the function, and its arguments."""
    function = convention or _convention(group)
    known = inspect.signature(function).parameters
    if missing := [key for key in _NEEDED if key in known and key not in group]:
        raise ValueError(f"Group {number} of the checkpoint has no {', '.join(map(repr, missing))}.")
    settings = {key: _plain(key, value) for key, value in group.items() if key in known and key not in _NOTES}
    if "max_lr" in known and group.get("max_lr_snapshot") is not None:
        settings["max_lr"] = _plain("max_lr_snapshot", group["max_lr_snapshot"])
    if learning_rate is not None:
        settings["lr"] = learning_rate
    scaled = learning_rate is not None and group.get("lr_scale", 1) != 1
    passed = {*known, *_TORCH_ONLY, *_NOTES, *ignore} - ({"lr_scale"} - {*ignore} if scaled else set())
    unknown = [
        key for key, value in group.items() if key not in passed and value is not None and value is not False
    ]
    if unknown:
        found = ", ".join(f"{key}={group[key]!r:.60}" for key in unknown)
        raise ValueError(
            f"Group {number} of the checkpoint has {found}, without counterpart in "
            f"conventions.{function.__name__}: ignore={unknown} passes over it."
        )
    return function, settings


def _convention(group):
    if not {"decoupled_decay", "lr_in_momentum"}.isdisjoint(group):
        return conventions.timm
    if not {"foreach", "maximize", "capturable", "differentiable"}.isdisjoint(group):
        return conventions.torch
    raise ValueError(
        "The groups' keys are those of Stable-Baselines3's RMSpropTFLike and of PyTorch's RMSprop before "
        "1.12, which differ: pass convention=conventions.stable_baselines3 or convention=conventions.torch."
    )


def _plain(name, value):
    """A Python number, flag or None, also out of an array of one."""
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        value = value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise ValueError(f"Invalid {name}: {value!r:.60}, expected a number.") from None
    return bool(value) if name in ("centered", "maximize") else value


def _keras_rate(arrays, config, order):
    key = variables_of(arrays, order, config).learning_rate
    rate = config.get("learning_rate") if key is None else np.asarray(arrays[key])
    if isinstance(rate, Mapping) or rate is None:
        found = f"the schedule {rate.get('class_name')}" if rate else "nowhere"
        raise ValueError(f"Keras' learning rate is {found}: pass learning_rate=, a number or a schedule.")
    return _plain("learning_rate", rate)
