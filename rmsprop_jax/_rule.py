"""RMSProp's rule for one leaf: average, divide.

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

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from rmsprop_jax import _checks, accumulators
from rmsprop_jax._division import divided
from rmsprop_jax._dtypes import abs_sq, clip_for_square, narrow, times, wide


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, init=False)
class Settings:
    """The hyper-parameters that an RMSProp's rule needs.

    An optimizer of this package has them as its attribute `settings`. For any other, such as one of Optax or
    inside one of Optax's chains, :func:`rmsprop_jax.diagnostics.watch` and
    :func:`rmsprop_jax.diagnostics.measure` take them.

    A pytree whose leaves are the numbers that arrive as arrays, such as those of `optax.inject_hyperparams`;
    Python numbers, flags and the accumulator are its structure. So under `jax.jit` the former are operands,
    the latter constants of the program.

    Attributes:
      decay: in [0, 1), a Python float or a scalar array of float32 at least.
      eps: at least 0, as `decay`.
      eps_in_sqrt: whether `eps` is added under the root or to the root.
      bias_correction: whether `nu` is divided by ``1 - decay**count`` before it is used.
      centered: whether `nu` is the second moment about the running mean `mu`.
      accumulator: what stores `nu`: a name or an object of :mod:`rmsprop_jax.accumulators`.

    Raises:
      ValueError: for a number out of range, an array of less than float32, a flag that is no bool, or an
        unknown accumulator, naming the argument.

    Example:
      >>> import rmsprop_jax
      >>> settings = rmsprop_jax.Settings(decay=0.99, eps=1e-5)
      >>> settings == rmsprop_jax.rmsprop(1e-3, decay=0.99, eps=1e-5).settings
      True
    """

    decay: float | jax.Array
    eps: float | jax.Array
    eps_in_sqrt: bool
    bias_correction: bool
    centered: bool
    accumulator: accumulators.Accumulator

    def __init__(
        self,
        decay: jax.typing.ArrayLike,
        eps: jax.typing.ArrayLike = 1e-8,
        eps_in_sqrt: bool = True,
        bias_correction: bool = False,
        centered: bool = False,
        accumulator: accumulators.Name | str | accumulators.Accumulator = "float32",
    ) -> None:
        self.__dict__.update(
            decay=_checks.decay("decay", decay),
            eps=_checks.precise_number("eps", eps),
            eps_in_sqrt=_checks.flag("eps_in_sqrt", eps_in_sqrt),
            bias_correction=_checks.flag("bias_correction", bias_correction),
            centered=_checks.flag("centered", centered),
            accumulator=accumulators.resolve(accumulator),
        )

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return self._flat

    @cached_property  # an eager update flattens the settings for each leaf
    def _flat(self) -> tuple[tuple[Any, ...], Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: values.pop(name) for name in ("decay", "eps") if not isinstance(values[name], float)}
        return tuple(arrays.values()), (tuple(arrays), tuple(values.items()))

    @classmethod
    def tree_unflatten(cls, structure: Any, arrays: Iterable[Any]) -> "Settings":
        names, values = structure
        self = object.__new__(cls)  # unchecked: JAX puts None, specs and other objects where arrays were
        self.__dict__.update(zip(names, arrays, strict=True))
        self.__dict__.update(values)
        return self

    def decay_as(self, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        """decay and 1 - decay, the difference of the Python number: float32's 0.999 is off by 3e-5 of it."""
        return jnp.asarray(self.decay, dtype), jnp.asarray(1 - self.decay, dtype)

    def inverse_root(self, nu: jax.Array) -> jax.Array:
        """The factor of a gradient, 1 / sqrt(nu + eps) or 1 / (sqrt(nu) + eps), finite for any nu."""
        return divided(jnp.ones_like(nu), nu, self)


@jax.jit
def rule(g: jax.Array, nu: Any, mu: Any, leaf: Any, count: Any, settings: Settings) -> tuple[Any, Any, Any]:
    """The update of one leaf and its new accumulators: `(u, nu, mu)`.

    Jitted for eager callers; under an outer jit it is free, and equal leaves are lowered once.

    Args:
      g: the gradient.
      nu: as the accumulator stores it.
      mu: the running mean, None where not centred.
      leaf: the number of the leaf, for `rounding.thresholds`; None where nothing is rounded.
      count: updates so far, this one included; None where nothing depends on it.
      settings: the optimizer's.
    """
    nu, read, mu = averages(g, nu, mu, leaf, count, settings)
    u = divided(clip_for_square(g), corrected(read, count, settings), settings)
    return narrow(as_finite_as(g, u), g.dtype), nu, mu


def averages(g, nu, mu, leaf, count, settings):
    """The running averages with `g` in them: `nu` stored, the same read back, and `mu`."""
    dtype = jnp.finfo(g.dtype).dtype
    decay, one_minus_decay = settings.decay_as(wide(dtype))
    thresholds = None if leaf is None else accumulators.thresholds_of(leaf, count)

    def added(g):
        return one_minus_decay * abs_sq(clip_for_square(g))

    def added_about_mean(g):
        # Algebraically decay * (1 - decay) * (g - mu_old)^2; written with the new mean because the old one
        # would stay live and XLA would copy it. `maximum` avoids 0/0 at decay = 0, where g - mean is rounding
        # error.
        ratio = one_minus_decay / jnp.maximum(decay, jnp.finfo(decay.dtype).eps)
        return ratio * abs_sq(clip_for_square(g) - mean)

    if mu is not None:
        clipped = clip_for_square(g)
        mean = times(clipped, one_minus_decay) + times(mu.astype(clipped.dtype), decay)
        mu, added = mean.astype(mu.dtype), added_about_mean
    return *settings.accumulator.average(nu, g, added, decay, thresholds), mu


def corrected(nu, count, settings):
    """`nu` over 1 - decay^count, for a start from zero."""
    if not settings.bias_correction:
        return nu
    decay, _ = settings.decay_as(nu.dtype)
    # Times the reciprocal: XLA makes one of a division here and there, and meshes would differ in a last bit.
    return nu * (1 / (1 - decay ** count.astype(nu.dtype)))


def as_finite_as(g, u):
    """`u`, NaN where `g` is infinite or NaN: the clip would hide an infinity."""
    g = g.astype(u.dtype)
    return u + (g - g)
