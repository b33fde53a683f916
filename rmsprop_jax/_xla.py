"""Two hints to XLA: where an array lies, and what it has to read before it writes."""

import jax
import jax.numpy as jnp


def full_like(p: jax.typing.ArrayLike, value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`jnp.full_like`; inside jit too it has the sharding of `p`."""
    x = jnp.full_like(p, value, dtype=dtype)
    # In a jitted init the compiler would place a constant, and all of it on each device. It sees that this
    # one goes with `p`, before it sees that it is a constant.
    return jnp.where(p != p, x, x) if isinstance(p, jax.core.Tracer) else x


def ordered_after(x, never):
    """`x`, where `never` is no element's truth, but XLA does not know.

    No-op. A data dependency that makes XLA finish the read before the in-place write; without it XLA copies
    the buffer.
    """
    return jnp.where(never, jnp.zeros_like(x), x)
