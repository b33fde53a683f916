"""The variables of Keras's optimizer, see `_variables` for which is which, and the optimizer built anew."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax

from rmsprop_jax import conventions
from rmsprop_jax._tree import Tree
from rmsprop_jax.interop._arrays import as_numpy, plain, unknown_in
from rmsprop_jax.interop._carry import carry, outward
from rmsprop_jax.interop._files import Tensors, keras_config, load
from rmsprop_jax.interop._match import Reporter, raise_if
from rmsprop_jax.interop._names import Names
from rmsprop_jax.interop._variables import KerasSource
from rmsprop_jax.optimizer import rmsprop

_KERAS_ONLY = ("name", "use_ema", "ema_momentum", "loss_scale_factor", "jit_compile")


def from_keras(
    variables: Tensors,
    state: Tree,
    params: Tree,
    names: Names,
    *,
    order: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    learning_rate: float | None = None,
    lr_in_momentum: bool = True,
    count: int | None = None,
    strict: bool = True,
    report: Reporter | None = None,
) -> Tree:
    """The state of `keras.optimizers.RMSprop`, of Keras 3 or 2, or of TensorFlow's, as this package's.

    Args:
      variables: the optimizer's, ``{v.path: v.numpy() for v in optimizer.variables}``, also those of a
        `LossScaleOptimizer` around it; the path of a `.keras` or `.h5` file, or of a safetensors file with
        those names; or a TensorFlow checkpoint's, also of `tf.compat.v1`:
        ``{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}`` of a
        ``reader = tf.train.load_checkpoint(path)``, whose path in a SavedModel is ``variables/variables``.
      state: what ``init`` returns for the target optimizer, such as `conventions.keras`'s.
      params: the parameters.
      names: from the paths of the model's variables, such as "sequential/dense/kernel", to paths in `params`,
        also as a file of Keras 2 ("dense/kernel:0") or a checkpoint ("layer_with_weights-0/kernel") has them.
      order: for a `.keras` or `.weights.h5` file, in which the optimizer's variables have no names:
        ``[v.path for v in model.trainable_variables]``.
      config: for a `.weights.h5` file, which has none: ``optimizer.get_config()``.
      learning_rate: the one that Keras's next step would take; by default its variable's. Only used for
        ``lr_in_momentum=False``.
      lr_in_momentum: whether the learning rate is in the buffer of the target optimizer, as in Keras's.
      count: number of updates so far, where the variables have no `iteration`.
      strict, report: as for :func:`from_torch`.

    Returns:
      A state as `state`. Its `nu` is a variance where it is centred, at least 0.

    Raises:
      ValueError: listing every name that is missing, with the nearest ones, every shape that does not fit
        and every two names that are one path to Keras, which writes "_" for "/"; for the variables of another
        optimizer; for a file that cannot be read.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from rmsprop_jax import conventions, interop
      >>> theirs = {"rmsprop/iteration": np.array(7), "rmsprop/dense_bias_velocity": np.array([1.0, 2.0])}
      >>> params = {"bias": jnp.zeros(2)}
      >>> state = conventions.keras().init(params)
      >>> state = interop.from_keras(theirs, state, params, {"dense/bias": "bias"})
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "nu"))
      7 {'bias': Array([1., 2.], dtype=float32)}
    """
    source = KerasSource(load(variables), order, _config_of(variables, config), learning_rate, lr_in_momentum)
    return carry(state, params, names, source, count=count, strict=strict, report=report)


def to_keras(
    state: Tree,
    variables: Mapping[str, Any],
    params: Tree,
    names: Names,
    *,
    learning_rate: float | None = None,
    lr_in_momentum: bool = True,
) -> dict[str, Any]:
    """This package's state as the variables of `keras.optimizers.RMSprop` (Keras 3).

    Args:
      state: this package's, inside any chain.
      variables: ``{v.path: v.numpy() for v in optimizer.variables}`` of the target optimizer, built.
      params: the parameters.
      names, learning_rate: as for :func:`from_keras`.
      lr_in_momentum: whether the learning rate is in the buffer in `state`.

    Returns:
      A new dictionary as `variables`, with NumPy arrays in place of the accumulators and the iteration, to be
      assigned: ``for v in optimizer.variables: v.assign(new[v.path])``.

    Raises:
      ValueError: listing every name that is missing.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rmsprop_jax import conventions, interop
      >>> params = {"bias": jnp.zeros(2)}
      >>> tx = conventions.keras(rho=0.75)
      >>> _, state = tx.update({"bias": jnp.array([2.0, 4.0])}, tx.init(params), params)
      >>> theirs = {"rmsprop/iteration": np.array(0), "rmsprop/dense_bias_velocity": np.zeros(2)}
      >>> print(interop.to_keras(state, theirs, params, {"dense/bias": "bias"}))
      {'rmsprop/iteration': array(1), 'rmsprop/dense_bias_velocity': array([1., 4.], dtype=float32)}
    """
    source = KerasSource(variables, rate=learning_rate, lr_in_momentum=lr_in_momentum)
    arrays, count = outward(state, params, names, source)
    new = {**variables, **({source.iteration: np.asarray(count)} if source.iteration else {})}
    problems = []
    for name, moments in arrays.items():
        for label, key, array in zip(source.labels, source.names[name], moments, strict=True):
            if array is None:
                continue
            if key is None or np.shape(variables[key]) != array.shape:
                problems.append(f"{name!r} has no {label} of shape {array.shape}.")
            else:
                new[key] = array
    raise_if(problems)
    return new


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
    own = _config_of(variables, config)
    if own is None:
        raise ValueError("The optimizer's configuration is not in it: pass config=optimizer.get_config().")
    source = KerasSource(load(variables), order, own)
    tx = _keras_optimizer(own, learning_rate, source)
    return tx, carry(tx.init(params), params, names, source, count=count, strict=strict, report=report)


def _keras_optimizer(config, learning_rate, source):
    """What a configuration says, with the learning rate of the variables where none is given."""
    is_outside = "decay" in config and not config.get("momentum")
    function = _keras2 if is_outside else conventions.keras
    known = inspect.signature(function).parameters
    _check_config(config, known, has_rate=learning_rate is not None)
    if learning_rate is None:
        learning_rate = _keras_rate(source, config)
    names = [key for key in config if key in known and key != "learning_rate"]
    return function(learning_rate, **{key: plain(key, config[key]) for key in names})


def _check_config(config, known, has_rate):
    """Raises ValueError for settings that say something and have no counterpart."""
    without_effect = {
        "ema_overwrite_frequency": not config.get("use_ema"),
        "gradient_accumulation_steps": config.get("gradient_accumulation_steps") == 1,
        "decay": has_rate or not config.get("decay"),
    }
    passed = {*known, *_KERAS_ONLY, *(key for key, is_so in without_effect.items() if is_so)}
    unknown, found = unknown_in(config, passed)
    if unknown:
        hint = ": decay divides the learning rate by 1 + decay * count, pass such a learning_rate="
        hint = hint if "decay" in unknown else ""
        raise ValueError(f"Invalid config: {found} has no counterpart in conventions.keras{hint}.")


def _keras2(learning_rate, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False):
    """The legacy optimizer of Keras 2, which without momentum has epsilon outside the root."""
    return rmsprop(learning_rate, rho, epsilon, eps_in_sqrt=False, centered=centered)


def _keras_rate(source, config):
    rate = config.get("learning_rate") if source.rate is None else as_numpy(source.rate)
    if isinstance(rate, Mapping) or rate is None:
        found = f"the schedule {rate.get('class_name')}" if rate else "nowhere"
        raise ValueError(f"Keras' learning rate is {found}: pass learning_rate=, a number or a schedule.")
    return plain("learning_rate", rate)


def _config_of(variables, config):
    """The arguments of the RMSprop in the caller's configuration, or in that of the file, if any."""
    inner = keras_config(variables) if config is None else config
    if inner is None:
        return None
    while isinstance(inner.get("config"), Mapping) or isinstance(inner.get("inner_optimizer"), Mapping):
        name = inner.get("class_name")
        inner = inner["config"] if isinstance(inner.get("config"), Mapping) else inner["inner_optimizer"]
        if name not in (None, "RMSprop", "Custom>RMSprop", "LossScaleOptimizer"):
            raise ValueError(f"Invalid config: it is that of {name}, expected RMSprop's.")
    if "rho" not in inner:
        raise ValueError(
            f"Invalid config: it has {', '.join(map(repr, inner))}, expected RMSprop's, with 'rho'."
        )
    return inner
