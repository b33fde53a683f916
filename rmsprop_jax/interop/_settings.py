"""Hyper-parameters as other frameworks note them down."""

from collections.abc import Collection, Mapping
from typing import Any


def plain(name: str, value: Any) -> Any:
    """A Python number, flag or None, also out of an array of one."""
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        value = value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise ValueError(f"Invalid {name}: {value!r:.60}, expected a number.") from None
    return bool(value) if name in ("centered", "maximize") else value


def unknown_in(settings: Mapping[str, Any], passed: Collection[str]) -> list[str]:
    """The settings that say something, but for those that are `passed` over."""
    return [key for key, x in settings.items() if key not in passed and x is not None and x is not False]


def listed(settings: Mapping[str, Any], keys: Collection[str]) -> str:
    """Some of the settings, for an error."""
    return ", ".join(f"{key}={settings[key]!r:.60}" for key in keys)
