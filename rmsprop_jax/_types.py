"""Names for types that annotations share.

A pytree has no type that a checker could know. `optax.Params` and the like are recursive, by a name that
only Optax's own module has, at which `typing.get_type_hints` fails: with it whoever builds command lines or
configurations from signatures.
"""

from typing import Any, TypeAlias, TypeVar

Tree: TypeAlias = Any
"""A tree of arrays: of parameters, gradients or updates, or an optimizer's state."""

SameTree = TypeVar("SameTree")
"""What comes back as it was handed in: the tree's structure and type, with other arrays."""
