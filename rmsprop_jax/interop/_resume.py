"""An optimizer built from what another framework's says of itself, and filled with its state."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import conventions
from rmsprop_jax._tree import Tree, leaf_name
from rmsprop_jax.interop._arrays import as_numpy
from rmsprop_jax.interop._carry import carry
from rmsprop_jax.interop._checkpoints import Order, stepped
from rmsprop_jax.interop._files import Tensors, is_keras_file, keras_config, load
from rmsprop_jax.interop._names import Names, path_of, paths
from rmsprop_jax.interop._report import Reporter
from rmsprop_jax.interop._torch import TorchSource
from rmsprop_jax.interop._variables import KerasSource, rmsprop_config
from rmsprop_jax.optimizer import rmsprop

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
    group_of = _groups(source, params, names, new_group)
    used = {number for number in group_of.values() if number is not None}
    used |= {new_group} if new_group is not None else set()
    settings = _settings(source, used, learning_rate, convention, ignore)
    if new_group is None and not strict:
        _check_new(group_of, settings)
    tx = _partition(group_of, settings, params, new_group)
    return tx, carry(tx.init(params), params, names, source, count=count, strict=strict, report=report)


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
      params: the parameters.
      variables, names, order, count, strict, report: as for :func:`from_keras`.
      config: ``optimizer.get_config()``, also a `LossScaleOptimizer`'s; by default what the `.keras` or `.h5`
        file says. It does not hold what ``exclude_from_weight_decay`` was told.
      learning_rate: a number or a schedule; by default the variable's value, or the configuration's number.
        To be given where Keras had a schedule, or Keras 2 a `decay`. A schedule goes on at the count that is
        carried over.

    Returns:
      `conventions.keras` and its state; for Keras 2's legacy optimizer without momentum, whose epsilon is
      outside the root, :func:`rmsprop_jax.rmsprop`.

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
    source = KerasSource(load(variables), order, own)
    tx = _keras_optimizer(own, learning_rate, source)
    return tx, carry(tx.init(params), params, names, source, count=count, strict=strict, report=report)


# PyTorch.


def _groups(source, params, names, new_group):
    """The number of each parameter's group, None for one that the checkpoint does not have, by path."""
    numbers = {entry.number for entry in source.names.values()}
    if new_group is not None and new_group not in numbers:
        raise ValueError(f"Invalid {new_group=}: the checkpoint has the groups {sorted(numbers)}.")
    keys = {path_of(target): source.find(name) for name, target in names.items()}
    return {
        path: source.names[key].number if (key := keys.get(path)) is not None else None
        for path in paths(params)
    }


def _settings(source, used, learning_rate, convention, ignore):
    """What builds the optimizer of each group that is used: the function, and its arguments."""
    groups = {entry.number: entry.group for entry in source.names.values()}
    rates = learning_rate if isinstance(learning_rate, list | tuple) else [learning_rate] * len(groups)
    if len(rates) != len(groups):
        raise ValueError(
            f"Invalid learning_rate: {len(rates)} of them, the checkpoint has {len(groups)} groups."
        )
    settings = {}
    for number in sorted(used or groups):
        group, rate = groups[number], rates[number]
        function = convention or _convention(group)
        known = inspect.signature(function).parameters
        if missing := [key for key in _NEEDED if key in known and key not in group]:
            raise ValueError(f"Group {number} of the checkpoint has no {', '.join(map(repr, missing))}.")
        is_scaled = rate is not None and group.get("lr_scale", 1) != 1
        passed = {*known, *_TORCH_ONLY, *_NOTES} - ({"lr_scale"} if is_scaled else set()) | {*ignore}
        if unknown := _told(group, passed):
            raise ValueError(
                f"Group {number} of the checkpoint has {_listed(group, unknown)}, without counterpart in "
                f"conventions.{function.__name__}: ignore={unknown} passes over it."
            )
        arguments = {key: _plain(key, x) for key, x in group.items() if key in known and key not in _NOTES}
        if "max_lr" in known and group.get("max_lr_snapshot") is not None:
            arguments["max_lr"] = _plain("max_lr_snapshot", group["max_lr_snapshot"])
        settings[number] = function, arguments | ({} if rate is None else {"lr": rate})
    return settings


def _told(settings, passed):
    """The settings that say something, but for those that are passed over."""
    return [key for key, x in settings.items() if key not in passed and x is not None and x is not False]


def _listed(settings, keys):
    return ", ".join(f"{key}={settings[key]!r:.60}" for key in keys)


def _check_new(group_of, settings):
    new = [path for path, number in group_of.items() if number is None]
    first = next(iter(settings.values()))
    if new and any(one != first for one in settings.values()):
        raise ValueError(
            f"The checkpoint has no {', '.join(map(repr, new))}, and its groups {list(settings)} differ: "
            "pass new_group=, the number of the one whose hyper-parameters these take."
        )


def _partition(group_of, settings, params, new_group):
    """The optimizer of all parameters, with one part for each kind of group and one for new parameters."""
    kinds: list[tuple[Any, dict[str, Any]]] = []
    for one in settings.values():
        if one not in kinds:
            kinds.append(one)
    labels = {number: f"group {kinds.index(one)}" for number, one in settings.items()}
    parts = {f"group {i}": one for i, one in enumerate(kinds)}
    default = "group 0"  # if strict, `carry` lists what is missing
    if new_group is not None and None in group_of.values():
        default, parts["new"] = "new", settings[new_group]
    is_complex = any(jnp.iscomplexobj(x) for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    wrap = optax.contrib.split_real_and_imaginary if is_complex else lambda tx: tx
    built = {label: wrap(function(**arguments)) for label, (function, arguments) in parts.items()}
    if len(built) == 1:
        return built["group 0"]

    def label(path, _):
        return labels.get(group_of.get(leaf_name(path)), default)

    return optax.partition(built, jax.tree_util.tree_map_with_path(label, params))


def _convention(group):
    if not {"decoupled_decay", "lr_in_momentum"}.isdisjoint(group):
        return conventions.timm
    if not {"foreach", "maximize", "capturable", "differentiable"}.isdisjoint(group):
        return conventions.torch
    raise ValueError(
        "The groups' keys are those of Stable-Baselines3's RMSpropTFLike and of PyTorch's RMSprop before "
        "1.12, which differ: pass convention=conventions.stable_baselines3 or convention=conventions.torch."
    )


# Keras.


def _keras_optimizer(config, learning_rate, source):
    """What a configuration says, with the learning rate of the variables where none is given."""
    is_legacy = "decay" in config
    function = _keras2 if is_legacy and not config.get("momentum") else conventions.keras
    known = inspect.signature(function).parameters
    without_effect = {
        "ema_overwrite_frequency": not config.get("use_ema"),
        "gradient_accumulation_steps": config.get("gradient_accumulation_steps") == 1,
        "decay": not config.get("decay") or learning_rate is not None,
    }
    passed = {*known, *_KERAS_ONLY, *(key for key, is_so in without_effect.items() if is_so)}
    if unknown := _told(config, passed):
        hint = ": decay divides the learning rate by 1 + decay * count, pass such a learning_rate="
        hint = hint if "decay" in unknown else ""
        raise ValueError(
            f"Invalid config: {_listed(config, unknown)} has no counterpart in conventions.keras{hint}."
        )
    if learning_rate is None:
        learning_rate = _keras_rate(source, config)
    names = [key for key in config if key in known and key != "learning_rate"]
    return function(learning_rate, **{key: _plain(key, config[key]) for key in names})


def _keras2(learning_rate, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False):
    """The legacy optimizer of Keras 2, which without momentum has epsilon outside the root."""
    return rmsprop(learning_rate, rho, epsilon, eps_in_sqrt=False, centered=centered)


def _keras_rate(source, config):
    rate = config.get("learning_rate") if source.rate is None else as_numpy(source.rate)
    if isinstance(rate, Mapping) or rate is None:
        found = f"the schedule {rate.get('class_name')}" if rate else "nowhere"
        raise ValueError(f"Keras' learning rate is {found}: pass learning_rate=, a number or a schedule.")
    return _plain("learning_rate", rate)


def _plain(name, value):
    """A Python number, flag or None, also out of an array of one."""
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        value = value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise ValueError(f"Invalid {name}: {value!r:.60}, expected a number.") from None
    return bool(value) if name in ("centered", "maximize") else value
