"""The variables of Keras's optimizer, each by its path.

{"rmsprop/sequential_dense_kernel_velocity": ..., "rmsprop/iteration": ..., "rmsprop/learning_rate": ...}
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from rmsprop_jax.interop._moments import buffer_factor, carried, named
from rmsprop_jax.interop._names import Names, Tensors, as_numpy, load, raise_if

_LABELS = {"E[g^2]": "velocity", "E[g]": "average_gradient", "b": "momentum"}


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
      state: what ``init`` returns for the target optimizer, such as `conventions.keras`'s.
      params: the parameters.
      names: from the paths of the model's variables, such as "sequential/dense/kernel", to paths in `params`.
        Parameters it does not list are not transferred.
      learning_rate: the one that Keras's next step would take; by default its variable's. Only used for
        ``lr_in_momentum=False``.
      lr_in_momentum: whether the learning rate is in the buffer of the target optimizer, as in Keras's.

    Returns:
      A state as `state`. Its `nu` is a variance where it is centred, at least 0.

    Raises:
      ValueError: listing every name that is missing and every shape that does not fit.

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
    ends = _ends(load(variables))

    def lookup(name, what):
        array = ends.get(_end(name, what), (None, None))[1]
        if what != "b" or array is None:
            return array
        return as_numpy(array) * _buffer(ends, learning_rate, lr_in_momentum)

    count = int(ends["iteration"][1]) if "iteration" in ends else 0
    return carried(state, params, names, lookup, _LABELS, count)


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
      variables: ``{v.path: v.numpy() for v in optimizer.variables}`` of the target optimizer, built.
      params: the parameters.
      names: as for :func:`from_keras`.
      learning_rate: as for :func:`from_keras`, of the next step.
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
    ends = _ends(variables)
    known = {name for name in names if _end(name, "E[g^2]") in ends}
    arrays, count = named(state, params, names, known)
    new = {**variables, **({ends["iteration"][0]: np.asarray(count)} if "iteration" in ends else {})}
    problems = []
    for (what, name), array in arrays.items():
        if what == "b":
            array = array / _buffer(ends, learning_rate, lr_in_momentum)
        key, old = ends.get(_end(name, what), (None, None))
        if key is None or np.shape(old) != array.shape:
            problems.append(f"{name!r} has no {_LABELS[what]} of shape {array.shape}.")
        else:
            new[key] = array
    raise_if(problems)
    return new


def _ends(variables):
    """Each variable's path and value by the last part of its path."""
    return {path.rpartition("/")[2]: (path, value) for path, value in variables.items()}


def _end(name, what):
    return f"{name.replace('/', '_')}_{_LABELS[what]}"


def _buffer(ends, learning_rate, ours_has_it):
    if learning_rate is None and "learning_rate" in ends:
        learning_rate = ends["learning_rate"][1]
    return buffer_factor(True, ours_has_it, learning_rate)
