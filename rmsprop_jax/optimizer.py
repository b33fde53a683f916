"""The optimizer: `scale_by_rms` and Optax's own parts in a chain.

lr_in_momentum=True, as in Optax and TensorFlow:      lr_in_momentum=False, as in PyTorch:

    b_t = momentum * b_{t-1} + learning_rate * u_t        b_t = momentum * b_{t-1} + u_t
    p_t = p_{t-1} - b_t                                   p_t = p_{t-1} - learning_rate * b_t

with u_t from `scale_by_rms`. They differ whenever the learning rate changes. Weight decay is decoupled
(Loshchilov and Hutter, 2019): p_t is reduced by learning_rate * weight_decay * p_{t-1} outside of both.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, rounding, storage
from rmsprop_jax.transform import dtype_of, full_like, narrow, scale_by_rms, wide


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    lr_in_momentum: bool = True,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: optax.MaskOrFn | None = None,
    accumulator: str | storage.Accumulator = "float32",
    momentum_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RMSProp: each parameter's step is divided by the running root mean square of its gradients.

    .. math::
      \nu_t &= \beta \nu_{t-1} + (1-\beta) g_t^2 \\
      p_t &= p_{t-1} - \alpha_t g_t / \sqrt{\nu_t + \epsilon}

    The positional arguments and the default's trajectory are those of :func:`optax.rmsprop`. Arithmetic,
    accumulators and the momentum buffer are float32 (float64 for 64-bit parameters) whatever the
    parameters' dtype; the updates come back in the gradients' dtypes and the parameters' shapes.

    Args:
      learning_rate: :math:`\alpha`, a number at least 0 or a schedule, see :func:`rmsprop_jax.warmup`.
      decay: :math:`\beta`, in [0, 1): 0.9 remembers about 10 updates, 0.99 100, 0.999 1,000.
      eps: :math:`\epsilon`, at least 0.
      initial_scale: value of :math:`\nu_0`, at least 0. TensorFlow 1 starts from 1, PyTorch from 0.
      eps_in_sqrt: True: :math:`\sqrt{\nu + \epsilon}`, as in TensorFlow and Keras; False:
        :math:`\sqrt{\nu} + \epsilon`, as in PyTorch.
      centered: whether to divide by the standard deviation instead of the root mean square (Graves, 2013).
      momentum: decay of the momentum buffer, in [0, 1); None for no buffer.
      nesterov: whether the momentum is Nesterov's; without `momentum` it has no effect.
      bias_correction: whether :math:`\nu_t` is divided by :math:`1 - \beta^t`, as in Adam.
      lr_in_momentum: whether the learning rate enters before the momentum buffer (Optax, TensorFlow) or
        after it (PyTorch). The two differ whenever the learning rate changes.
      weight_decay: decoupled, as in :func:`optax.adamw`: the parameter is reduced by
        ``learning_rate * weight_decay`` of itself, outside of `nu` and of the momentum buffer. At least 0.
      mask: which parameters decay: a tree of bools with the parameters' structure or a prefix of it, or a
        function from the parameters to one; None for all.
      accumulator: how `nu` is kept between updates, see :func:`rmsprop_jax.scale_by_rms`.
      momentum_dtype: dtype in which the momentum buffer is kept between updates, such as "bfloat16" (its
        name, as :func:`optax.inject_hyperparams` takes a class for a schedule), rounded without bias; None
        for float32, or float64 for 64-bit parameters. Complex parameters keep their dtype.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Its state is the chain's: a tuple that begins with
      :class:`rmsprop_jax.ScaleByRmsState`; ``optax.tree.get(state, "nu")`` finds the accumulator.

    Raises:
      ValueError: as :func:`rmsprop_jax.scale_by_rms`, and for a concrete `learning_rate`, `momentum`,
        `weight_decay` or `momentum_dtype` out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from rmsprop_jax import rmsprop, warmup
      >>> def loss(params):
      ...     return jnp.sum(params["w"] ** 2 * jnp.array([1.0, 100.0]))
      >>> tx = optax.chain(optax.clip_by_global_norm(100.0), rmsprop(warmup(0.03), momentum=0.5))
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> print(loss(params) < 0.1)
      True

    References:
      Tieleman and Hinton, `Lecture 6.5: RMSProp
      <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012

      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013

      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019
    """
    if not callable(learning_rate):
        learning_rate = _checks.number("learning_rate", learning_rate)
    weight_decay = _checks.number("weight_decay", weight_decay)
    _checks.flag("nesterov", nesterov)
    _checks.flag("lr_in_momentum", lr_in_momentum)

    scale = scale_by_rms(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, centered=centered, accumulator=accumulator
    )
    lr = optax.scale_by_learning_rate(learning_rate)
    trace = optax.identity() if momentum is None else _trace(momentum, nesterov, momentum_dtype)
    if momentum is None or not lr_in_momentum:
        parts = [trace, decayed_weights(weight_decay, mask), lr]
    else:
        # Out of the buffer the updates have their sign and learning rate, and the weights bring their own.
        parts = [lr, trace, decayed_weights(weight_decay, mask, learning_rate)]
    return at_least_float32(_counted(optax.chain(scale, *parts)))


def at_least_float32(inner):
    """`inner` on gradients widened to float32; its updates in the gradients' dtypes."""

    def update_fn(updates, state, params=None, **extra_args):
        dtypes = jax.tree.map(dtype_of, updates)
        updates, state = inner.update(_widen(updates), state, params, **extra_args)
        return jax.tree.map(narrow, updates, dtypes), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _counted(inner):
    """`inner`, a chain that begins with `scale_by_rms`, with its count of updates for the parts after it."""

    def update_fn(updates, state, params=None, **extra_args):
        return inner.update(updates, state, params, **extra_args, rms_count=state[0].count)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _trace(decay, nesterov, dtype):
    """`optax.trace`, computed in float32 at least and kept between updates in `dtype`."""
    decay = _checks.precise_number("momentum", decay, below=1)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Invalid momentum_dtype: momentum_dtype={dtype!r}, expected a floating dtype.")

    def init_fn(params):
        def zeros(p):
            own = wide(dtype_of(p))
            return full_like(p, 0, own if dtype is None or jnp.iscomplexobj(p) else dtype)

        return optax.TraceState(jax.tree.map(zeros, params))

    def update_fn(updates, state, params=None, *, rms_count, **extra_args):
        del params, extra_args
        leaf = itertools.count()

        def kept(new, old):
            if new.dtype == old.dtype:
                return new
            # From the other end of the integers, so that they are not the thresholds of the accumulators.
            where = np.uint32(2**32 - 1 - next(leaf))
            return rounding.to_dtype(new, old.dtype, rounding.thresholds(new.shape, where, rms_count))

        def traced(buffers):
            return jax.tree.map(lambda g, buffer: _traced(g, buffer, decay), updates, buffers)

        new = traced(_widen(state.trace))
        updates = traced(new) if nesterov else new
        return updates, optax.TraceState(jax.tree.map(kept, new, state.trace))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@partial(jax.jit, inline=True)
def _traced(g, buffer, decay):
    """`optax.trace` of one leaf. Where nothing is jitted: one operation instead of two."""
    return optax.trace(decay).update(g, optax.TraceState(buffer))[0]


def decayed_weights(weight_decay, mask, learning_rate=None):
    """Adds weight_decay * p to the updates or, given the learning rate, -learning_rate * weight_decay * p."""
    if isinstance(weight_decay, float) and weight_decay == 0:
        return optax.identity()  # which needs no parameters
    if learning_rate is None:
        factor = weight_decay
    elif callable(learning_rate):
        factor = lambda count: -learning_rate(count) * weight_decay  # noqa: E731
    else:
        factor = -learning_rate * weight_decay
    inner = optax.add_decayed_weights(factor, mask)

    def update_fn(updates, state, params=None):
        return inner.update(updates, state, _widen(params))

    return optax.GradientTransformation(inner.init, update_fn)


def _widen(tree):
    def widen(x):
        dtype = wide(dtype_of(x))
        return x if dtype == dtype_of(x) else x.astype(dtype)

    return jax.tree.map(widen, tree)
