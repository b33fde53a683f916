"""Hyper-parameters as numbers: checked where they are concrete, passed on where they are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

_LARGEST = float(np.finfo(np.float32).max)


def number(name: str, value: jax.typing.ArrayLike, *, below: float = _LARGEST) -> float | jax.Array:
    """Returns a Python or NumPy number as a float, after checking that `0 <= value < below`.

    A `jax.Array`, traced or not, is returned as it is: its value may not be known yet, and under
    `optax.inject_hyperparams` it belongs to the user. A NumPy array of more than a number is returned as one,
    after the same check.

    Raises:
      ValueError: if the number is negative, NaN, `below` or more, or no number at all.
    """
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, str) or callable(value):
        raise ValueError(f"Invalid {name}: {name}={value!r}, {_not_a_number(name, value)}")
    try:
        checked = np.asarray(value, float)
    except (TypeError, ValueError):
        checked = np.asarray(np.nan)
    is_array = isinstance(value, np.ndarray) and checked.ndim > 0
    if not (is_array or checked.ndim == 0) or not np.all((checked >= 0) & (checked < below)):
        interval = f"[0, {below:g})" if below < _LARGEST else "[0, inf), finite in float32"
        raise ValueError(f"Invalid {name}: {name}={value!r}, expected a number in {interval}.")
    return jnp.asarray(value) if is_array else float(checked)


def _not_a_number(name, value):
    if callable(value):
        return f"a schedule; optax.inject_hyperparams takes schedules for {name}, and passes their values on."
    return "a string, expected a number. (YAML takes 1e-3 for a string; write 1.0e-3.)"


def precise_number(name: str, value: jax.typing.ArrayLike, **bounds: float) -> float | jax.Array:
    """`number`, which also refuses an array that has already been rounded to 16 bits or less.

    In bfloat16 a decay of 0.999 is 1.0, in float16 an eps of 1e-8 is 0.0. `optax.inject_hyperparams`
    casts hyper-parameters to the parameters' dtype unless it is told otherwise.

    Raises:
      ValueError: as `number`, and if the array has a floating dtype below float32.
    """
    value = number(name, value, **bounds)
    if (
        isinstance(value, jax.Array)
        and jnp.issubdtype(value.dtype, jnp.floating)
        and jnp.finfo(value.dtype).bits < 32
    ):
        raise ValueError(
            f"Invalid {name}: it arrived as {value.dtype}, in which values such as 0.999 or 1e-8 are "
            "lost. With optax.inject_hyperparams, pass hyperparam_dtype=jnp.float32."
        )
    return value


def decay(name: str, value: jax.typing.ArrayLike) -> float | jax.Array:
    """`precise_number` in [0, 1), of a running mean or a momentum buffer."""
    return precise_number(name, value, below=1)


def learning_rate(name: str, value: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """A schedule as it is, a number or an array as `number` returns it."""
    return value if callable(value) else number(name, value)


def whole_number(name: str, value: int, least: int = 0) -> int:
    """Returns a Python or NumPy integer after checking that it is `least` or more.

    Raises:
      ValueError: if it is less, or no integer.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"Invalid {name}: {name}={value!r}, expected a whole number, {least} or more.")
    return int(value)


def flag(name: str, value: bool) -> bool:
    """Returns a Python or NumPy bool as a bool; catches misplaced positional arguments.

    Raises:
      ValueError: if it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"Invalid {name}: {name}={value!r}, expected True or False.")
    return bool(value)


def from_injected(name: str, value: object) -> None:
    """Raises ValueError for an array where a function or a tree belongs.

    `optax.inject_hyperparams` takes every function for a schedule, and passes on what it returns for a count.
    """
    if isinstance(value, bool | np.bool_ | jax.Array | np.ndarray):
        raise ValueError(
            f"Invalid {name}: {name}={value!r}, expected a tree of bools or a function. "
            f"optax.inject_hyperparams takes a function for a schedule: pass it static_args={name!r}."
        )
