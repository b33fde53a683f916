"""The states of `optax.rmsprop`, whose tree is the parameters', as here."""

import optax

from rmsprop_jax.interop._moments import filled, moments, shapes_of
from rmsprop_jax.interop._names import matched

_LABELS = {"E[g^2]": "nu", "E[g]": "mu", "b": "trace"}


def from_optax(
    optax_state: optax.OptState, state: optax.OptState, *, count: int | None = None
) -> optax.OptState:
    """The state of `optax.rmsprop` as this package's; the parameters' tree is the same.

    Args:
      optax_state: a state of Optax's RMSProp, inside any chain.
      state: what ``init`` returns for the target optimizer. Its momentum buffer is Optax's as it is, so
        both have the learning rate in it, or neither.
      count: number of updates so far. By default Optax's: it counts them where there is a schedule or bias
        correction, else this is 0.

    Returns:
      A state as `state`.

    Raises:
      ValueError: listing every path where the two do not have the same accumulators, of the same shapes.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import interop, rmsprop
      >>> theirs = optax.rmsprop(0.1, decay=0.75)
      >>> _, state = theirs.update(jnp.array([2.0, 4.0]), theirs.init(jnp.zeros(2)))
      >>> ours = rmsprop(0.1, decay=0.75, accumulator="bfloat16")
      >>> print(interop.from_optax(state, ours.init(jnp.zeros(2)), count=1)[0])
      ScaleByRmsState(count=Array(1, dtype=int32), nu=Array([1, 4], dtype=bfloat16), mu=None)
    """
    arrays, counted = moments(optax_state)
    return _carried_over(state, arrays, counted if count is None else count)


def to_optax(state: optax.OptState, optax_state: optax.OptState) -> optax.OptState:
    """This package's state as that of `optax.rmsprop`; the parameters' tree is the same.

    Args:
      state: this package's, inside any chain.
      optax_state: what ``init`` returns for the target optimizer.

    Returns:
      A state as `optax_state`.

    Raises:
      ValueError: as :func:`from_optax`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import interop, scale_by_rms
      >>> ours = scale_by_rms(decay=0.75, centered=True)
      >>> _, state = ours.update(jnp.array([2.0, 4.0]), ours.init(jnp.zeros(2)))
      >>> theirs = interop.to_optax(state, optax.scale_by_stddev(decay=0.75).init(jnp.zeros(2)))
      >>> print(state.nu, theirs.nu, state.mu)  # the variance, the raw moment, the mean
      [0.75 3.  ] [1. 4.] [0.5 1. ]
    """
    return _carried_over(optax_state, *moments(state))


def _carried_over(state, arrays, count):
    """`state` with the arrays, which have its paths for names."""
    needed = shapes_of(state)
    shapes = {path: shape for (_, path), shape in needed.items()}
    names = {path: path for path in shapes}
    found = matched(needed, shapes, names, lambda name, what: arrays.get((what, name)), _LABELS)
    return filled(state, found, count)
