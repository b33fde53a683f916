r"""What the optimizer does to each layer, measured while it trains, and what to change.

One line in the training program measures every `every` updates, inside the compiled step:

    tx = diagnostics.watch(rmsprop(1e-3, decay=0.99), every=10, decay=0.99)

and after training, or at any time during it, on the host:

    history = diagnostics.history(state)       # of Flax NNX: diagnostics.history(optimizer.opt_state)
    print(*diagnostics.advise(history, losses), sep="\n")
    diagnostics.plot(history, "diagnostics.png")

In a chain, `watch` goes around :func:`rmsprop_jax.rmsprop` itself, so that it sees the gradients that the
accumulators see: ``optax.chain(optax.clip_by_global_norm(1.0), watch(rmsprop(...)))``. Optax's own
`optax.snapshot` and `optax.monitor` see what passes one place in a chain; these figures need the gradients,
the updates and the accumulators of one step together. :func:`measure` takes them from any loop or
`jax.lax.scan`.

A layer here is a leaf of the parameters' tree, by its path as :func:`rmsprop_jax.interop.paths` has it.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, storage
from rmsprop_jax.rows import RowGradient
from rmsprop_jax.transform import ScaleByRmsState, wide

Figures = dict[str, jax.Array]  # by the layer's path


class Measurement(NamedTuple):
    """Figures of one update, or of several: stacked by `jax.lax.scan`, each has a leading axis of time.

    Every field but `step` is a dictionary from the layer's path to a float32 scalar. With g the gradient, u
    the update, p the parameter before it and nu the accumulator after it, and rms(x) = sqrt(mean(x^2)):

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


_FIELDS = Measurement._fields[1:]


def measure(
    grads: optax.Updates,
    state: optax.OptState,
    updates: optax.Updates,
    params: optax.Params,
    *,
    decay: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_in_sqrt: bool = True,
    accumulator: str | storage.Accumulator | None = None,
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
      accumulator: how `nu` is kept, where its dtype does not tell: one of your own, or `storage.Uint8` with
        another exponent.
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
    accumulator: str | storage.Accumulator | None = None,
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
        zero = jnp.zeros([], jnp.int32)
        table = jnp.zeros((capacity, len(_FIELDS), len(_accumulators(inner))), jnp.float32)
        return WatchState(
            inner, zero, jnp.asarray(every, jnp.int32), zero, jnp.zeros(capacity, jnp.int32), table
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("watch needs the parameters: tx.update(grads, state, params).")
        grads = updates
        updates, inner = tx.update(grads, state.inner, params, **extra_args)
        seen = optax.safe_increment(state.seen)
        due = state.seen % state.every == 0

        def measured():
            return _table(grads, inner, updates, params, decay, eps, eps_in_sqrt, accumulator, seen)[0]

        row = jax.lax.cond(due, measured, lambda: jnp.zeros_like(state.table[0]))
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


def _is_watch(x):
    return isinstance(x, WatchState)


def _array(x):
    """An array, also out of a variable of Flax NNX."""
    return jax.tree.leaves(x)[0]


# The figures of a layer ---------------------------------------------------------------------------------------


def _table(grads, state, updates, params, decay, eps, eps_in_sqrt, accumulator, count):
    """Figures of shape (fields, layers), the step, and the layers' names."""
    decay, eps = _checked(decay, eps, eps_in_sqrt)
    codec = None if accumulator is None else storage.named(accumulator)
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
            )  # fmt: skip
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
    nu = storage.decoded(nu, codec) if ours else nu
    g, u, p, nu = (x.astype(wide(x.dtype)) for x in map(jnp.asarray, (g, u, p, nu)))
    if mu is not None:
        mu = mu.astype(wide(mu.dtype))
        nu = nu if ours else jnp.maximum(nu - _abs_sq(mu), 0)  # Optax keeps the raw moment

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
        "warmth": _warmth(decay, one_minus_decay, step),
        "noise_to_signal": noise,
        "descent": descent,
    }
    return jnp.stack([jnp.asarray(figures[name], jnp.float32) for name in _FIELDS])


_TINY = float(np.finfo(np.float32).tiny)


def _mean(x):
    """Divided before it is summed: what is finite stays finite."""
    return jnp.sum(x * (1 / x.size))


def _rms(x):
    limit = 2.0 ** (jnp.finfo(x.dtype).maxexp // 2 - 2)  # whose square is finite; NaN stays NaN
    return jnp.sqrt(_mean(jnp.square(jnp.minimum(jnp.abs(x), limit))))


def _abs_sq(x):
    return jnp.square(jnp.abs(x))


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


def _warmth(decay, one_minus_decay, step):
    """1 - decay^step, without the subtraction that would lose a decay near 1."""
    del decay
    return -jnp.expm1(step * jnp.log1p(-jnp.asarray(one_minus_decay, jnp.float32)))


def _named(step, table, names):
    """A Measurement from figures of shape (..., fields, layers)."""
    fields = {
        field: {name: table[..., i, j] for j, name in enumerate(names)} for i, field in enumerate(_FIELDS)
    }
    return Measurement(step, **fields)


# What to change -----------------------------------------------------------------------------------------------
#
# The thresholds. Healthy runs are well on the other side of at least one of each trouble's: networks trained
# with learning rates from 1e-4 to 3e-2 and decays 0.9 to 0.999 gave the ranges.

# A loss of twice its first value is worse than no training. Batches differ by that much, too: so the steps
# have to be large as well.
RISEN = 2.0
# A step of half a layer's rms, in signs that gradients give it, makes another layer in four. Networks train
# with learning rates up to a fifth of it, linear models up to a third.
LARGE_STEP = 0.5
# What is advised instead: among the best of the learning rates tried were 0.01 to 0.1 of the layers' rms.
USUAL_STEP = 0.03
# The first update from a zero start is 1 / sqrt(1 - decay) learning rates, 3.2 for decay 0.9. With bias
# correction it is 1.
AMPLIFIED = 2.0
# A loss has stalled that is less than a tenth lower in the last quarter of the run than in its first tenth.
STALLED = 0.1
# Parameters that have gone 3% of their size, had all steps been in one direction, compute what they did.
MOVED = 0.03
# Most elements of a layer: half of them.
MOSTLY = 0.5
# Steps of a tenth of what the gradients would have without eps: nu a hundredth of eps or less.
SHRUNK = 0.1
# The rms of one normal number's gradients is ten times one of them for 8% of the time, for a layer of them
# never; that of gradients which are often zero may be: so it has to be so for half of the time.
STALE = 10.0
# A stale accumulator matters where steps of full size would, to first order, have taken a fifth off the loss.
WORTH = 0.2
# Loss scaling meets an infinite gradient now and then, and skips that step. One in ten is too many.
OFTEN = 0.1
# Shorter histories are not judged but for gradients that are not finite.
ENOUGH = 8


class Finding(NamedTuple):
    """One trouble; ``str`` of it is three lines to read.

    Attributes:
      trouble: its name: "the loss explodes", "unstable start", "eps dominates", "stale accumulator", "steps
        too small", "dead layer", "accumulator rounded away" or "non-finite gradients".
      layers: the layers that show it; none where it is the whole model.
      steps: the first and the last step that show it.
      figures: what was measured, by name.
      cause: what happens, in a sentence.
      remedy: what to try.
    """

    trouble: str
    layers: tuple[str, ...]
    steps: tuple[int, int]
    figures: dict[str, float]
    cause: str
    remedy: str

    def __str__(self):
        more = f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else ""
        where = f" in {', '.join(self.layers[:3])}{more}" if self.layers else ""
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        first, last = self.steps
        return (
            f"{self.trouble[0].upper()}{self.trouble[1:]}{where}, steps {first:,} to {last:,}: {figures}.\n"
            f"  Why: {self.cause}\n  Try: {self.remedy}"
        )


def advise(history: Measurement | Sequence[Measurement], losses: Any = None) -> list[Finding]:
    """What goes wrong in a run and what to try; nothing where the run is in order.

    It knows eight troubles. Three show in the history alone:

    - "dead layer": the gradients of a layer are zero, and others' are not;
    - "accumulator rounded away": `nu` is kept in bfloat16, rounded to nearest, and cannot fall;
    - "non-finite gradients": for good, or often;

    and five only beside the losses, as a run is in order that gets where it should:

    - "the loss explodes": the learning rate is too large for normalised steps;
    - "unstable start": only the first steps are, up to 1 / sqrt(1 - decay) times the learning rate;
    - "stale accumulator", "eps dominates", "steps too small": the loss has stalled, for this reason.

    The thresholds, with their reasons, are this module's constants in capitals.

    Args:
      history: of :func:`history`, of `jax.lax.scan`, or a list of measurements.
      losses: one for each update, from the first on, or one for each measurement. Where some are negative,
        as in reinforcement learning, they cannot be compared by ratio, and nothing is concluded from them.

    Returns:
      The findings, gravest first.

    Raises:
      ValueError: if the losses are too few for the history.
    """
    run = _run(history, losses)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of medians where there is no number
        if len(run.step) < ENOUGH:
            found = [_nonfinite(run)]
        elif (risen := _risen(run)) is not None:
            found = [risen, _rounded_away(run)]  # what dies or overflows, dies of that
        else:
            found = [_stale(run), _stalled(run), _dead(run), _rounded_away(run), _nonfinite(run)]
    return [finding for finding in found if finding is not None]


class _Run(NamedTuple):
    """A history on the host. The last axis of the figures is the layer, as in `names`; the first is time."""

    names: list[str]
    step: np.ndarray
    figures: dict[str, np.ndarray]
    losses: np.ndarray | None
    loss_steps: np.ndarray | None

    def __getattr__(self, name):
        return self.figures[name]


def _run(history, losses):
    if not isinstance(history, Measurement):
        history = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *history)
    names = list(history.warmth)
    figures = {
        field: np.stack([np.atleast_1d(getattr(history, field)[name]) for name in names], axis=1).astype(
            float
        )
        for field in _FIELDS
    }
    step = np.atleast_1d(np.asarray(history.step))
    if losses is None:
        return _Run(names, step, figures, None, None)
    losses = np.asarray(losses, float).ravel()
    if len(losses) == len(step):
        loss_steps = step
    elif len(losses) >= step[-1]:
        loss_steps = np.arange(1, len(losses) + 1)
    else:
        raise ValueError(
            f"Invalid losses: there are {len(losses)}, expected one for each of the {len(step)} measurements, "
            f"or one for each update, of which there were {step[-1]}."
        )
    comparable = losses[0] > 0 and not np.any(losses < 0)
    return _Run(names, step, figures, losses if comparable else None, loss_steps)


def _risen(run):
    """The loss explodes, or the start is unstable."""
    if run.losses is None:
        return None
    start = run.losses[0]
    high = ~(run.losses < RISEN * start)  # NaN too
    if not high.any():
        return None
    # Of the layers that do not start from zero: the learning rate and the first step over their rms.
    rate = _over_layers(run, run.learning_rate * run.update_ratio / run.update_rms)
    when = run.loss_steps[high]
    before = run.step <= max(when[-1], run.step[0])
    rate, at = rate[before], int(np.argmax(np.nan_to_num(rate[before])))
    first = _over_layers(run, run.update_ratio)[0]
    losses = {
        "first loss": start,
        "highest": np.max(run.losses, where=np.isfinite(run.losses), initial=0),
        "last": np.nanmedian(run.losses[-len(run.losses) // 10 :]),
    }
    lr = np.nanmedian(run.learning_rate[at])
    if rate[at] >= LARGE_STEP:
        return Finding(
            "the loss explodes",
            (),
            (int(when[0]), int(when[-1])),
            {**losses, "learning rate": lr, "over the layers' rms": rate[at]},
            "RMSProp moves every element by about the learning rate, whatever the gradient's size. Here that is "
            f"{rate[at]:.2g} times the layers' rms: each step makes another network.",
            f"a lower learning rate, {lr * USUAL_STEP / rate[at]:.1g} or so.",
        )
    amplified = np.nanmedian(run.update_rms[0] / run.learning_rate[0])
    memory = 1 / _one_minus_decay(run)
    if first >= LARGE_STEP and amplified >= AMPLIFIED and when[0] <= 1 + 2 * memory:
        return Finding(
            "unstable start",
            (),
            (1, int(when[when <= 1 + 2 * memory][-1])),
            {**losses, "first step over the learning rate": amplified, "over the layers' rms": first},
            "the accumulator starts from zero, and until it is warm, after about "
            f"{memory:,.0f} steps, it is too small to divide by.",
            "warmup(learning_rate, decay) as the learning rate, or bias_correction=True.",
        )
    return None


def _stale(run):
    if run.losses is None:
        return None
    tail = slice(-(len(run.step) // 3), None)
    staleness = np.nanmedian(run.staleness[tail], axis=0)
    found = np.isfinite(staleness) & (staleness >= STALE)
    if not found.any():
        return None
    in_tail = run.losses[run.loss_steps >= run.step[tail][0]]
    before, after = (np.nanmedian(half) for half in np.array_split(in_tail, 2))
    steps = run.step[-1] - run.step[tail][0]
    gain = np.mean(np.sum((run.staleness * run.descent)[tail][:, found], axis=1)) * steps
    learnt = after < np.nanmedian(run.losses[: max(1, len(run.losses) // 10)]) * MOSTLY
    if learnt or _fall(before, after) >= STALLED or not gain >= WORTH * after:
        return None
    memory, factor = 1 / _one_minus_decay(run), np.nanmedian(staleness[found])
    # One that forgets this factor in half of the steps, and ten times as soon.
    shorter = max(10, min(memory / 10, steps / 2 / (2 * np.log(factor))))
    return Finding(
        "stale accumulator",
        _layers(run, found),
        (int(run.step[tail][0]), int(run.step[-1])),
        {"accumulator over gradient": factor, "loss": after},
        f"it remembers {memory:,.0f} updates, and gradients that were larger by this factor; the steps are "
        "smaller by it.",
        f"a smaller decay, such as {1 - 1 / shorter:.3g}. Where single batches do it, "
        "optax.clip_by_global_norm before it.",
    )


def _stalled(run):
    """The loss has hardly fallen: eps dominates, or the steps are too small."""
    if run.losses is None:
        return None
    losses = run.losses
    start, end = (
        np.nanmedian(losses[: max(1, len(losses) // 10)]),
        np.nanmedian(losses[-max(1, len(losses) // 4) :]),
    )
    memory = 1 / _one_minus_decay(run)
    if not _fall(start, end) < STALLED or run.step[-1] < 2 * memory:
        return None
    sized = np.isfinite(run.update_ratio[0])  # a layer that starts from zero has no size to compare with
    moved = np.where(sized, np.mean(run.update_ratio, axis=0) * run.step[-1], np.nan)
    amplitude = np.nanmedian(run.update_rms / run.learning_rate, axis=0)
    by_eps = (np.nanmedian(run.eps_share, axis=0) >= MOSTLY) & (amplitude <= SHRUNK) & (moved < MOVED)
    span = (int(run.step[0]), int(run.step[-1]))
    if by_eps.any():
        rms = np.nanmedian(run.accumulator_rms[:, by_eps])
        return Finding(
            "eps dominates",
            _layers(run, by_eps),
            span,
            {
                "steps over what they would be": np.nanmedian(amplitude[by_eps]),
                "gradients' rms": rms,
                "loss": end,
            },
            "eps is larger than what it is added to, so that steps shrink with the gradients, as SGD's do.",
            f"a smaller eps: under the root below {rms**2 / 100:.0e}, outside of it below {rms / 10:.0e}; or "
            "a loss that is a sum where it is a tiny mean.",
        )
    if np.nanmedian(moved) < MOVED:
        lr = np.nanmedian(run.learning_rate)
        size = np.nanmedian(run.update_rms[:, sized] / run.update_ratio[:, sized])
        return Finding(
            "steps too small",
            (),
            span,
            {"learning rate": lr, "way of the parameters over their size": np.nanmedian(moved), "loss": end},
            f"in {run.step[-1]:,} steps the parameters could hardly move.",
            f"a larger learning rate: {size * USUAL_STEP / 10:.1g} to {size * USUAL_STEP:.1g} is usual for "
            "parameters of this size.",
        )
    return None


def _dead(run):
    tail = run.gradient_rms[-max(ENOUGH // 2, len(run.step) // 4) :]
    found = np.all(tail == 0, axis=0)
    if not found.any() or not np.all(np.any(tail > 0, axis=1)):
        return None
    alive = run.gradient_rms[:, found] > 0
    last = np.max(np.where(alive, run.step[:, None], 0))
    if last:
        cause = "they had gradients before: units that are zero for every input, such as ReLUs after too large a step."
        remedy = "a lower learning rate or warmup(learning_rate, decay); leaky units."
    else:
        cause = "they never had one: the loss does not depend on them, or a unit is zero for every input from the start."
        remedy = "look for a stop_gradient, an unused output, or biases that switch units off; freeze on purpose with optax.masked."
    first = int(run.step[run.step > last][0])
    return Finding(
        "dead layer", _layers(run, found), (first, int(run.step[-1])), {"gradient": 0.0}, cause, remedy
    )


def _rounded_away(run):
    share = np.nanmedian(run.stuck_share, axis=0)
    found = share >= MOSTLY
    if not found.any():
        return None
    return Finding(
        "accumulator rounded away",
        _layers(run, found),
        (int(run.step[0]), int(run.step[-1])),
        {"share of it": np.nanmedian(share[found]), "over gradient": np.nanmedian(run.staleness[-1, found])},
        "nu is kept in the parameters' 16 bits and rounded to nearest: decay * nu rounds to nu, so that it can "
        "rise and never fall.",
        "rmsprop_jax.rmsprop, whose accumulators are float32 or rounded without bias "
        "(interop.from_optax takes the state along).",
    )


def _nonfinite(run):
    bad = run.nonfinite_share > 0
    often = bad[-1] | (np.mean(bad, axis=0) >= OFTEN)
    if not often.any():
        return None
    when = run.step[bad[:, often].any(axis=1)]
    return Finding(
        "non-finite gradients",
        _layers(run, often),
        (int(when[0]), int(when[-1])),
        {"share of measurements": np.mean(bad[:, often].any(axis=1))},
        "infinite or NaN gradients make the parameters NaN, unless the step is skipped.",
        "optax.apply_if_finite around the optimizer skips such steps; jax.config.update('jax_debug_nans', True) "
        "finds where they come from: a root or logarithm of 0, or float16's range.",
    )


def _over_layers(run, figure):
    """The median over the layers that do not start from zero, for which a size can be told."""
    sized = np.isfinite(run.update_ratio[0]) & (run.update_ratio[0] > 0)
    return np.nanmedian(figure[:, sized], axis=1) if sized.any() else np.zeros(len(figure))


def _layers(run, found):
    return () if found.all() and len(found) > 1 else tuple(np.array(run.names)[found].tolist())


def _fall(before, after):
    return 1 - after / before


def _one_minus_decay(run):
    return float(-np.expm1(np.log1p(-run.warmth[0, 0]) / run.step[0]))
