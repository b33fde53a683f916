"""Optax's states for `jax.export`, so that a whole training step can be written and read.

This package's own states are registered with JAX when it is imported. Optax registers none of its own, of
which :func:`rmsprop_jax.rmsprop` and Optax's wrappers hold some. JAX takes one registration of a class, so
that they are registered on demand, in the process that writes a step and in the one that reads it::

    export.register_optax_states()
    written = jax.export.export(jax.jit(step))(params, tx.init(params), grads).serialize()
"""

import jax
import optax

__all__ = ["register_optax_states"]

_OPTAX = (
    *(optax.EmptyState, optax.TraceState, optax.ScaleByScheduleState, optax.MaskedState, optax.MaskedNode),
    *(optax.MultiStepsState, optax.ApplyIfFiniteState, optax.transforms.PartitionState),
    optax.schedules.InjectStatefulHyperparamsState,
)


def register_optax_states() -> None:
    """Lets `jax.export` write and read the states of Optax's that stand beside this package's.

    A class that is registered already, by you or by an earlier call, stays as it is.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rmsprop_jax import export, rmsprop
      >>> export.register_optax_states()
      >>> tx, params = rmsprop(0.1), jnp.ones(3)
      >>> written = jax.export.export(jax.jit(tx.update))(params, tx.init(params)).serialize()
      >>> updates, state = jax.export.deserialize(written).call(params, tx.init(params))
    """
    # The count of a scheduled weight decay, for whose class Optax has no public name.
    scheduled = jax.eval_shape(optax.add_decayed_weights(lambda count: 0.0).init, ())
    for state in (*_OPTAX, type(scheduled)):
        try:
            jax.export.register_namedtuple_serialization(state, serialized_name=f"optax.{state.__name__}")
        except ValueError:  # registered already
            continue
