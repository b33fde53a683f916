"""Which trouble a run is in, by the figures of its layers and its losses, and what to try."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop_jax._measurement import FIELDS, Measurement, stacked

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
    history = stacked(history)
    names, step = list(history.warmth), history.step
    figures = {
        field: np.stack([getattr(history, field)[name] for name in names], axis=1).astype(float)
        for field in FIELDS
    }
    if losses is None:
        return _Run(names, step, figures, None, None)
    losses = np.asarray(losses, float).ravel()
    if len(losses) == len(step):
        loss_steps = step
    elif len(losses) >= step[-1]:
        loss_steps = np.arange(1, len(losses) + 1)
    else:
        raise ValueError(
            f"Invalid losses: there are {len(losses)}, expected one for each of the {len(step)} measurements "
            f"or for each of the {step[-1]} updates."
        )
    comparable = losses[0] > 0 and not np.any(losses < 0)
    return _Run(names, step, figures, losses if comparable else None, loss_steps)


def _risen(run):
    """The loss explodes, or the start is unstable."""
    if run.losses is None:
        return None
    start = run.losses[0]
    high = run.losses >= RISEN * start
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
            "RMSProp moves every element by about the learning rate, whatever the gradient's size. Here that "
            f"is {rate[at]:.2g} times the layers' rms: each step makes another network.",
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
    sized &= np.nanmedian(run.gradient_rms, axis=0) > 0  # nor is one small in its steps that has no gradient
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
        cause = "they had gradients before: units may be zero for every input, as ReLUs after a large step."
        remedy = "a lower learning rate or warmup(learning_rate, decay); leaky units."
    else:
        cause = "they never had any: the loss does not depend on them, or units are zero for every input."
        remedy = (
            "look for a stop_gradient, an unused output, or first biases that switch units off. What is "
            "frozen on purpose, optax.masked leaves out."
        )
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
        "nu is kept in the parameters' 16 bits and rounded to nearest: decay * nu rounds to nu, so that it "
        "can rise and never fall.",
        "rmsprop_jax.rmsprop, whose accumulators are float32 or rounded without bias "
        "(interop.from_optax takes the state along); for parameters in 16 bits apply_updates(key=), too.",
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
        "optax.apply_if_finite around the optimizer skips such steps; jax.config.update('jax_debug_nans', "
        "True) finds where they come from: a root or logarithm of 0, or float16's range.",
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
