"""The optimizer: `scale_by_rms` and Optax's own parts in a chain.

lr_in_momentum=True, as in Optax and TensorFlow:      lr_in_momentum=False, as in PyTorch:

    b_t = momentum * b_{t-1} + learning_rate * u_t        b_t = momentum * b_{t-1} + u_t
    p_t = p_{t-1} - b_t                                   p_t = p_{t-1} - learning_rate * b_t

with u_t from `scale_by_rms`. They differ whenever the learning rate changes. Weight decay is decoupled
(Loshchilov and Hutter, 2019): p_t is reduced by learning_rate * weight_decay * p_{t-1} outside of both.
"""

from collections.abc import Callable

import jax
import optax

from rmsprop_jax import _checks, accumulators
from rmsprop_jax._parts import Transformation, decayed_weights, trace
from rmsprop_jax._tree import Tree, is_ours, refusal
from rmsprop_jax.transform import scale_by_rms

__all__ = ["rmsprop"]


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
    weight_decay: jax.typing.ArrayLike | None = None,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    accumulator: accumulators.Name | accumulators.Accumulator = "float32",
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
        ``learning_rate * weight_decay`` of itself, outside of `nu` and of the momentum buffer. At least 0;
        None for none.
      mask: which parameters decay: a tree of bools with the parameters' structure or a prefix of it, or a
        function from the parameters to one; None for all.
      accumulator: how `nu` is stored between updates: "float32", "bfloat16", "uint8", "factored" or one of
        your own, see :mod:`rmsprop_jax.accumulators`.
      momentum_dtype: dtype in which the momentum buffer is stored between updates, such as "bfloat16" (its
        name, as :func:`optax.inject_hyperparams` takes a class for a schedule), rounded without bias, and so
        is the update, which is read back from it; None for float32, or float64 for 64-bit parameters.
        Complex parameters keep their dtype.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` that knows its settings. Its state is the chain's: a
      tuple that begins with :class:`rmsprop_jax.ScaleByRmsState`; ``optax.tree.get(state, "nu")`` finds the
      accumulator.

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
    learning_rate = _checks.learning_rate("learning_rate", learning_rate)
    if isinstance(decay, jax.Array) or isinstance(mask, jax.Array):
        _checks.from_injected("mask", mask)
    nesterov = _checks.flag("nesterov", nesterov)
    lr_in_momentum = _checks.flag("lr_in_momentum", lr_in_momentum)

    scale = scale_by_rms(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, centered=centered, accumulator=accumulator
    )
    lr = optax.scale_by_learning_rate(learning_rate)
    buffer = optax.identity() if momentum is None else trace(momentum, nesterov, momentum_dtype)
    if momentum is None or not lr_in_momentum:
        rest = [buffer, decayed_weights(weight_decay, mask), lr]
    else:
        # After the buffer the updates are already scaled by -learning_rate, so the decay term must be
        # scaled by it too.
        rest = [lr, buffer, decayed_weights(weight_decay, mask, learning_rate)]
    updates_of = [optax.with_extra_args_support(part).update for part in rest]
    has_buffer = [False, *(part is buffer and momentum is not None for part in rest)]

    def init_fn(params):
        return tuple(part.init(params) for part in (scale, *rest))

    def update_fn(updates, state, params=None, **extra_args):
        _check_parts(state, has_buffer, lr_in_momentum)
        updates, rms = scale.update(updates, state[0])
        new = [rms]
        for update, own in zip(updates_of, state[1:], strict=True):
            updates, own = update(updates, own, params, count=state[0].count)
            new.append(own)
        return updates, tuple(new)

    return Transformation.of_parts(init_fn, update_fn, (scale, *rest))


def _check_parts(state, has_buffer, lr_in_momentum):
    """Raises ValueError for a state of another optimizer, or of this one with another momentum."""
    if not (isinstance(state, tuple) and len(state) == len(has_buffer) and is_ours(state[0])):
        raise ValueError(refusal(state))
    found = [isinstance(part, optax.TraceState) for part in state]
    if any(found) != any(has_buffer):
        raise ValueError(
            f"Invalid state: it has {'a' if any(found) else 'no'} momentum buffer, this optimizer has "
            f"{'momentum' if any(has_buffer) else 'no momentum'}."
        )
    if found != has_buffer:
        raise ValueError(
            f"Invalid lr_in_momentum: lr_in_momentum={lr_in_momentum}, but the state was made with "
            f"lr_in_momentum={not lr_in_momentum}, whose momentum buffer holds other numbers."
        )
