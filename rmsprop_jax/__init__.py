"""RMSProp for JAX, as an Optax gradient transformation."""

from rmsprop_jax import accumulators, conventions, diagnostics, export, interop, rounding, rows, sharding
from rmsprop_jax._rule import Settings
from rmsprop_jax._tree import ScaleByRmsState
from rmsprop_jax.optimizer import rmsprop
from rmsprop_jax.schedules import warmup
from rmsprop_jax.transform import scale_by_rms
from rmsprop_jax.updates import apply_updates

__version__ = "0.3.0"

__all__ = [
    "ScaleByRmsState",
    "Settings",
    "accumulators",
    "apply_updates",
    "conventions",
    "diagnostics",
    "export",
    "interop",
    "rmsprop",
    "rounding",
    "rows",
    "scale_by_rms",
    "sharding",
    "warmup",
]
