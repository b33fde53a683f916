r"""Every framework's RMSProp under its own name: its arguments in its order, its defaults, its trajectory.

All of them keep v, the running mean of g^2, and divide by its root; centred, v - m^2 with m the running mean
of g. They differ in where eps stands, where v starts, whether the learning rate enters before the momentum
buffer b or after it, and what weight decay is:

    ==================  ==============  ===  ======================================  =======================
    function            denominator     v_0  momentum                                weight decay
    ==================  ==============  ===  ======================================  =======================
    hinton              sqrt(v) + eps   0    none                                    none
    torch               sqrt(v) + eps   0    b = momentum * b + u,       p -= lr*b   added to g
    keras               sqrt(v + eps)   0    b = momentum * b + lr * u,  p -= b      p -= lr * wd * p
    tensorflow          sqrt(v + eps)   1    b = momentum * b + lr * u,  p -= b      none
    timm                sqrt(v + eps)   1    either                                  added to g, or as Keras
    sonnet              sqrt(v + eps)   0    b = momentum * b + lr * u,  p -= b      none
    mlx                 sqrt(v) + eps   0    none                                    none
    graves              sqrt(v + eps)   0    b = momentum * b + lr * u,  p -= b      none
    dqn                 sqrt(v + eps)   0    none                                    none
    stable_baselines3   sqrt(v + eps)   1    b = momentum * b + u,       p -= lr*b   added to g
    mxnet               sqrt(v) + eps   0    none                                    added to g
    mxnet, centred      sqrt(v + eps)   0    b = momentum * b + lr * u,  p -= b      added to g
    ==================  ==============  ===  ======================================  =======================

Each function returns an :class:`optax.GradientTransformationExtraArgs` made of :func:`rmsprop_jax.rmsprop`
and Optax's parts, with its guarantees: float32 arithmetic at least, no root of a negative number, no
overflow. A learning rate is a number or a schedule, a function of the number of updates so far. What a
framework rejects raises ValueError here, as does what :func:`rmsprop_jax.rmsprop` rejects (a decay or
momentum of 1 or more). Parameter groups are :func:`optax.partition`. In configurations, a convention is its
name: :func:`get` and :func:`names`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import _checks
from rmsprop_jax._dtypes import clip, real
from rmsprop_jax._parts import chain, decayed_weights
from rmsprop_jax.optimizer import rmsprop

__all__ = [
    "dqn",
    "get",
    "graves",
    "hinton",
    "keras",
    "mlx",
    "mxnet",
    "names",
    "sonnet",
    "stable_baselines3",
    "tensorflow",
    "timm",
    "torch",
]


def get(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The convention of that name, for configurations.

    Hydra takes a path, ``_target_: rmsprop_jax.conventions.torch``, and Fiddle the function itself,
    ``fdl.Config(conventions.get("torch"), lr=7e-4)``. Where a configuration holds plain values, as with
    draccus, a convention is a string in it, and its arguments are a dictionary. So they are for tyro, which
    makes no options of what may be an array or a schedule too:
    ``conventions.torch(**tyro.cli(dict, default={"lr": 7e-4, "alpha": 0.99}))`` has ``--lr`` and ``--alpha``.
    Pydantic takes the functions as they are,
    ``validate_call(config={"arbitrary_types_allowed": True})(conventions.torch)``.

    Args:
      name: one of :func:`names`.

    Raises:
      ValueError: for another name, with those that there are.

    Example:
      >>> from rmsprop_jax import conventions
      >>> config = {"optimizer": "torch", "options": {"lr": 7e-4, "alpha": 0.99, "eps": 1e-5}}
      >>> tx = conventions.get(config["optimizer"])(**config["options"])
      >>> print(*conventions.names())
      dqn graves hinton keras mlx mxnet sonnet stable_baselines3 tensorflow timm torch
    """
    if name not in names():
        raise ValueError(f"Invalid name: {name=}, expected one of {', '.join(map(repr, names()))}.")
    return globals()[name]


def names() -> list[str]:
    """The conventions' names, such as for the choices of a command line, in alphabetical order."""
    return [name for name in __all__ if name not in ("get", "names")]


def hinton(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    beta: jax.typing.ArrayLike = 0.9,
    epsilon: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""The lecture's RMSProp (Tieleman and Hinton, Lecture 6.5, 2012).

    .. math::
      v_t &= \beta v_{t-1} + (1-\beta) g_t^2 \\
      p_t &= p_{t-1} - \alpha_t g_t / (\sqrt{v_t} + \epsilon)

    The slides give beta 0.9, and Hinton suggests a learning rate of 0.001; epsilon is later custom.

    Args:
      learning_rate: :math:`\alpha`, a number at least 0 or a schedule.
      beta: :math:`\beta`, in [0, 1).
      epsilon: :math:`\epsilon`, at least 0, outside of the root.
    """
    return rmsprop(
        learning_rate,
        _checks.decay("beta", beta),
        _checks.precise_number("epsilon", epsilon),
        eps_in_sqrt=False,
    )


def torch(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike | None = None,
    momentum: jax.typing.ArrayLike | None = None,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`torch.optim.RMSprop`, as read in PyTorch 2.13.

    .. math::
      g_t &\leftarrow \pm g_t + \lambda p_{t-1} \\
      v_t &= \alpha v_{t-1} + (1-\alpha) g_t^2 \\
      b_t &= \mu b_{t-1} + g_t / (\sqrt{v_t} + \epsilon) \\
      p_t &= p_{t-1} - \text{lr}_t b_t

    Published with it: torchbeast (lr 4.8e-4 annealed to 0, alpha 0.99, eps 0.01), A2C (lr 7e-4, alpha 0.99,
    eps 1e-5), WGAN (lr 5e-5), DPO (lr 5e-7 with 150 steps of warm-up). Complex parameters are two reals to
    PyTorch: wrap this in :func:`optax.contrib.split_real_and_imaginary`.

    Args:
      lr: a number at least 0 or a schedule.
      alpha: :math:`\alpha`, in [0, 1).
      eps: :math:`\epsilon`, at least 0, outside of the root.
      weight_decay: :math:`\lambda`, at least 0; None or 0 for none.
      momentum: :math:`\mu`, in [0, 1); None or 0 for no buffer.
      centered: whether the root is of :math:`v_t` less the squared mean of the gradients.
      maximize: whether the gradients are climbed: the minus of :math:`\pm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import conventions
      >>> tx = conventions.torch(lr=7e-4, alpha=0.99, eps=1e-5)
      >>> updates, state = tx.update(jnp.array([1.0, -1.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(4))
      [-0.007  0.007]
    """
    _checks.flag("maximize", maximize)
    tx = rmsprop(
        _checks.learning_rate("lr", lr),
        _checks.decay("alpha", alpha),
        eps,
        eps_in_sqrt=False,
        centered=centered,
        momentum=_momentum(momentum),
        lr_in_momentum=False,
    )
    ascent = optax.scale(-1.0) if maximize else optax.identity()
    return chain(ascent, decayed_weights(weight_decay), tx)


def keras(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    rho: jax.typing.ArrayLike = 0.9,
    momentum: jax.typing.ArrayLike | None = None,
    epsilon: jax.typing.ArrayLike = 1e-7,
    centered: bool = False,
    weight_decay: jax.typing.ArrayLike | None = None,
    clipnorm: jax.typing.ArrayLike | None = None,
    clipvalue: jax.typing.ArrayLike | None = None,
    global_clipnorm: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`keras.optimizers.RMSprop`, as read in Keras 3.15.

    .. math::
      g_t &\leftarrow \text{clip}(g_t) \\
      v_t &= \rho v_{t-1} + (1-\rho) g_t^2 \\
      b_t &= \mu b_{t-1} + \text{lr}_t g_t / \sqrt{v_t + \epsilon} \\
      p_t &= p_{t-1} - \text{lr}_t \lambda p_{t-1} - b_t

    `clipnorm` clips each parameter's gradient to an L2 norm, `global_clipnorm` all of them together,
    `clipvalue` each number; at most one of them may be given, and 0 clips nothing, as in Keras.
    ``exclude_from_weight_decay`` is :func:`optax.partition` with and without `weight_decay`.

    Args:
      learning_rate: a number at least 0 or a schedule.
      rho: :math:`\rho`, in [0, 1).
      momentum: :math:`\mu`, in [0, 1); None or 0 for no buffer.
      epsilon: :math:`\epsilon`, at least 0, under the root.
      centered: whether the root is of :math:`v_t` less the squared mean of the gradients.
      weight_decay: :math:`\lambda`, at least 0; None or 0 for none.
      clipnorm: clips each parameter's gradient to this L2 norm.
      clipvalue: clips each number of the gradients to this size.
      global_clipnorm: clips all gradients together to this L2 norm.

    Raises:
      ValueError: for more than one of the clip arguments.
    """
    tx = rmsprop(
        learning_rate,
        _checks.decay("rho", rho),
        _checks.precise_number("epsilon", epsilon),
        centered=centered,
        momentum=_momentum(momentum),
        weight_decay=weight_decay,
    )
    return chain(_clip(clipnorm=clipnorm, clipvalue=clipvalue, global_clipnorm=global_clipnorm), tx)


def tensorflow(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    momentum: jax.typing.ArrayLike | None = None,
    epsilon: jax.typing.ArrayLike = 1e-10,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`tf.compat.v1.train.RMSPropOptimizer`, as read in TensorFlow 2.21; its accumulator starts from 1.

    .. math::
      v_t &= \beta v_{t-1} + (1-\beta) g_t^2, \quad v_0 = 1 \\
      b_t &= \mu b_{t-1} + \text{lr}_t g_t / \sqrt{v_t + \epsilon} \\
      p_t &= p_{t-1} - b_t

    Published with it: EfficientNet and MnasNet (decay 0.9, momentum 0.9, epsilon 1e-3, 5 epochs of warm-up),
    Inception-v3 and MobileNet (decay 0.9, momentum 0.9, epsilon 1.0), IMPALA (decay 0.99, epsilon 0.1).

    Args:
      learning_rate: a number at least 0 or a schedule.
      decay: :math:`\beta`, in [0, 1).
      momentum: :math:`\mu`, in [0, 1); None or 0 for no buffer.
      epsilon: :math:`\epsilon`, at least 0, under the root.
      centered: whether the root is of :math:`v_t` less the squared mean of the gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import conventions
      >>> tx = conventions.tensorflow(0.5, epsilon=1e-3)
      >>> updates, state = tx.update(jnp.array([0.1, 0.2]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(4))
      [-0.0526 -0.1051]
    """
    return rmsprop(
        learning_rate,
        decay,
        _checks.precise_number("epsilon", epsilon),
        initial_scale=1.0,
        centered=centered,
        momentum=_momentum(momentum),
    )


def timm(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-10,
    weight_decay: jax.typing.ArrayLike | None = None,
    momentum: jax.typing.ArrayLike | None = None,
    centered: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    *,
    max_lr: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`timm.optim.RMSpropTF`, as read in timm 1.0.31: TensorFlow's rule with PyTorch's weight decay.

    .. math::
      g_t &\leftarrow g_t + \lambda p_{t-1} \\
      v_t &= \alpha v_{t-1} + (1-\alpha) g_t^2, \quad v_0 = 1 \\
      b_t &= \mu b_{t-1} + \text{lr}_t g_t / \sqrt{v_t + \epsilon} \\
      p_t &= p_{t-1} - b_t

    Published with it: timm's EfficientNet and MobileNetV3 (alpha 0.9, momentum 0.9, eps 1e-3, weight decay
    1e-5).

    Args:
      lr: learning rate, as the arguments after it under timm's names.
      decoupled_decay: the weights are reduced by lr * weight_decay of themselves, and g is left alone.
      corrected_weight_decay: with `decoupled_decay`, by lr^2 / max_lr * weight_decay (Defazio, 2025).
      lr_in_momentum: False for PyTorch's buffer, b = momentum * b + u and p -= lr * b.
      caution: with momentum, leaves out the entries of the step whose sign is not the gradient's, and scales
        each leaf's remaining ones up by their fraction, taken as 1/1000 at least (Liang et al., 2024).
      max_lr: the learning rate that timm's optimizer was built with, its peak. By default `lr`; to be given
        when that is a schedule and `corrected_weight_decay` is set.
    """
    _checks.flag("decoupled_decay", decoupled_decay)
    _checks.flag("corrected_weight_decay", corrected_weight_decay)
    _checks.flag("caution", caution)
    lr = _checks.learning_rate("lr", lr)
    momentum = _momentum(momentum)
    decay_rate = _corrected(lr, max_lr) if corrected_weight_decay else lr
    tx = rmsprop(
        lr, _checks.decay("alpha", alpha), eps, 1.0, True, centered, momentum, lr_in_momentum=lr_in_momentum
    )
    if caution and momentum is not None:
        tx = _cautious(tx)
    if decoupled_decay:
        return chain(tx, decayed_weights(weight_decay, None, decay_rate))
    return chain(decayed_weights(weight_decay), tx)


def sonnet(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    momentum: jax.typing.ArrayLike | None = None,
    epsilon: jax.typing.ArrayLike = 1e-10,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`sonnet.optimizers.RMSProp`, as read in Sonnet 2.0.2.

    .. math::
      v_t &= \beta v_{t-1} + (1-\beta) g_t^2 \\
      b_t &= \mu b_{t-1} + \text{lr}_t g_t / \sqrt{v_t + \epsilon} \\
      p_t &= p_{t-1} - b_t

    Args:
      learning_rate: a number at least 0 or a schedule.
      decay: :math:`\beta`, in [0, 1).
      momentum: :math:`\mu`, in [0, 1); None or 0 for no buffer.
      epsilon: :math:`\epsilon`, at least 0, under the root.
      centered: whether the root is of :math:`v_t` less the squared mean of the gradients.
    """
    epsilon = _checks.precise_number("epsilon", epsilon)
    return rmsprop(learning_rate, decay, epsilon, centered=centered, momentum=_momentum(momentum))


def mlx(
    learning_rate: optax.ScalarOrSchedule,
    alpha: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""`mlx.optimizers.RMSprop`, as read in MLX 0.32.

    .. math::
      v_t &= \alpha v_{t-1} + (1-\alpha) g_t^2 \\
      p_t &= p_{t-1} - \text{lr}_t g_t / (\sqrt{v_t} + \epsilon)

    Args:
      learning_rate: a number at least 0 or a schedule.
      alpha: :math:`\alpha`, in [0, 1).
      eps: :math:`\epsilon`, above 0, outside of the root.

    Raises:
      ValueError: for an `eps` of 0 too.
    """
    eps = _checks.precise_number("eps", eps)
    if isinstance(eps, float) and eps == 0:
        raise ValueError(f"Invalid eps: {eps=}, expected a number above 0.")
    return rmsprop(learning_rate, _checks.decay("alpha", alpha), eps, eps_in_sqrt=False)


def graves(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    decay: jax.typing.ArrayLike = 0.95,
    momentum: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    r"""The centred RMSProp of Graves, *Generating Sequences With Recurrent Neural Networks*, 2013, eq. 38-45.

    .. math::
      v_t &= \beta v_{t-1} + (1-\beta) g_t^2 \\
      m_t &= \beta m_{t-1} + (1-\beta) g_t \\
      b_t &= \mu b_{t-1} + \alpha_t g_t / \sqrt{v_t - m_t^2 + \epsilon} \\
      p_t &= p_{t-1} - b_t

    The defaults are the paper's, for its handwriting experiments.

    Args:
      learning_rate: :math:`\alpha`, a number at least 0 or a schedule.
      decay: :math:`\beta`, in [0, 1), of both means.
      momentum: :math:`\mu`, in [0, 1); None or 0 for no buffer.
      eps: :math:`\epsilon`, at least 0, under the root.
    """
    return rmsprop(learning_rate, decay, eps, centered=True, momentum=_momentum(momentum))


def dqn(
    learning_rate: optax.ScalarOrSchedule = 2.5e-4,
    decay: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""The centred RMSProp of DQN (Mnih et al., Nature, 2015), as in its published Lua code.

    .. math::
      v_t &= \beta v_{t-1} + (1-\beta) g_t^2 \\
      m_t &= \beta m_{t-1} + (1-\beta) g_t \\
      p_t &= p_{t-1} - \alpha_t g_t / \sqrt{v_t - m_t^2 + \epsilon}

    The paper's table calls the decay of m "gradient momentum" and eps "min squared gradient"; there is no
    momentum buffer. Its gradients come from the error clipped to [-1, 1].

    Args:
      learning_rate: :math:`\alpha`, a number at least 0 or a schedule.
      decay: :math:`\beta`, in [0, 1), of both means.
      eps: :math:`\epsilon`, at least 0, under the root.
    """
    return rmsprop(learning_rate, decay, eps, centered=True)


def stable_baselines3(
    lr: optax.ScalarOrSchedule = 1e-2,
    alpha: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike | None = None,
    momentum: jax.typing.ArrayLike | None = None,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""`stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike`, as read in Stable-Baselines3 2.9.

    .. math::
      g_t &\leftarrow g_t + \lambda p_{t-1} \\
      v_t &= \alpha v_{t-1} + (1-\alpha) g_t^2, \quad v_0 = 1 \\
      b_t &= \mu b_{t-1} + g_t / \sqrt{v_t + \epsilon} \\
      p_t &= p_{t-1} - \text{lr}_t b_t

    Recommended there for A2C that is to match Stable-Baselines 2 (lr 7e-4, alpha 0.99, eps 1e-5); its A2C's
    own default is `torch` with the same numbers.

    Args:
      lr: a number at least 0 or a schedule.
      alpha: :math:`\alpha`, in [0, 1).
      eps: :math:`\epsilon`, at least 0, under the root.
      weight_decay: :math:`\lambda`, at least 0; None or 0 for none.
      momentum: :math:`\mu`, in [0, 1); None or 0 for no buffer.
      centered: whether the root is of :math:`v_t` less the squared mean of the gradients.
    """
    tx = rmsprop(
        _checks.learning_rate("lr", lr),
        _checks.decay("alpha", alpha),
        eps,
        initial_scale=1.0,
        centered=centered,
        momentum=_momentum(momentum),
        lr_in_momentum=False,
    )
    return chain(decayed_weights(weight_decay), tx)


def mxnet(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    rho: jax.typing.ArrayLike = 0.9,
    momentum: jax.typing.ArrayLike = 0.9,
    epsilon: jax.typing.ArrayLike = 1e-8,
    centered: bool = False,
    wd: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`mxnet.optimizer.RMSProp`, as read in the Python step of MXNet 2.0.

    .. math::
      g_t &\leftarrow g_t + \lambda p_{t-1} \\
      v_t &= \rho v_{t-1} + (1-\rho) g_t^2 \\
      p_t &= p_{t-1} - \text{lr}_t g_t / (\sqrt{v_t} + \epsilon)

    Centred it is :func:`graves`, with epsilon under the root; only then is there momentum, and `momentum` is
    without effect otherwise. MXNet 1's kernel has epsilon under the root in both.

    Args:
      learning_rate: a number at least 0 or a schedule.
      rho: :math:`\rho`, in [0, 1).
      momentum: decay of the momentum buffer, in [0, 1), when centred; None or 0 for none.
      epsilon: :math:`\epsilon`, at least 0, outside of the root, or under it when centred.
      centered: whether the rule is that of :func:`graves`.
      wd: :math:`\lambda`, at least 0; None or 0 for none.
    """
    _checks.flag("centered", centered)
    tx = rmsprop(
        learning_rate,
        _checks.decay("rho", rho),
        _checks.precise_number("epsilon", epsilon),
        eps_in_sqrt=centered,
        centered=centered,
        momentum=_momentum(momentum) if centered else None,
    )
    return chain(decayed_weights(wd, name="wd"), tx)


def _momentum(value):
    """Frameworks write 0 for no momentum, Optax None."""
    if value is None:
        return None
    value = _checks.decay("momentum", value)
    return None if isinstance(value, float) and value == 0 else value


def _clip(**limits):
    """Keras's gradient clipping, of whose arguments at most one is not None."""
    limits = {name: _checks.number(name, limit) for name, limit in limits.items() if limit is not None}
    if len(limits) > 1:
        given = ", ".join(f"{name}={limit}" for name, limit in limits.items())
        raise ValueError(f"Invalid {given}: at most one of clipnorm, clipvalue and global_clipnorm.")
    rules = {
        "clipnorm": _clip_each_by_norm,
        "clipvalue": _clip_by_value,
        "global_clipnorm": optax.clip_by_global_norm,
    }
    for name, limit in limits.items():
        if not (isinstance(limit, float) and limit == 0):
            return rules[name](jnp.where(limit > 0, limit, jnp.inf))  # an array may be 0, which clips nothing
    return optax.identity()


def _clip_each_by_norm(limit):
    """Each leaf to an L2 norm of `limit` at most."""
    rule = optax.clip_by_global_norm(limit)
    return optax.stateless_with_tree_map(lambda g, _: rule.update(g, optax.EmptyState())[0])


def _clip_by_value(limit):
    """`optax.clip`, also of complex numbers, part by part."""
    return optax.stateless_with_tree_map(lambda g, _: clip(g, limit.astype(real(g.dtype))))


def _corrected(lr, max_lr):
    """The rate lr^2 / max_lr, a number or a schedule as `lr`."""
    peak = lr if max_lr is None else _checks.number("max_lr", max_lr)
    if callable(peak) or (isinstance(peak, float) and peak == 0):
        raise ValueError(
            f"Invalid max_lr: {max_lr=}, corrected_weight_decay needs the learning rate's peak, above 0."
        )
    return (lambda count: lr(count) ** 2 / peak) if callable(lr) else lr**2 / peak


def _cautious(inner):
    """Leaves out the entries of the step that point up the gradient, and scales up the others."""

    def mask(u, g):
        agrees = (jnp.sign(u) * jnp.sign(g) < 0).astype(u.dtype)
        return u * agrees / jnp.maximum(agrees.mean(), 1e-3)

    def update_fn(updates, state, params=None, **extra_args):
        steps, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(mask, steps, updates), state

    return inner._replace(update=update_fn)
