"""What `jax.export` writes for the states, so that a whole training step can be serialised.

JAX refuses a second registration of a class. This package's own classes are registered when they are
imported; Optax's, of which its chains hold some, as late as possible and only where nobody else has: when a
state is made, written or read.
"""

import json
from dataclasses import asdict
from functools import cache
from typing import Any

import jax
import optax

from rmsprop_jax import accumulators
from rmsprop_jax._states import ScaleByRmsState

_OPTAX = (
    *(optax.EmptyState, optax.TraceState, optax.ScaleByScheduleState, optax.MaskedState, optax.MaskedNode),
    *(optax.MultiStepsState, optax.ApplyIfFiniteState, optax.transforms.PartitionState),
    optax.schedules.InjectStatefulHyperparamsState,
)


@cache
def register_optax_states() -> None:
    """Lets `jax.export` write the states of Optax's that stand beside this package's, unless it can."""
    # The count of a scheduled weight decay, for whose class Optax has no public name.
    scheduled = jax.eval_shape(optax.add_decayed_weights(lambda count: 0.0).init, ())
    for state in (*_OPTAX, type(scheduled)):
        try:
            jax.export.register_namedtuple_serialization(state, serialized_name=f"optax.{state.__name__}")
        except ValueError:  # somebody else's registration stands
            continue


# What has no name, and is written as the numbers it is made of.
_OWN = (accumulators.Uint8, accumulators.Factored)


def _written(accumulator: accumulators.Accumulator | None) -> bytes:
    register_optax_states()
    if accumulator is None:
        return b""
    title = accumulators.title(accumulator)
    if isinstance(title, _OWN):
        return json.dumps({type(title).__name__: asdict(title)}).encode()
    if not isinstance(title, str):
        raise ValueError(
            f"jax.export cannot write {accumulator}: give it a name, accumulators.NAMED['NAME'] = ..."
        )
    return json.dumps(title).encode()


def _read(data: bytes) -> Any:
    register_optax_states()
    title = json.loads(data) if data else None
    if isinstance(title, dict):
        ((name, numbers),) = title.items()
        return next(own for own in _OWN if own.__name__ == name)(**numbers)
    return None if title is None else accumulators.named(title)


jax.export.register_pytree_node_serialization(
    ScaleByRmsState,
    serialized_name="rmsprop_jax.ScaleByRmsState",
    serialize_auxdata=_written,
    deserialize_auxdata=_read,
)
