"""Float32 at least: the dtypes to compute in, and arrays that are cast and clipped in them."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np


@cache
def wide(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype to compute in: float32 for the floats below it, else `dtype` itself."""
    low = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32 if low else dtype)


def dtype_of(leaf: jax.typing.ArrayLike) -> np.dtype:
    """The dtype that JAX gives a leaf: an array, a `jax.ShapeDtypeStruct` or a Python number."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return jnp.result_type(leaf)
    # Only 64 bits may be other ones to JAX. Eager updates ask for each leaf.
    is_wide = isinstance(dtype, np.dtype) and dtype.itemsize >= 8
    return jax.dtypes.canonicalize_dtype(dtype) if is_wide else dtype


def is_array_like(leaf: object) -> bool:
    """Whether a leaf has a dtype: no string, no function, but a `jax.ShapeDtypeStruct` or a Python number."""
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)


def is_wide(dtype: np.dtype) -> bool:
    """Whether the package stores numbers in this dtype as they are: float32 and float64."""
    return dtype.kind == "f" and dtype.itemsize >= 4


def real(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype of the modulus: of a complex dtype its parts', else `dtype` itself."""
    return jnp.finfo(dtype).dtype


def widen(tree):
    """The tree with its leaves in `wide` dtypes."""

    def widened(x):
        dtype = dtype_of(x)
        return x if wide(dtype) == dtype else x.astype(wide(dtype))

    return jax.tree.map(widened, tree)


def narrow(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Casts `x` to `dtype`; what is finite stays finite."""
    if x.dtype == dtype:
        return x
    return clip(x, float(jnp.finfo(dtype).max)).astype(dtype)


def abs_sq(x):
    """|x|^2, real."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def times(z, x):
    """z * x for a real `x`; complex numbers part by part."""
    return jax.lax.complex(z.real * x, z.imag * x) if jnp.iscomplexobj(z) else z * x


def clip(x, limit):
    """Clips to [-limit, limit], complex numbers part by part. NaN stays NaN."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(jnp.clip(x.real, -limit, limit), jnp.clip(x.imag, -limit, limit))
    return jnp.clip(x, -limit, limit)


def clip_for_square(g):
    """Clips `g`, in float32 at least, so that its square and a sum of a few squares are finite."""
    g = g.astype(wide(g.dtype))
    return clip(g, 2.0 ** (jnp.finfo(g.dtype).maxexp // 2 - 2))
