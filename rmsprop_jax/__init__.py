"""RMSProp for JAX, as an Optax gradient transformation."""

from rmsprop_jax import conventions, diagnostics, interop, rounding, rows, sharding, storage
from rmsprop_jax.optimizer import rmsprop
from rmsprop_jax.schedules import warmup
from rmsprop_jax.transform import ScaleByRmsState, scale_by_rms
from rmsprop_jax.updates import apply_updates

__version__ = "0.1.0"

__all__ = [
    "ScaleByRmsState",
    "apply_updates",
    "conventions",
    "diagnostics",
    "interop",
    "rmsprop",
    "rounding",
    "rows",
    "scale_by_rms",
    "sharding",
    "storage",
    "warmup",
]
