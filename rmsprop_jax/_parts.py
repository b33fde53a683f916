"""Optax's parts computed in float32 at least: chains, momentum and decayed weights.

`optax.trace` and `optax.add_decayed_weights` do the arithmetic. Added are the dtypes in which they compute
and store, and that leaves without a gradient are left alone.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, rounding
from rmsprop_jax._dtypes import dtype_of, narrow, wide, widen
from rmsprop_jax._rule import Settings
from rmsprop_jax._tree import is_none, leaf_numbers, refusal
from rmsprop_jax._xla import full_like, ordered_after


class Transformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that tells its settings.

    Attributes:
      settings: of the RMSProp in it, None where there is none.
      moves_untouched_rows_by: the arguments by which it moves or changes parameters whose gradient is zero.
    """

    settings: Settings | None = None
    moves_untouched_rows_by: tuple[str, ...] = ()

    def __new__(
        cls,
        init: Callable,
        update: Callable,
        settings: Settings | None = None,
        moves_untouched_rows_by: Iterable[str] = (),
    ) -> "Transformation":
        self = super().__new__(cls, init, update)
        self.settings, self.moves_untouched_rows_by = settings, tuple(moves_untouched_rows_by)
        return self

    def _replace(self, **changes: Any) -> "Transformation":
        return type(self)(**{**self._asdict(), **self.__dict__, **changes})

    @classmethod
    def of_parts(cls, init: Callable, update: Callable, parts: Iterable[Any]) -> "Transformation":
        """One that has the settings of its parts; `update` computes in float32 at least."""
        known = [part for part in parts if isinstance(part, cls)]
        settings = next((part.settings for part in known if part.settings is not None), None)
        names = [name for part in known for name in part.moves_untouched_rows_by]
        return cls(init, _in_float32(update), settings, names)


def _in_float32(update):
    """`update` in float32 at least; its updates come back in the gradients' dtypes."""

    def update_fn(updates, state, params=None, **extra_args):
        dtypes = jax.tree.map(dtype_of, updates)
        with jax.numpy_dtype_promotion("standard"):  # Optax's parts rely on it
            updates, state = update(widen(updates), state, params, **extra_args)
        return jax.tree.map(narrow, updates, dtypes), state

    return update_fn


def chain(*parts):
    """`optax.chain` in float32 at least, with the settings of its parts."""
    inner = optax.chain(*parts)

    def update_fn(updates, state, params=None, **extra_args):
        if not (isinstance(state, tuple) and len(state) == len(parts)):
            raise ValueError(refusal(state))
        return inner.update(updates, state, params, **extra_args)

    return Transformation.of_parts(inner.init, update_fn, parts)


def trace(decay, nesterov, dtype):
    """`optax.trace`, stored between updates in `dtype`. Its update takes the `count` of earlier updates."""
    decay = _checks.decay("momentum", decay)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Invalid momentum_dtype: momentum_dtype={dtype!r}, expected a floating dtype.")

    def stored_dtype(p):
        own = wide(dtype_of(p))
        return own if dtype is None or jnp.iscomplexobj(p) else jnp.dtype(dtype)

    def init_fn(params):
        return optax.TraceState(jax.tree.map(lambda p: full_like(p, 0, stored_dtype(p)), params))

    def update_fn(updates, state, params=None, *, count, **extra_args):
        del params, extra_args
        treedef: Any
        grads, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        buffers = treedef.flatten_up_to(state.trace)
        numbers = [None] * len(grads) if dtype is None else leaf_numbers(buffers)

        def step(g, old, number):
            if g is None:
                return None, old
            if old.dtype != (expected := stored_dtype(old)):
                raise ValueError(
                    f"Invalid state: a momentum buffer is stored as {old.dtype}, this optimizer stores it as "
                    f"{expected}: optax.tree.cast converts it."
                )
            stored = new = _traced(g, widen(old), decay)
            if new.dtype != old.dtype:
                stored, new = _rounded(new, old.dtype, number, count)
            return _traced(g, new, decay) if nesterov else new, stored

        steps = list(map(step, grads, buffers, numbers))
        us, buffers = (treedef.unflatten(xs) for xs in (zip(*steps, strict=True) if steps else ((), ())))
        return us, optax.TraceState(buffers)

    return Transformation(init_fn, update_fn, moves_untouched_rows_by=["momentum"])


# Jitted for eager callers: one program for each shape. Inlined under an outer jit.
@partial(jax.jit, inline=True)
def _traced(g, buffer, decay):
    """`optax.trace` of one leaf."""
    return optax.trace(decay).update(g, optax.TraceState(buffer))[0]


@partial(jax.jit, static_argnums=1, inline=True)
def _rounded(buffer, dtype, number, count):
    """A momentum buffer in `dtype`, and the same read back."""
    # Leaf ids counted down from 2**32 - 1: nu's ids count up from 0, so the two never share thresholds.
    thresholds = rounding.thresholds(buffer.shape, np.uint32(2**32 - 1) - number, count)
    stored = rounding.to_dtype(buffer, dtype, thresholds)
    # The update reads the stored buffer, as it reads stored codes of nu: so nothing reads the old one any
    # more, which is written in place. Without the order XLA on GPUs keeps a float32 copy.
    return stored, ordered_after(stored.astype(buffer.dtype), jnp.isnan(stored) & (stored > 0))


def decayed_weights(weight_decay, mask=None, learning_rate=None, name="weight_decay"):
    """Adds weight_decay * p to the updates or, given the learning rate, -learning_rate * weight_decay * p.

    None and the number 0 are no weight decay, which needs no parameters; an array of 0 may change.
    """
    weight_decay = None if weight_decay is None else _checks.number(name, weight_decay)
    if weight_decay is None or (isinstance(weight_decay, float) and weight_decay == 0):
        return optax.identity()
    if learning_rate is None:
        factor = weight_decay
    elif callable(learning_rate):
        factor = lambda count: -learning_rate(count) * weight_decay  # noqa: E731
    else:
        factor = -learning_rate * weight_decay
    inner = optax.add_decayed_weights(factor, mask)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is not None:
            params = jax.tree.map(
                lambda u, p: None if u is None else widen(p), updates, params, is_leaf=is_none
            )
        return inner.update(updates, state, params)

    return Transformation(inner.init, update_fn, moves_untouched_rows_by=["weight_decay"])
