"""The figures of one layer: what they are, and their formulas.

All figures of a run lie in one array: a row for each measurement, in it one for each figure, a column for
each layer.
"""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rmsprop_jax._dtypes import abs_sq, real, times, wide
from rmsprop_jax._tree import variance

Array: TypeAlias = jax.Array | np.ndarray
Figures: TypeAlias = dict[str, Array]  # by the layer's name


@dataclass(frozen=True, eq=False)
class _Table:
    step: Array
    names: tuple[str, ...]
    table: Array


class Measurement(_Table):
    """Figures of one update, or of several: stacked by `jax.lax.scan`, each has a leading axis of time.

    Every figure is an attribute, a dictionary from the layer's path to a float32 scalar, and a row of the
    table. With g the gradient, u the update, p the parameter before it and nu the accumulator after it, and
    rms(x) = sqrt(mean(x^2)), which is infinite where x^2 or its sum overflows float32:

    Attributes:
      step: updates so far, this one included; int32 scalar.
      names: the layers' paths.
      table: the figures in the order below, float32 of shape (figures, layers).
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

    def __getattr__(self, name: str) -> Any:
        figure = self.array(name)
        layers_first = figure.transpose(figure.ndim - 1, *range(figure.ndim - 1))  # of NumPy or of JAX
        return dict(zip(self.names, layers_first, strict=True))

    def array(self, figure: str) -> Array:
        """One figure of all layers: of shape (layers,), after the axis of time if there is one."""
        if figure not in FIGURES:
            raise AttributeError(f"A measurement has no figure {figure!r}, it has {', '.join(FIGURES)}.")
        return self.table[..., FIGURES.index(figure), :]


FIGURES = tuple(Measurement.__annotations__)
jax.tree_util.register_dataclass(Measurement, data_fields=["step", "table"], meta_fields=["names"])
jax.export.register_pytree_node_serialization(
    Measurement,
    serialized_name="rmsprop_jax.Measurement",
    serialize_auxdata=lambda auxdata: json.dumps(auxdata).encode(),
    deserialize_auxdata=lambda data: tuple(map(tuple, json.loads(data))),
)


def figures_of_layer(g, u, p, nu, mu, step, settings, *, ours, axes):
    """The figures by their names, as :func:`figures` takes the arrays; summed over the mesh's `axes`."""

    def mean(x):
        return jax.lax.pmean(jnp.mean(x), axes) if axes else jnp.mean(x)

    def rms(x, mean=mean):
        return jnp.sqrt(mean(abs_sq(x)))

    def sample(x):
        return jax.lax.all_gather(_sample(x), axes) if axes else _sample(x)

    stuck_share = 0.0
    if not ours:  # rounded to nearest, perhaps
        stored = sample(nu)
        decay, _ = settings.decay_as(stored.dtype)
        stuck_share = _share(decay * stored == stored, stored > 0)
    g, u, p, nu, mu = _in_one_precision(g, u, p, nu, mu)
    if mu is not None and not ours:
        nu = variance(nu, mu)  # Optax's is the raw moment
    some_g, some_u, some_nu = map(sample, (g, u, nu))
    eps = jnp.asarray(settings.eps, nu.dtype)
    inverse_root = settings.inverse_root(some_nu)
    low, median, high = _quantiles(inverse_root, some_nu > 0, (0.1, 0.5, 0.9))
    learning_rate = rms(some_u, jnp.mean) / rms(times(some_g, inverse_root), jnp.mean)
    gradient_rms, accumulator_rms, update_rms = rms(g), jnp.sqrt(mean(nu)), rms(u)
    _, one_minus_decay = settings.decay_as(jnp.float32)
    descent = -jnp.sum((g * jnp.conj(u)).real)
    return {
        "gradient_rms": gradient_rms,
        "accumulator_rms": accumulator_rms,
        "staleness": accumulator_rms / gradient_rms,
        "update_rms": update_rms,
        "update_ratio": update_rms / rms(p),
        "learning_rate": learning_rate,
        "effective_rate": learning_rate * median,
        "effective_rate_spread": high / low,
        "eps_share": _share((some_nu if settings.eps_in_sqrt else jnp.sqrt(some_nu)) < eps, some_g != 0),
        "stuck_share": stuck_share,
        "nonfinite_share": mean(~jnp.isfinite(g)),
        "bias_correction_factor": -jnp.expm1(step.astype(jnp.float32) * jnp.log1p(-one_minus_decay)),
        "noise_to_signal": jnp.nan if mu is None else accumulator_rms / rms(mu),
        "descent": jax.lax.psum(descent, axes) if axes else descent,
    }


@partial(jax.jit, static_argnames=("ours", "per_device_axes"))
def figures(g, u, p, nu, mu, step, settings, ours, per_device_axes=frozenset()):
    """A layer's column of the table: float32 of shape (figures,).

    Args: the gradient, the update, the parameter before it, the accumulators after it (nu as numbers, mu None
    where not centred), the updates so far, the optimizer's settings, whether the state is this package's, and
    inside `jax.shard_map` the mesh axes along which each device has figures of its own. Along all others the
    layer is one, in parts.
    """
    arrays = jax.tree.leaves((g, u, p, nu, mu))
    axes = tuple(sorted(frozenset().union(*map(varying_axes, arrays)) - per_device_axes))

    def column(*arguments):
        by_name = figures_of_layer(*arguments, ours=ours, axes=axes)
        rows = jnp.stack([jnp.asarray(by_name[name], jnp.float32) for name in FIGURES])
        return jax.lax.pmean(rows, axes) if axes else rows  # equal on all devices, and now known to be

    for mesh in (jax.typeof(x).sharding.mesh for x in arrays):
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        if explicit:  # there, slices and sorts of sharded arrays are refused: the compiler is to place these
            replicated = NamedSharding(mesh, PartitionSpec())
            column = jax.sharding.auto_axes(column, axes=explicit, out_sharding=replicated)
            break
    return column(g, u, p, nu, mu, step, settings)


def varying_axes(x: Any) -> frozenset:
    """The mesh axes along which `x` may differ, inside a `jax.shard_map` that checks this."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return kind.vma if manual is None else manual.varying


def _in_one_precision(*arrays):
    """In float64 if one of them is, else in float32; real or complex as they are."""
    dtype = max((real(wide(x.dtype)) for x in arrays if x is not None), key=lambda dtype: dtype.itemsize)
    return [None if x is None else x.astype(np.promote_types(dtype, x.dtype)) for x in arrays]


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
    for axis, stride in enumerate(strides):
        # Not all axes in one slice: XLA on TPU would hold everything that it spans in fast memory, and does
        # not compile where the matrix is large. Nor does it fuse strided slices: when it measures, it holds u
        # and nu of one layer at a time. XLA on GPUs fuses them.
        x = jax.lax.slice_in_dim(x, 0, None, stride, axis)
    return x


def _quantiles(x, valid, at):
    """Quantiles of the valid elements of `x`, by the nearest rank below; NaN where there are none."""
    in_order = jnp.sort(jnp.where(valid, x, jnp.nan).ravel())  # NaN comes last
    last = jnp.sum(valid, dtype=jnp.float32) - 1
    return [in_order[jnp.maximum(last * q, 0).astype(jnp.int32)] for q in at]
