"""RMSProp's rule: divide each gradient by a running root mean square of itself.

    nu_t = decay * nu_{t-1} + (1 - decay) * g_t^2
    u_t  = g_t / sqrt(nu_t + eps)              eps_in_sqrt=True   (Optax, TensorFlow, Keras)
    u_t  = g_t / (sqrt(nu_t) + eps)            eps_in_sqrt=False  (PyTorch, Hinton)

Centred, `nu` is the second moment about the mean `mu`, kept by a recursion of squares, so that rounding
cannot make it negative:

    mu_t = decay * mu_{t-1} + (1 - decay) * g_t
    nu_t = decay * nu_{t-1} + (1 - decay) / decay * (g_t - mu_t)^2

From nu_0 = initial_scale and mu_0 = 0 this is initial_scale * decay^t + E[g^2] - E[g]^2, with E the
exponentially weighted sums.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, storage


class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`, the same fields for every option.

    Attributes:
      count: updates so far, int32 scalar.
      nu: running mean of squared gradients, or of squared deviations from `mu` when centred; the
        parameters' tree and shapes, real, float32 (float64 for 64-bit parameters), or the codes for them of
        another accumulator, see :mod:`rmsprop_jax.storage`.
      mu: running mean of gradients when centred, else None; as `nu`, complex for complex parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, as in Optax's states
    nu: optax.Updates
    mu: optax.Updates | None


def scale_by_rms(
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    accumulator: str | storage.Accumulator = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the root of the running mean of their squares.

    .. math::
      \nu_t &= \beta \nu_{t-1} + (1-\beta) |g_t|^2 \\
      u_t &= g_t / \sqrt{\nu_t + \epsilon} \quad\text{or}\quad g_t / (\sqrt{\nu_t} + \epsilon)

    The arithmetic is float32, or float64 for 64-bit gradients, and the updates come back in the
    gradients' dtypes. A zero gradient gives a zero update, also with ``eps=0``. A finite gradient, however
    large, leaves finite state and a finite update, not centred at most ``1 / sqrt(1 - decay)``; NaN and
    infinite gradients give NaN updates, for :func:`optax.apply_if_finite` to see.

    Args:
      decay: :math:`\beta`, in [0, 1): 0.9 remembers about 10 updates, 0.999 about 1,000.
      eps: :math:`\epsilon`, at least 0; in units of the squared gradient when `eps_in_sqrt`, else of the
        gradient.
      initial_scale: value of :math:`\nu_0`, at least 0. TensorFlow 1 starts from 1, PyTorch from 0.
      eps_in_sqrt: whether `eps` is added under the root or to the root.
      bias_correction: whether :math:`\nu_t` is divided by :math:`1 - \beta^t`, as in Adam, so that the
        first updates are not up to :math:`1/\sqrt{1-\beta}` times too large.
      centered: whether :math:`\nu` is the variance, the second moment about the running mean (Graves, 2013).
      accumulator: how :math:`\nu` is kept between updates: "float32" (float64 for 64-bit parameters),
        "bfloat16", "uint8" (half and a quarter of the memory, rounded without bias) or one of your own, see
        :mod:`rmsprop_jax.storage`. Centred, :math:`\mu` stays float32.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with state :class:`ScaleByRmsState`.

    Raises:
      ValueError: when it is built, for a concrete hyper-parameter out of range, an array
        hyper-parameter of less than float32, or `bias_correction` from an `initial_scale` that is not 0;
        in ``init``, for parameters that are not floating or complex; in ``update``, for gradients
        whose tree, shape or dtype does not fit the state, naming the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import scale_by_rms
      >>> tx = scale_by_rms(decay=0.9)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([10.0, 1.0]), state)
      >>> print([f"{u:.4f}" for u in updates], state.nu)
      ['3.1623', '3.1623'] [10.   0.1]

    References:
      Tieleman and Hinton, `Lecture 6.5: RMSProp
      <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012

      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013
    """
    decay = _checks.precise_number("decay", decay, below=1)
    eps = _checks.precise_number("eps", eps)
    initial_scale = _checks.precise_number("initial_scale", initial_scale)
    _checks.flag("eps_in_sqrt", eps_in_sqrt)
    _checks.flag("bias_correction", bias_correction)
    _checks.flag("centered", centered)
    codec = storage.named(accumulator)
    numbers = {"decay": decay, "eps": eps}
    constants = tuple((name, x) for name, x in numbers.items() if isinstance(x, float))
    arrays = {name: x for name, x in numbers.items() if not isinstance(x, float)}
    if bias_correction and isinstance(initial_scale, float) and initial_scale != 0:
        raise ValueError(f"Invalid {initial_scale=}: bias_correction corrects a start from 0.")

    def init_fn(params):
        dtypes = jax.tree_util.tree_map_with_path(_accumulator_dtype, params)
        nu = jax.tree.map(lambda p, t: full_like(p, initial_scale, _real(t)), params, dtypes)
        if codec is not None:
            leaves, treedef = jax.tree.flatten(nu)
            nu = jax.tree.unflatten(
                treedef, [storage.encoded(x, codec, leaf, 0) for leaf, x in enumerate(leaves)]
            )
        mu = jax.tree.map(lambda p, t: full_like(p, 0, t), params, dtypes) if centered else None
        return ScaleByRmsState(jnp.zeros([], jnp.int32), nu, mu)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        count = _incremented(state.count)
        rule = partial(
            _rule,
            constants=constants,
            arrays=arrays,
            count=count if bias_correction else None,
            eps_in_sqrt=bool(eps_in_sqrt),
            codec=codec,
        )
        if centered != (state.mu is not None) and jax.tree.leaves(state.nu):
            raise ValueError(f"Invalid state: it was initialised with centered={not centered}.")
        grads, treedef, nus, mus = leaves_that_fit(updates, state)
        where = [None if codec is None else (np.uint32(leaf), count) for leaf in range(len(grads))]
        results = [rule(*of_leaf) for of_leaf in zip(grads, nus, mus, where, strict=True)]
        us, nus, mus = zip(*results, strict=True) if results else ((), (), ())
        mu = treedef.unflatten(mus) if centered else None
        return treedef.unflatten(us), ScaleByRmsState(count, treedef.unflatten(nus), mu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Where nothing is jitted: one operation instead of five.
_incremented = jax.jit(optax.safe_increment, inline=True)


@partial(jax.jit, static_argnames=("constants", "eps_in_sqrt", "codec"))
def _rule(g, nu, mu, where, *, constants, arrays, count, eps_in_sqrt, codec):
    """The equations for one leaf. Jitted: inside a jit it is free, and equal leaves are lowered once."""
    numbers = dict(constants) | arrays  # constants of the program need not be passed to it for each leaf
    decay, eps = numbers["decay"], numbers["eps"]
    one_minus_decay = 1 - decay  # of the Python number: the float32 nearest 0.999 is off by 3e-5 of it
    dtype = wide(g.dtype)
    limits = jnp.finfo(dtype)
    decay, one_minus_decay, eps = (jnp.asarray(x, limits.dtype) for x in (decay, one_minus_decay, eps))
    g_wide = g.astype(dtype)
    g_clipped = _clip(g_wide, 2.0 ** (limits.maxexp // 2 - 2))  # its square is finite, and sums of a few
    nu_old = (nu if codec is None else codec.decode(nu)).astype(limits.dtype)
    if mu is None:
        now = one_minus_decay * abs_sq(g_clipped)
    else:
        mean = one_minus_decay * g_clipped + decay * mu.astype(dtype)
        # With the old mean it is decay * (1 - decay) * (g - mu)^2, but then XLA copies an accumulator.
        # Where decay is below the rounding error, so are both.
        ratio = one_minus_decay / jnp.maximum(decay, limits.eps)
        now = ratio * abs_sq(g_clipped - mean)
        mu = mean.astype(mu.dtype)
    nu_new = now + decay * nu_old
    if codec is None:
        nu = nu_new.astype(nu.dtype)
    else:
        nu = storage.encoded(nu_new, codec, *where)
        # From what is stored, so that XLA can overwrite the old codes before or after. Where a large gradient
        # meets the end of the codes' range, `now` keeps the bound of 1 / sqrt(1 - decay).
        nu_new = jnp.maximum(codec.decode(nu).astype(limits.dtype), now)

    # Times the reciprocal: XLA makes one of a division here and there, and meshes would differ in a last bit.
    nu_hat = nu_new if count is None else nu_new * (1 / (1 - decay ** count.astype(limits.dtype)))
    # At least the smallest normal number under the root, so that no gradient is 0 / 0 or 1 / 0.
    if eps_in_sqrt:
        scale = jax.lax.rsqrt(jnp.maximum(nu_hat + eps, limits.tiny))
    else:
        scale = 1 / (jnp.sqrt(jnp.maximum(nu_hat, limits.tiny)) + eps)
    # g - g is 0, or NaN where the clip hid an infinity.
    u = g_clipped * scale + (g_wide - g_wide)
    return narrow(u, g.dtype), nu, mu


def dtype_of(leaf: jax.typing.ArrayLike) -> np.dtype:
    """The dtype of a leaf, which may be an array, a `jax.ShapeDtypeStruct` or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def full_like(p: jax.typing.ArrayLike, value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`jnp.full_like`; inside jit too it has the sharding of `p`."""
    x = jnp.full_like(p, value, dtype=dtype)
    # In a jitted init the compiler would place a constant, and all of it on each device. It sees that this
    # one goes with `p`, before it sees that it is a constant.
    return jnp.where(p != p, x, x) if isinstance(p, jax.core.Tracer) else x


@cache
def wide(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype to compute in: float32 for the floats below it, else `dtype` itself."""
    low = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32 if low else dtype)


def narrow(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Casts `x` to `dtype`; what is finite stays finite."""
    if x.dtype == dtype:
        return x
    return _clip(x, float(jnp.finfo(dtype).max)).astype(dtype)


def _real(dtype):
    return jnp.finfo(dtype).dtype


def abs_sq(x):
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def _clip(x, limit):
    """Clips to [-limit, limit], complex numbers part by part. NaN stays NaN."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(jnp.clip(x.real, -limit, limit), jnp.clip(x.imag, -limit, limit))
    return jnp.clip(x, -limit, limit)


def _accumulator_dtype(path, param):
    dtype = dtype_of(param)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"Parameter {leaf_name(path)} has dtype {dtype}, expected floating or complex. "
            "optax.masked or optax.partition leave such parameters out."
        )
    return wide(dtype)


def leaves_that_fit(updates, state):
    """Leaves of the gradients, their treedef, and the accumulators' leaves, once all of them fit."""
    grads, treedef = jax.tree.flatten(updates)
    try:
        nus = treedef.flatten_up_to(state.nu)  # type: ignore[attr-defined]
        mus = [None] * len(nus) if state.mu is None else treedef.flatten_up_to(state.mu)  # type: ignore[attr-defined]
    except ValueError:
        raise ValueError(_tree_mismatch(updates, state.nu)) from None
    for index, (g, nu, mu) in enumerate(zip(grads, nus, mus, strict=True)):
        if (misfit := _misfit(g, nu, mu)) is not None:
            path, _ = jax.tree_util.tree_leaves_with_path(updates)[index]
            raise ValueError(f"Gradient {leaf_name(path)} {misfit}")
    return grads, treedef, nus, mus


def _misfit(g, nu, mu):
    shape, expected = jnp.shape(g), getattr(nu, "shape", "a subtree")
    if shape != expected:
        return f"has shape {shape}, the state was initialised for {expected}."
    dtype = dtype_of(g)
    if dtype == jax.dtypes.float0:
        return "has dtype float0: its parameter is not differentiable. optax.masked leaves it out."
    if not jnp.issubdtype(dtype, jnp.inexact):
        return f"has dtype {dtype}, expected floating or complex."
    if mu is not None and jnp.iscomplexobj(g) and not jnp.iscomplexobj(mu):
        return f"has dtype {dtype}, the state was initialised for real gradients."
    return None


def _tree_mismatch(updates, nu):
    def names(tree):
        return {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}

    missing, unexpected = sorted(names(nu) - names(updates)), sorted(names(updates) - names(nu))
    parts = [f"{what} {', '.join(some)}" for what, some in (("lack", missing), ("add", unexpected)) if some]
    detail = " and ".join(parts) or f"are {jax.tree.structure(updates)}, expected {jax.tree.structure(nu)}"
    return f"The gradients' tree does not fit the state: they {detail}."


def leaf_name(path):
    return jax.tree_util.keystr(path) or "(the whole tree)"
