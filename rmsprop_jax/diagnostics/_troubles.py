"""What goes wrong in a run and what to try: `advise`, the troubles that it knows, and their thresholds."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from rmsprop_jax.diagnostics._figures import Measurement
from rmsprop_jax.diagnostics._run import ENOUGH, Finding, Run

Trouble: TypeAlias = Callable[[Run], Finding | None]

# The thresholds. Healthy runs are well on the other side of at least one of each trouble's: networks trained
# with learning rates from 1e-4 to 3e-2 and decays 0.9 to 0.999 gave the ranges.

# A loss of twice its first value is worse than no training. Batches differ by that much, too: so the steps
# have to be large as well.
RISEN = 2.0
# Four aligned steps of half the layer's RMS replace the layer. Networks train with learning rates up to a
# fifth of it, linear models up to a third.
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
# For one Gaussian scalar the RMS exceeds 10 abs(g) 8% of the time, for a whole layer practically never;
# sparse gradients can exceed it by chance. Hence a median over the window.
STALE = 10.0
# A stale accumulator matters where steps of full size would, to first order, have taken a fifth off the loss.
WORTH = 0.2
# Loss scaling meets an infinite gradient now and then, and skips that step. One in ten is too many.
OFTEN = 0.1

# Dead layers and overflows after a divergence are its consequences, and not reported.
DIVERGENCE = ("the loss explodes", "unstable start")


def the_loss_explodes(run: Run) -> Finding | None:
    """The loss doubles or worse, at a learning rate of at least half of the layers' rms."""
    if run.is_short or (high := _high(run)) is None:
        return None
    # Of the layers that do not start from zero: the learning rate and the first step over their rms.
    rate = run.median_layer(run.learning_rate * run.update_ratio / run.update_rms)
    rate = rate[run.step <= max(high[-1], run.step[0])]
    at = int(np.argmax(np.nan_to_num(rate)))
    if not rate[at] >= LARGE_STEP:
        return None
    lr = np.nanmedian(run.learning_rate[at])
    return run.finding(
        "the loss explodes",
        {**_course(run.losses), "learning rate": lr, "over the layers' rms": rate[at]},
        "RMSProp moves every element by about the learning rate, whatever the gradient's size. Here that is "
        f"{rate[at]:.2g} times the layers' rms: each step makes another network.",
        f"a lower learning rate, {lr * USUAL_STEP / rate[at]:.1g} or so.",
        steps=(high[0], high[-1]),
    )


def unstable_start(run: Run) -> Finding | None:
    """The loss doubles before the accumulator is warm; the first step is at least half of the layers' rms."""
    if run.is_short or run.has("the loss explodes") or (high := _high(run)) is None:
        return None
    first = run.median_layer(run.update_ratio)[0]
    amplified = np.nanmedian(run.update_rms[0] / run.learning_rate[0])
    warm = 1 + 2 * run.memory
    if not (first >= LARGE_STEP and amplified >= AMPLIFIED and high[0] <= warm):
        return None
    steps = {"first step over the learning rate": amplified, "over the layers' rms": first}
    return run.finding(
        "unstable start",
        _course(run.losses) | steps,
        f"the accumulator starts from zero, and until it is warm, after about {run.memory:,.0f} steps, it is "
        "too small to divide by.",
        "warmup(learning_rate, decay) as the learning rate, or bias_correction=True.",
        steps=(1, high[high <= warm][-1]),
    )


def stale_accumulator(run: Run) -> Finding | None:
    """The loss has stalled, and the accumulator remembers gradients that were at least ten times as large."""
    if run.is_short or run.has(*DIVERGENCE) or run.losses is None:
        return None
    tail = slice(-(len(run.step) // 3), None)
    staleness = np.nanmedian(run.staleness[tail], axis=0)
    stale = np.isfinite(staleness) & (staleness >= STALE)
    if not stale.any():
        return None
    in_tail = run.losses[run.loss_steps >= run.step[tail][0]]
    before, after = (np.nanmedian(half) for half in np.array_split(in_tail, 2))
    steps = run.step[-1] - run.step[tail][0]
    gain = np.mean(np.sum((run.staleness * run.descent)[tail][:, stale], axis=1)) * steps
    learnt = after < _early(run.losses) * MOSTLY
    if learnt or 1 - after / before >= STALLED or not gain >= WORTH * after:
        return None
    factor = np.nanmedian(staleness[stale])
    # One that forgets this factor in half of the steps, and ten times as soon.
    shorter = max(10, min(run.memory / 10, steps / 2 / (2 * np.log(factor))))
    return run.finding(
        "stale accumulator",
        {"accumulator over gradient": factor, "loss": after},
        f"it remembers {run.memory:,.0f} updates, and gradients that were larger by this factor; the steps "
        "are smaller by it.",
        f"a smaller decay, such as {1 - 1 / shorter:.3g}. Where single batches do it, "
        "optax.clip_by_global_norm before it.",
        layers=stale,
        steps=(run.step[tail][0], run.step[-1]),
    )


def eps_dominates(run: Run) -> Finding | None:
    """The loss has stalled, and eps makes the steps at most a tenth of what they would be."""
    if run.is_short or run.has(*DIVERGENCE) or not _has_stalled(run):
        return None
    amplitude = np.nanmedian(run.update_rms / run.learning_rate, axis=0)
    mostly = np.nanmedian(run.eps_share, axis=0) >= MOSTLY
    by_eps = mostly & (amplitude <= SHRUNK) & (_moved(run) < MOVED)
    if not by_eps.any():
        return None
    shrunk, rms = np.nanmedian(amplitude[by_eps]), np.nanmedian(run.accumulator_rms[:, by_eps])
    return run.finding(
        "eps dominates",
        {"steps over what they would be": shrunk, "gradients' rms": rms, "loss": _late(run.losses)},
        "eps is larger than what it is added to, so that steps shrink with the gradients, as SGD's do.",
        f"a smaller eps: under the root below {rms**2 / 100:.0e}, outside of it below {rms / 10:.0e}; or a "
        "loss that is a sum where it is a tiny mean.",
        layers=by_eps,
    )


def steps_too_small(run: Run) -> Finding | None:
    """The loss has stalled, and the layers have gone less than 3% of their size."""
    if run.is_short or run.has(*DIVERGENCE, "eps dominates") or not _has_stalled(run):
        return None
    moved, rate = _moved(run), np.nanmedian(run.learning_rate)
    if not np.nanmedian(moved) < MOVED:
        return None
    sized = np.isfinite(moved)
    size = np.nanmedian(run.update_rms[:, sized] / run.update_ratio[:, sized])
    figures = {"learning rate": rate, "way of the parameters over their size": np.nanmedian(moved)}
    return run.finding(
        "steps too small",
        figures | {"loss": _late(run.losses)},
        f"in {run.step[-1]:,} steps the parameters could hardly move.",
        f"a larger learning rate: {size * USUAL_STEP / 10:.1g} to {size * USUAL_STEP:.1g} is usual for "
        "parameters of this size.",
    )


def dead_layer(run: Run) -> Finding | None:
    """The gradients of a layer are zero, and others' are not."""
    tail = run.gradient_rms[-max(ENOUGH // 2, len(run.step) // 4) :]
    dead = np.all(tail == 0, axis=0)
    if run.is_short or run.has(*DIVERGENCE) or not dead.any() or not np.all(np.any(tail > 0, axis=1)):
        return None
    alive = run.gradient_rms[:, dead] > 0
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
    steps = run.step[run.step > last][0], run.step[-1]
    return run.finding("dead layer", {"gradient": 0.0}, cause, remedy, layers=dead, steps=steps)


def accumulator_rounded_away(run: Run) -> Finding | None:
    """`nu` is stored in bfloat16, rounded to nearest, and cannot fall."""
    share = np.nanmedian(run.stuck_share, axis=0)
    stuck = share >= MOSTLY
    if run.is_short or not stuck.any():
        return None
    over_gradient = np.nanmedian(run.staleness[-1, stuck])
    return run.finding(
        "accumulator rounded away",
        {"share of it": np.nanmedian(share[stuck]), "over gradient": over_gradient},
        "nu is stored in the parameters' 16 bits and rounded to nearest: decay * nu rounds to nu, so that it "
        "can rise and never fall.",
        "rmsprop_jax.rmsprop, whose accumulators are float32 or rounded without bias "
        "(interop.from_optax takes the state along); for parameters in 16 bits apply_updates(key=), too.",
        layers=stuck,
    )


def non_finite_gradients(run: Run) -> Finding | None:
    """Gradients are infinite or NaN: in the last measurement, or in at least one of ten."""
    bad = run.nonfinite_share > 0
    often = bad[-1] | (np.mean(bad, axis=0) >= OFTEN)
    if run.has(*DIVERGENCE) or not often.any():
        return None
    bad = bad[:, often].any(axis=1)
    return run.finding(
        "non-finite gradients",
        {"share of measurements": np.mean(bad)},
        "infinite or NaN gradients make the parameters NaN, unless the step is skipped.",
        "optax.apply_if_finite around the optimizer skips such steps; jax.config.update('jax_debug_nans', "
        "True) finds where they come from: a root or logarithm of 0, or float16's range.",
        layers=often,
        steps=(run.step[bad][0], run.step[bad][-1]),
    )


TROUBLES: tuple[Trouble, ...] = (
    *(the_loss_explodes, unstable_start, stale_accumulator, eps_dominates, steps_too_small),
    *(dead_layer, accumulator_rounded_away, non_finite_gradients),
)
"""What `advise` looks for, gravest first."""


def advise(
    history: Measurement | Sequence[Measurement], losses: Any = None, troubles: Sequence[Trouble] = TROUBLES
) -> list[Finding]:
    """What goes wrong in a run and what to try; nothing where the run is in order.

    Three of the troubles show in the history alone: a dead layer, an accumulator that is rounded away, and
    gradients that are not finite. The others show only beside the losses: a run that gets where it should
    is in order. The thresholds, with their reasons, are the constants in capitals of `_troubles.py`.

    Args:
      history: of :func:`rmsprop_jax.diagnostics.history`, of `jax.lax.scan`, or a list of measurements.
      losses: one for each update, from the first on, or one for each measurement. Where some are negative,
        as in reinforcement learning, they cannot be compared by ratio, and nothing is concluded from them.
      troubles: functions from a :class:`rmsprop_jax.diagnostics.Run` to a
        :class:`rmsprop_jax.diagnostics.Finding` or None, gravest first.

    Returns:
      The findings, gravest first; none before the first measurement.

    Raises:
      ValueError: if the losses are too few for the history, and for a history of several runs.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import diagnostics
      >>> def loud_layer(run):
      ...     rms = np.nanmedian(run.gradient_rms, axis=0)
      ...     if run.has("the loss explodes") or not np.any(rms > 1e6):
      ...         return None
      ...     cause, remedy = "gradients are huge.", "optax.clip_by_global_norm before the optimizer."
      ...     return run.finding("loud layer", {"rms": rms.max()}, cause, remedy, layers=rms > 1e6)
      >>> diagnostics.advise([], troubles=[*diagnostics.TROUBLES, loud_layer])
      []
    """
    run = Run.of(history, losses)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of medians where there is no number
        for trouble in troubles if run.names and len(run.step) else ():
            if (finding := trouble(run)) is not None:
                run.findings.append(finding)
    return run.findings


def _high(run):
    """The steps at which the loss has risen, None where it has not."""
    if run.losses is None:
        return None
    high = run.losses >= RISEN * run.losses[0]
    return run.loss_steps[high] if high.any() else None


def _course(losses):
    highest = np.max(losses, where=np.isfinite(losses), initial=0)
    return {"first loss": losses[0], "highest": highest, "last": np.nanmedian(losses[-len(losses) // 10 :])}


def _has_stalled(run):
    is_long = run.losses is not None and run.step[-1] >= 2 * run.memory
    return is_long and 1 - _late(run.losses) / _early(run.losses) < STALLED


def _moved(run):
    """How far the layers would have gone, had all steps been in one direction, over their size.

    NaN where a layer has no size, as it starts from zero, and where it has no gradient that could move it.
    """
    sized = np.isfinite(run.update_ratio[0]) & (np.nanmedian(run.gradient_rms, axis=0) > 0)
    return np.where(sized, np.mean(run.update_ratio, axis=0) * run.step[-1], np.nan)


def _early(losses):
    return np.nanmedian(losses[: max(1, len(losses) // 10)])


def _late(losses):
    return np.nanmedian(losses[-max(1, len(losses) // 4) :])
