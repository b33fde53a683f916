"""The figures of one layer: what they are, and their formulas.

A figure is a field of :class:`Measurement`, with its line there, and a property of `_Layer` of that name.
"""

from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rmsprop_jax import accumulators
from rmsprop_jax._dtypes import abs_sq, real, times, wide
from rmsprop_jax._rule import Settings
from rmsprop_jax._tree import variance

Figures = dict[str, jax.Array]  # by the layer's name


@partial(jax.export.register_namedtuple_serialization, serialized_name="rmsprop_jax.Measurement")
class Measurement(NamedTuple):
    """Figures of one update, or of several: stacked by `jax.lax.scan`, each has a leading axis of time.

    Every field but `step` is a dictionary from the layer's path to a float32 scalar. With g the gradient, u
    the update, p the parameter before it and nu the accumulator after it, and rms(x) = sqrt(mean(x^2)), which
    is infinite where x^2 or its sum overflows float32:

    Attributes:
      step: updates so far, this one included; int32 scalar.
      gradient_rms: rms(g).
      accumulator_rms: sqrt(mean(nu)), the rms of the gradients that it remembers.
      staleness: accumulator_rms / gradient_rms; far above 1 where gradients are small beside past ones.
      update_rms: rms(u).
      update_ratio: rms(u) / rms(p); infinite for a parameter of zeros.
      learning_rate: rms(u) / rms(g / sqrt(nu + eps)): what multiplies the normalised gradients, so it has
        schedules and bias correction in it, and is larger with momentum. [*]
      effective_rate: learning_rate / sqrt(nu + eps), the median: what multiplies the gradients. [*]
      effective_rate_spread: its 90% quantile over its 10% quantile, 1 where SGD would do as well. [*]
      eps_share: of the elements with a gradient, those whose step is set by eps: nu < eps, or
        sqrt(nu) < eps where eps is outside of the root. [*]
      stuck_share: of the elements whose accumulator is not 0, those where it cannot fall, as decay * nu
        rounds to nu: `optax.rmsprop`'s in bfloat16. 0 for this package's, which round without bias. [*]
      nonfinite_share: gradients that are infinite or NaN.
      bias_correction_factor: 1 - decay^step, how much of the accumulator comes from gradients.
      noise_to_signal: sqrt(nu) / rms(mu), the gradients' standard deviation over their mean, where centred;
        else NaN. What one noisy gradient leaves in mu keeps it below sqrt((1 + decay) / (1 - decay)).
      descent: -sum(g * u), the fall of the loss that this update makes, to first order.

    [*] from a subsample, about evenly spaced, of at most 4,096 elements of a layer.
    """

    step: jax.Array
    gradient_rms: Figures
    accumulator_rms: Figures
    staleness: Figures
    update_rms: Figures
    update_ratio: Figures
    learning_rate: Figures
    effective_rate: Figures
    effective_rate_spread: Figures
    eps_share: Figures
    stuck_share: Figures
    nonfinite_share: Figures
    bias_correction_factor: Figures
    noise_to_signal: Figures
    descent: Figures


FIELDS = Measurement._fields[1:]


class _Layer:
    """A layer's arrays, in float32 at least, and its figures."""

    def __init__(self, g, u, p, nu, mu, step, settings, *, ours, accumulator, axes):
        self.step, self.settings, self.axes = step, settings, axes
        # Rounded to nearest, unless this package stores it.
        self.stored = None if ours else self._sample(nu)
        self.g, self.u, self.p, self.nu, self.mu = _in_one_precision(g, u, p, nu, mu)
        if mu is not None and not ours:
            self.nu = variance(self.nu, self.mu)  # Optax's is the raw moment
        self.some_g, self.some_u, self.some_nu = map(self._sample, (self.g, self.u, self.nu))

    @cached_property
    def gradient_rms(self):
        return self._rms(self.g)

    @cached_property
    def accumulator_rms(self):
        return jnp.sqrt(self._mean(self.nu))

    @property
    def staleness(self):
        return self.accumulator_rms / self.gradient_rms

    @cached_property
    def update_rms(self):
        return self._rms(self.u)

    @property
    def update_ratio(self):
        return self.update_rms / self._rms(self.p)

    @cached_property
    def learning_rate(self):
        return _rms(self.some_u) / _rms(times(self.some_g, self._inverse_root))

    @property
    def effective_rate(self):
        return self.learning_rate * self._quantiles[1]

    @property
    def effective_rate_spread(self):
        return self._quantiles[2] / self._quantiles[0]

    @property
    def eps_share(self):
        eps = jnp.asarray(self.settings.eps, self.some_nu.dtype)
        by_eps = self.some_nu < eps if self.settings.eps_in_sqrt else jnp.sqrt(self.some_nu) < eps
        return _share(by_eps, self.some_g != 0)

    @property
    def stuck_share(self):
        if self.stored is None:
            return 0.0
        decay, _ = self.settings.decay_as(self.stored.dtype)
        return _share(decay * self.stored == self.stored, self.stored > 0)

    @property
    def nonfinite_share(self):
        return self._mean(~jnp.isfinite(self.g))

    @property
    def bias_correction_factor(self):
        _, one_minus_decay = self.settings.decay_as(jnp.float32)
        return -jnp.expm1(self.step.astype(jnp.float32) * jnp.log1p(-one_minus_decay))

    @property
    def noise_to_signal(self):
        return jnp.nan if self.mu is None else self.accumulator_rms / self._rms(self.mu)

    @property
    def descent(self):
        fall = -jnp.sum((self.g * jnp.conj(self.u)).real)
        return jax.lax.psum(fall, self.axes) if self.axes else fall

    @cached_property
    def _inverse_root(self):
        return self.settings.inverse_root(self.some_nu)

    @cached_property
    def _quantiles(self):
        return _quantiles(self._inverse_root, self.some_nu > 0, (0.1, 0.5, 0.9))

    def _mean(self, x):
        return jax.lax.pmean(jnp.mean(x), self.axes) if self.axes else jnp.mean(x)

    def _rms(self, x):
        return jnp.sqrt(self._mean(abs_sq(x)))

    def _sample(self, x):
        return jax.lax.all_gather(_sample(x), self.axes) if self.axes else _sample(x)


@partial(jax.jit, static_argnames=("ours", "accumulator", "apart"))
def figures(
    g: Any,
    u: Any,
    p: Any,
    nu: Any,
    mu: Any,
    step: jax.Array,
    settings: Settings,
    ours: bool,
    accumulator: accumulators.Accumulator | None = None,
    apart: frozenset = frozenset(),
) -> jax.Array:
    """The fields of a Measurement but for `step`, in their order, for one layer: float32 of shape (fields,).

    Args:
      g: the gradient.
      u: the update.
      p: the parameter before it.
      nu: the accumulator after it, as it is stored.
      mu: the running mean, None where not centred.
      step: updates so far.
      settings: the optimizer's.
      ours: whether this package stores `nu`.
      accumulator: what reads `nu`, where that does not tell.
      apart: inside `jax.shard_map`, the mesh axes along which each device has figures of its own. Along all
        others the layer is one, in parts.
    """
    arrays = jax.tree.leaves((g, u, p, nu, mu))
    axes = tuple(sorted(frozenset().union(*map(varying_axes, arrays)) - apart))

    def of_layer(*arguments):
        layer = _Layer(*arguments, ours=ours, accumulator=accumulator, axes=axes)
        row = jnp.stack([jnp.asarray(getattr(layer, name), jnp.float32) for name in FIELDS])
        return jax.lax.pmean(row, axes) if axes else row  # equal on all devices, and now known to be

    for mesh in (jax.typeof(x).sharding.mesh for x in arrays):
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        if explicit:  # there, slices and sorts of what is sharded are refused: the compiler is to place these
            replicated = NamedSharding(mesh, PartitionSpec())
            of_layer = jax.sharding.auto_axes(of_layer, axes=explicit, out_sharding=replicated)
            break
    return of_layer(g, u, p, nu, mu, step, settings)


def varying_axes(x: Any) -> frozenset:
    """The mesh axes along which `x` may differ, inside a `jax.shard_map` that checks this."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return kind.vma if manual is None else manual.varying


def _in_one_precision(*arrays):
    """In float64 if one of them is, else in float32; real or complex as they are."""
    dtype = max((real(wide(x.dtype)) for x in arrays if x is not None), key=lambda dtype: dtype.itemsize)

    def cast(x):
        if jnp.iscomplexobj(x):
            return jax.lax.complex(x.real.astype(dtype), x.imag.astype(dtype))
        return x.astype(dtype)

    return [None if x is None else cast(x) for x in arrays]


def _rms(x):
    return jnp.sqrt(jnp.mean(abs_sq(x)))


def _share(which, of):
    """The share of the elements `of` that are `which`; 0 where there are none."""
    count = jnp.sum(of, dtype=jnp.float32)
    return jnp.sum(which & of, dtype=jnp.float32) / jnp.maximum(count, 1)


def _sample(x, most=4096):
    """At most `most` elements, and at least a sixth of that. Slices, axis by axis: no axis is reshaped, so
    that an array in shards is not collected. The strides are odd: even ones would meet one unit of eight."""
    # Under jax.export a size may be a symbol, of which there is no telling whether it is too large. Of such
    # an axis a fixed number is taken, zeros past its end.
    symbols = {axis: size for axis, size in enumerate(x.shape) if not isinstance(size, int)}
    if symbols:
        others = np.prod([size for size in x.shape if isinstance(size, int)])
        count = int(max(most ** (1 / x.ndim), (most / others) ** (1 / len(symbols))))
    for axis, size in symbols.items():
        stride = -(-size // count) // 2 * 2 + 1
        x = jnp.take(x, jnp.arange(count) * stride, axis, mode="fill", fill_value=0)
    strides = [1] * x.ndim

    def taken():
        return [-(-size // stride) for size, stride in zip(x.shape, strides, strict=True)]

    while np.prod(taken()) > most:
        longest = int(np.argmax(taken()))
        strides[longest] = 2 * strides[longest] + 1
    return x[tuple(slice(None, None, stride) for stride in strides)]


def _quantiles(x, valid, at):
    """Of the valid elements of `x`, by the nearest rank below; NaN where there are none."""
    in_order = jnp.sort(jnp.where(valid, x, jnp.nan).ravel())  # NaN comes last
    last = jnp.sum(valid, dtype=jnp.float32) - 1
    return [in_order[jnp.maximum(last * q, 0).astype(jnp.int32)] for q in at]
