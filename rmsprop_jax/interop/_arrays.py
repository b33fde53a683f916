"""Arrays and settings of every framework as NumPy's and Python's, and NumPy's arrays as JAX's."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._dtypes import dtype_of


def as_numpy(x: Any) -> np.ndarray:
    """A NumPy array of float32 at least, of one of NumPy, JAX, PyTorch or Keras; else ValueError."""
    if hasattr(x, "full_tensor"):  # a DTensor of torch.distributed
        x = x.full_tensor()
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() and x.element_size() < 4 else x
    try:
        x = np.asarray(x)
        return x if x.dtype.kind in "fc" and x.dtype.itemsize >= 4 else x.astype(np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"of type {type(x).__name__}, which is no array of numbers") from None


def whole_number(x: Any, name: str) -> int:
    """A count of updates, from a number or an array of one; ValueError for anything else."""
    try:
        number = as_numpy(x).astype(np.float64).reshape(()).item()
    except ValueError:
        number = float("nan")
    if not (0 <= number < 2**31 and number == int(number)):
        raise ValueError(f"Invalid {name}: {x!r:.60}, expected a whole number of updates.")
    return int(number)


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` in `dtype`; what is finite stays finite."""
    if x.dtype != dtype and x.dtype.kind == "f" and jnp.issubdtype(dtype, jnp.floating):
        limit = float(jnp.finfo(dtype).max)
        x = np.clip(x, -limit, limit)
    return x.astype(dtype)


def placed(x: Any, old: Any) -> jax.Array:
    """`x` as a JAX array with the dtype and the sharding of `old`, an array or its shape alone."""
    sharding = getattr(old, "sharding", None) if getattr(old, "committed", True) else None
    return jax.device_put(cast(np.asarray(x), dtype_of(old)), sharding)


def plain(name: str, value: Any) -> Any:
    """A Python number, flag or None, also out of an array of one."""
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        value = value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise ValueError(f"Invalid {name}: {value!r:.60}, expected a number.") from None
    return bool(value) if name in ("centered", "maximize") else value


def unknown_in(settings: Mapping[str, Any], passed: Collection[str]) -> tuple[list[str], str]:
    """The settings that say something, but for those that are `passed` over, and the same for an error."""
    keys = [key for key, x in settings.items() if key not in passed and x is not None and x is not False]
    return keys, ", ".join(f"{key}={settings[key]!r:.60}" for key in keys)
