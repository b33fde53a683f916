"""What an update does to each layer, in figures: `measure`, and `watch`, which calls it while training."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, accumulators
from rmsprop_jax._dtypes import abs_sq, wide
from rmsprop_jax._row_gradient import RowGradient
from rmsprop_jax._states import ScaleByRmsState

Figures = dict[str, jax.Array]  # by the layer's path


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
      stuck_share: elements whose accumulator cannot fall, as decay * nu rounds to nu: `optax.rmsprop`'s in
        bfloat16. 0 for this package's, which round without bias. [*]
      nonfinite_share: gradients that are infinite or NaN.
      warmth: 1 - decay^step, how much of the accumulator comes from gradients.
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
    warmth: Figures
    noise_to_signal: Figures
    descent: Figures


FIELDS = Measurement._fields[1:]
_NONFINITE = FIELDS.index("nonfinite_share")


def measure(
    grads: optax.Updates,
    state: optax.OptState,
    updates: optax.Updates,
    params: optax.Params,
    *,
    decay: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_in_sqrt: bool = True,
    accumulator: str | accumulators.Accumulator | None = None,
    count: jax.typing.ArrayLike | None = None,
) -> Measurement:
    """Measures one update: a pure function, for use inside `jax.jit` and `jax.lax.scan` too.

    Args:
      grads: the gradients that RMSProp was given.
      state: the optimizer's, after the update: this package's or Optax's RMSProp inside any chain or wrapper.
        Layers that have no accumulator in it are left out, and so are layers without elements.
      updates: what the optimizer returned.
      params: the parameters before the update.
      decay: as for :func:`rmsprop_jax.rmsprop`; the state does not tell.
      eps: as for :func:`rmsprop_jax.rmsprop`.
      eps_in_sqrt: as for :func:`rmsprop_jax.rmsprop`.
      accumulator: how `nu` is kept, where its dtype does not tell: one of your own, or `Uint8` with another
        exponent.
      count: updates so far, this one included; needed where the state does not count them, as that of
        ``optax.rmsprop(1e-3)`` does not.

    Returns:
      A :class:`Measurement`.

    Raises:
      ValueError: for a hyper-parameter out of range, a state without RMSProp in it or without `count`, trees
        that do not fit the state, and gradients by rows, naming the argument or the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> params, grads = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.1, 0.1])}
      >>> tx = rmsprop(0.01, decay=0.99)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> measured = diagnostics.measure(grads, state, updates, params, decay=0.99)
      >>> print(f"{measured.update_ratio['w']:.4f} {measured.learning_rate['w']:.4f}")
      0.0283 0.0100
    """
    table, step, names = _table(grads, state, updates, params, decay, eps, eps_in_sqrt, accumulator, count)
    return _named(step, table, names)


class WatchState(NamedTuple):
    """State of `watch`.

    Attributes:
      inner: the state of what is watched.
      seen: updates so far, int32 scalar.
      every: updates between measurements, int32 scalar; doubled whenever `table` is full.
      kept: measurements in `table`, int32 scalar.
      steps: the step of each, int32 of shape (capacity,).
      table: their figures, float32 of shape (capacity, fields, layers); :func:`history` names them.
    """

    inner: optax.OptState
    seen: jax.Array
    every: jax.Array
    kept: jax.Array
    steps: jax.Array
    table: jax.Array


def watch(
    tx: optax.GradientTransformation,
    every: int = 10,
    *,
    decay: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_in_sqrt: bool = True,
    accumulator: str | accumulators.Accumulator | None = None,
    capacity: int = 512,
) -> optax.GradientTransformationExtraArgs:
    """`tx`, measured at its first update and every `every` after it; its updates are the same.

    The measurements are part of the state, so that they are in its checkpoints, and a run that is resumed has
    them all. When there are `capacity` of them, every other one is dropped, and from then on half as many
    are taken: however long a run is, they span it evenly. On the steps between there is nothing to compute.

    Args:
      tx: :func:`rmsprop_jax.rmsprop` or a chain with it, or Optax's.
      every: updates between measurements, 1 or more.
      decay: as for :func:`measure`, the same that `tx` has, and so are the others.
      capacity: number of measurements that are kept, an even one.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with state :class:`WatchState`, whose ``update`` needs
      the parameters.

    Raises:
      ValueError: as :func:`measure`, when it is built where possible.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> tx = diagnostics.watch(rmsprop(0.01), every=5, decay=0.9)
      >>> params = {"w": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> for _ in range(12):
      ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> history = diagnostics.history(state)
      >>> print(history.step, history.warmth["w"].round(2))
      [ 1  6 11] [0.1  0.47 0.69]
    """
    _checked(decay, eps, eps_in_sqrt)
    for name, value, least in (("every", every, 1), ("capacity", capacity, 2)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"Invalid {name}: {name}={value!r}, expected a whole number, {least} or more.")
    if capacity % 2:
        raise ValueError(f"Invalid capacity: {capacity=}, expected an even number.")
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        inner = tx.init(params)
        return WatchState(
            inner,
            seen=jnp.zeros([], jnp.int32),
            every=jnp.asarray(every, jnp.int32),
            kept=jnp.zeros([], jnp.int32),  # an array of its own, as is `seen`: both may be donated
            steps=jnp.zeros(capacity, jnp.int32),
            table=jnp.zeros((capacity, len(FIELDS), len(_accumulators(inner))), jnp.float32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("watch needs the parameters: tx.update(grads, state, params).")
        seen = optax.safe_increment(state.seen)
        due = state.seen % state.every == 0

        def measured():
            # Once more, here alone: so that on the steps between, the updates are fused with what follows
            # and need no memory.
            step, inner = tx.update(updates, state.inner, params, **extra_args)
            return _table(updates, inner, step, params, decay, eps, eps_in_sqrt, accumulator, seen)[0]

        row = jax.lax.cond(due, measured, lambda: jnp.zeros_like(state.table[0]))
        # No share is negative, but XLA does not know: it has to measure before it overwrites parameters and
        # accumulators, where it would copy them all to have the choice.
        never = row[_NONFINITE, 0] < 0
        updates = jax.tree.map(lambda g: jnp.where(never, jnp.zeros_like(g), g), updates)
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        # Written in place, or nowhere.
        place = jnp.where(due, state.kept, capacity)
        table = state.table.at[place].set(row, mode="drop")
        steps = state.steps.at[place].set(seen, mode="drop")
        kept = state.kept + due
        full = kept == capacity
        table, steps = jax.lax.cond(full, _thinned, lambda x: x, (table, steps))
        every_now = jnp.where(full, 2 * state.every, state.every)
        return updates, WatchState(inner, seen, every_now, jnp.where(full, capacity // 2, kept), steps, table)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _thinned(arrays):
    """Every other row, and then zeros."""
    return jax.tree.map(lambda x: jnp.concatenate([x[::2], jnp.zeros_like(x[::2])]), arrays)


def history(state: optax.OptState) -> Measurement:
    """The measurements that `watch` has made, on the host: NumPy arrays with a leading axis of time.

    Args:
      state: an optimizer state with one :class:`WatchState` in it; Flax NNX's ``optimizer.opt_state`` too.

    Raises:
      ValueError: if it has none, or several.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_watch) if _is_watch(x)]
    if len(found) != 1:
        raise ValueError(f"Invalid state: it has {len(found)} of watch's states in it, expected one.")
    (watched,) = found
    names = list(_accumulators(watched.inner))
    kept, steps, table = (np.asarray(_array(x)) for x in (watched.kept, watched.steps, watched.table))
    return _named(steps[:kept], table[:kept], names)


def stacked(history):
    """A Measurement of NumPy arrays with a leading axis of time, of one or of a list of them."""
    if not isinstance(history, Measurement):
        history = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *history)
    return jax.tree.map(np.atleast_1d, history)


def _is_watch(x):
    return isinstance(x, WatchState)


def _array(x):
    """An array, also out of a variable of Flax NNX."""
    return jax.tree.leaves(x)[0]


# The figures of a layer


def _table(grads, state, updates, params, decay, eps, eps_in_sqrt, accumulator, count):
    """Figures of shape (fields, layers), the step, and the layers' names."""
    decay, eps = _checked(decay, eps, eps_in_sqrt)
    codec = None if accumulator is None else accumulators.named(accumulator)
    found = _accumulators(state)
    trees = {"grads": _by_name(grads), "updates": _by_name(updates), "params": _by_name(params)}
    columns = []
    for name, (nu, mu, ours, counted) in found.items():
        step = counted if count is None else count
        if step is None:
            raise ValueError("The state does not count its updates, as Optax's: pass count=, or use watch.")
        leaves = [_layer(what, tree, name, nu.shape) for what, tree in trees.items()]
        columns.append(
            _figures(
                *leaves,
                nu,
                mu,
                decay,
                1 - decay,
                eps,
                step,
                eps_in_sqrt=bool(eps_in_sqrt),
                codec=codec,
                ours=ours,
            )
        )
    return jnp.stack(columns, axis=1), jnp.asarray(step, jnp.int32), list(found)


def _checked(decay, eps, eps_in_sqrt):
    _checks.flag("eps_in_sqrt", eps_in_sqrt)
    return _checks.precise_number("decay", decay, below=1), _checks.precise_number("eps", eps)


def _layer(what, tree, name, shape):
    leaf = tree.get(name)
    if leaf is None:
        raise ValueError(
            f"Invalid {what}: they have no layer {name!r}, for which the state has an accumulator."
        )
    if isinstance(leaf, RowGradient):
        raise ValueError(
            f"Invalid {what}: layer {name!r} is by rows, whose accumulators are not measured. With "
            "optax.partition, watch the part that is dense."
        )
    if jnp.shape(leaf) != shape:
        raise ValueError(
            f"Invalid {what}: layer {name!r} has shape {jnp.shape(leaf)}, its accumulator {shape}."
        )
    return leaf


def _by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, RowGradient))
    return {_name(path): leaf for path, leaf in leaves}


def _name(path):
    """As `interop.paths` has it; the variables of Flax NNX hold their array as `value`."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the whole tree)"


def _accumulators(state):
    """{layer: (nu, mu or None, whether this package's, count or None)} of all layers with elements."""
    found = {}
    for node in jax.tree.leaves(state, is_leaf=_is_rms):
        if not _is_rms(node):
            continue
        mu = _by_name(getattr(node, "mu", None))
        for name, nu in _by_name(node.nu).items():
            if name in found:
                raise ValueError(f"Invalid state: it has two accumulators for layer {name!r}.")
            if nu.size:
                count = _array(node.count) if "count" in node._fields else None
                found[name] = nu, mu.get(name), isinstance(node, ScaleByRmsState), count
    if not found:
        raise ValueError("Invalid state: it has no accumulator of RMSProp in it.")
    return found


def _is_rms(x):
    """This package's state of RMSProp, or one of Optax's four, of which it exports two."""
    return type(x).__name__.startswith(("ScaleByRms", "ScaleByRStdDev")) and "nu" in getattr(x, "_fields", ())


@partial(jax.jit, static_argnames=("eps_in_sqrt", "codec", "ours"))
def _figures(g, u, p, nu, mu, decay, one_minus_decay, eps, step, *, eps_in_sqrt, codec, ours):
    """The fields of a Measurement but for `step`, in their order, for one layer."""
    kept = nu
    nu = accumulators.decoded(nu, codec) if ours else nu
    g, u, p, nu = (x.astype(wide(x.dtype)) for x in map(jnp.asarray, (g, u, p, nu)))
    if mu is not None:
        mu = mu.astype(wide(mu.dtype))
        nu = nu if ours else jnp.maximum(nu - abs_sq(mu), 0)  # Optax keeps the raw moment

    gradient_rms, update_rms, accumulator_rms = _rms(g), _rms(u), jnp.sqrt(_mean(nu))
    noise = jnp.nan if mu is None else accumulator_rms / _rms(mu)
    descent = -jnp.sum((g * jnp.conj(u)).real)
    nonfinite = _mean(~jnp.isfinite(g))

    g, u, nu, kept = map(_sample, (g, u, nu, kept))
    has_step = g != 0
    if eps_in_sqrt:
        scale, by_eps = jax.lax.rsqrt(jnp.maximum(nu + eps, _TINY)), nu < eps
    else:
        root = jnp.sqrt(nu)
        scale, by_eps = 1 / jnp.maximum(root + eps, _TINY), root < eps
    rate = _rms(u) / _rms(g * scale)
    low, median, high = _quantiles(scale, nu > 0, (0.1, 0.5, 0.9))
    if ours:
        stuck = 0.0
    else:
        stuck = _mean((kept.astype(jnp.float32) > 0) & (jnp.asarray(decay, kept.dtype) * kept == kept))
    figures = {
        "gradient_rms": gradient_rms,
        "accumulator_rms": accumulator_rms,
        "staleness": accumulator_rms / gradient_rms,
        "update_rms": update_rms,
        "update_ratio": update_rms / _rms(p),
        "learning_rate": rate,
        "effective_rate": rate * median,
        "effective_rate_spread": high / low,
        "eps_share": jnp.sum(by_eps & has_step) / jnp.maximum(jnp.sum(has_step), 1),
        "stuck_share": stuck,
        "nonfinite_share": nonfinite,
        "warmth": -jnp.expm1(step * jnp.log1p(-jnp.asarray(one_minus_decay, jnp.float32))),
        "noise_to_signal": noise,
        "descent": descent,
    }
    return jnp.stack([jnp.asarray(figures[name], jnp.float32) for name in FIELDS])


_TINY = float(np.finfo(np.float32).tiny)


def _mean(x):
    return jnp.sum(x) / x.size


def _rms(x):
    return jnp.sqrt(_mean(abs_sq(x)))


def _sample(x, most=4096):
    """At most `most` elements, and at least a sixth of that. Slices, axis by axis: no axis is reshaped, so
    that an array in shards is not collected. The strides are odd: even ones would meet one unit of eight."""
    strides = [1] * x.ndim

    def kept():
        return [-(-size // stride) for size, stride in zip(x.shape, strides, strict=True)]

    while np.prod(kept()) > most:
        longest = int(np.argmax(kept()))
        strides[longest] = 2 * strides[longest] + 1
    return x[tuple(slice(None, None, stride) for stride in strides)]


def _quantiles(x, valid, at):
    """Of the valid elements of `x`, by the nearest rank below; NaN where there are none."""
    in_order = jnp.sort(jnp.where(valid, x, jnp.nan).ravel())  # NaN comes last
    last = jnp.sum(valid) - 1
    return [in_order[jnp.maximum(last * q, 0).astype(jnp.int32)] for q in at]


def _named(step, table, names):
    """A Measurement from figures of shape (..., fields, layers)."""
    fields = {
        field: {name: table[..., i, j] for j, name in enumerate(names)} for i, field in enumerate(FIELDS)
    }
    return Measurement(step, **fields)
