"""What a state of RMSProp is, here and in Optax, and one map over those inside any chain or wrapper.

Uncentred, `nu` is E[g^2] in both. Centred, it is the variance E[g^2] - E[g]^2 here, and the raw moment
E[g^2] in Optax; E[g] is `mu` in both.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_STORED: list[type] = []


class Stored:
    """Base of what stands in `nu` for one parameter where that is more than one array.

    A NamedTuple of arrays of the parameter's rank, each with the parameter's sizes or with 1, and with names
    that no parameter has.

    Attributes:
      kind: which accumulator reads it, as in :class:`rmsprop_jax.accumulators.Accumulator`.
    """

    kind: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        _STORED.append(cls)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return jnp.broadcast_shapes(*(x.shape for x in jax.tree.leaves(self)))

    @property
    def dtype(self) -> np.dtype:
        """Of the first array."""
        return jax.tree.leaves(self)[0].dtype


def is_stored(x: Any) -> bool:
    """Whether `x` is a :class:`Stored`, for `is_leaf`: a leaf of `nu` is one parameter's."""
    return isinstance(x, Stored)


def whole(x: Any) -> Any:
    """A :class:`Stored` where `x` is a mapping of its fields, which Flax NNX makes of it; else `x`."""
    if isinstance(x, Mapping):
        for cls in _STORED:
            names = cls._fields  # type: ignore[attr-defined]  # of a NamedTuple
            if set(x) == set(names):
                return cls(*(jax.tree.leaves(x[name])[0] for name in names))
    return x


def with_whole_leaves(state: Any) -> Any:
    """A state of this package's with each :class:`Stored` in it as one."""
    leaves, treedef = jax.tree.flatten(state.nu, is_leaf=lambda x: is_stored(whole(x)))
    if not any(isinstance(x, Mapping) for x in leaves):
        return state
    return state._replace(nu=jax.tree.unflatten(treedef, map(whole, leaves)))


class _Fields(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # tuple.count, as in Optax's states
    nu: Any  # not `optax.Updates`, see `_types.py`
    mu: Any


class ScaleByRmsState(_Fields):
    """State of `scale_by_rms`, the same fields for every option.

    Attributes:
      count: updates so far, int32 scalar.
      nu: running mean of squared gradients, or of squared deviations from `mu` when centred; the
        parameters' tree and shapes, real, float32 (float64 for 64-bit parameters), or the codes for them of
        another accumulator, see :mod:`rmsprop_jax.accumulators`. One exception: what "factored" stores is a
        :class:`rmsprop_jax.accumulators.FactoredMoments` in the place of a matrix, of two arrays.
      mu: running mean of gradients when centred, else None; as `nu`, complex for complex parameters.
      accumulator: what reads `nu` where that does not tell by itself: an accumulator that has no name, such
        as ``Uint8(-40)``; else None. Part of the tree's structure, no field.
    """

    accumulator: Any = None

    def __new__(cls, count: jax.Array, nu: Any, mu: Any, *, accumulator: Any = None) -> "ScaleByRmsState":
        self = super().__new__(cls, count, nu, mu)
        self.accumulator = accumulator
        return self

    def _replace(self, **changes: Any) -> "ScaleByRmsState":
        return type(self)(**{**self._asdict(), "accumulator": self.accumulator, **changes})


jax.tree_util.register_pytree_with_keys(
    ScaleByRmsState,
    lambda state: (
        [(jax.tree_util.GetAttrKey(name), value) for name, value in state._asdict().items()],
        state.accumulator,
    ),
    lambda accumulator, fields: ScaleByRmsState(*fields, accumulator=accumulator),
    lambda state: (tuple(state), state.accumulator),
)

# Optax exports two of its four.
_OPTAX = (
    *("ScaleByRmsState", "ScaleByRmsWithCountState"),
    *("ScaleByRStdDevState", "ScaleByRStdDevWithCountState"),
)


def is_rms_state(x: Any) -> bool:
    """Whether `x` is a state of this package's RMSProp or of Optax's."""
    return is_ours(x) or (isinstance(x, tuple) and type(x).__name__ in _OPTAX)


def is_ours(x: Any) -> bool:
    """Whether `x` is a state of this package's RMSProp."""
    return isinstance(x, ScaleByRmsState)


def map_rms_states(f: Callable[[Any], Any], state: Any) -> Any:
    """`state` with `f` of each state of RMSProp in it; all else as it is."""
    return jax.tree.map(lambda x: f(_read(x)) if is_rms_state(x) else x, state, is_leaf=is_rms_state)


def rms_states(state: Any) -> Iterator[Any]:
    """The states of RMSProp in `state`."""
    return map(_read, filter(is_rms_state, jax.tree.leaves(state, is_leaf=is_rms_state)))


def _read(state):
    return with_whole_leaves(state) if is_ours(state) else state


def refusal(state: Any) -> str:
    """What to say of a state that is not what `init` returned."""
    kind = type(state).__name__
    if isinstance(state, tuple | list):
        kind += f" of {', '.join(type(x).__name__ for x in state) or 'nothing'}"
    message = (
        f"Invalid state: it is {kind}, expected what tx.init(params) returned: call that first, pass it "
        "as in tx.update(grads, state, params), and restore a checkpoint into its structure."
    )
    hint = " Of a Flax NNX optimizer it is optimizer.opt_state." if hasattr(state, "opt_state") else ""
    return message + hint


def raw_moment(nu: Any, mu: Any) -> Any:
    """E[g^2] from the variance and E[g], arrays of JAX or of NumPy."""
    return nu + (mu.real**2 + mu.imag**2)


def variance(raw: Any, mu: Any) -> Any:
    """E[g^2] - E[g]^2, at least 0: rounding may leave the difference below. Arrays of JAX or of NumPy."""
    return (raw - (mu.real**2 + mu.imag**2)).clip(min=0)
