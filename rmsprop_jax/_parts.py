"""Optax's parts computed in float32 at least: the casts around a chain, momentum, decayed weights.

`optax.trace` and `optax.add_decayed_weights` do the arithmetic. Added are the dtypes in which they compute
and store, and that leaves without a gradient are left alone.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, rounding
from rmsprop_jax._dtypes import dtype_of, full_like, narrow, wide, widen
from rmsprop_jax._leaves import is_none, leaf_numbers
from rmsprop_jax._rule import Transformation
from rmsprop_jax._states import is_ours, refusal


def chain(*parts):
    """`optax.chain` in float32 at least, updates in the gradients' dtypes; it knows what its parts know."""
    inner = optax.chain(*parts)

    def update_fn(updates, state, params=None, **extra_args):
        if not (isinstance(state, tuple) and len(state) == len(parts)):
            raise ValueError(refusal(state))
        dtypes = jax.tree.map(dtype_of, updates)
        with jax.numpy_dtype_promotion("standard"):  # Optax's parts rely on it
            updates, state = inner.update(widen(updates), state, params, **extra_args)
        return jax.tree.map(narrow, updates, dtypes), state

    known = [part for part in parts if isinstance(part, Transformation)]
    settings = next((part.settings for part in known if part.settings is not None), None)
    return Transformation(
        inner.init, update_fn, settings, [name for part in known for name in part.moves_all]
    )


def counted(inner, has_momentum):
    """Passes scale_by_rms's step count to the rest of the chain as the extra argument `rms_count`.

    Raises:
      ValueError: for a state that is not of such a chain, or has a momentum buffer where this has none.
    """

    def update_fn(updates, state, params=None, **extra_args):
        if not (isinstance(state, tuple) and state and is_ours(state[0])):
            raise ValueError(refusal(state))
        if has_momentum != any(isinstance(part, optax.TraceState) for part in state):
            raise ValueError(
                f"Invalid state: it has {'no' if has_momentum else 'a'} momentum buffer, this optimizer has "
                f"{'momentum' if has_momentum else 'no momentum'}."
            )
        return inner.update(updates, state, params, **extra_args, rms_count=state[0].count)

    return inner._replace(update=update_fn)


def trace(decay, nesterov, dtype):
    """`optax.trace`, stored between updates in `dtype`."""
    decay = _checks.decay("momentum", decay)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Invalid momentum_dtype: momentum_dtype={dtype!r}, expected a floating dtype.")

    def stored_dtype(p):
        own = wide(dtype_of(p))
        return own if dtype is None or jnp.iscomplexobj(p) else jnp.dtype(dtype)

    def init_fn(params):
        return optax.TraceState(jax.tree.map(lambda p: full_like(p, 0, stored_dtype(p)), params))

    def update_fn(updates, state, params=None, *, rms_count, rms_rows=None, **extra_args):
        del params, extra_args
        treedef: Any
        grads, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        buffers = treedef.flatten_up_to(state.trace)
        rows = [None] * len(grads) if rms_rows is None else treedef.flatten_up_to(rms_rows)
        numbers = rows if dtype is None else leaf_numbers(buffers)

        def step(g, old, number, rows):
            if g is None:
                return None, old
            if old.dtype != (expected := stored_dtype(old)):
                raise ValueError(
                    f"Invalid state: a momentum buffer is stored as {old.dtype}, this optimizer stores it as "
                    f"{expected}: optax.tree.cast converts it."
                )
            new = _traced(g, widen(old), decay)
            u = _traced(g, new, decay) if nesterov else new
            if new.dtype == old.dtype:
                return u, new
            # Leaf ids counted down from 2**32 - 1: nu's ids count up from 0, so the two never share
            # thresholds.
            thresholds = rounding.thresholds(new.shape, np.uint32(2**32 - 1) - number, rms_count, rows)
            return u, rounding.to_dtype(new, old.dtype, thresholds)

        steps = list(map(step, grads, buffers, numbers, rows))
        us, buffers = (treedef.unflatten(xs) for xs in (zip(*steps, strict=True) if steps else ((), ())))
        return us, optax.TraceState(buffers)

    return Transformation(init_fn, update_fn, moves_all=["momentum"])


@partial(jax.jit, inline=True)
def _traced(g, buffer, decay):
    """`optax.trace` of one leaf. Jitted for eager callers; inlined under an outer jit."""
    return optax.trace(decay).update(g, optax.TraceState(buffer))[0]


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

    return Transformation(inner.init, update_fn, moves_all=["weight_decay"])
