"""Which trouble a run is in, and what to try: `advise`."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmsprop_jax.diagnostics import _troubles
from rmsprop_jax.diagnostics._figures import Measurement
from rmsprop_jax.diagnostics._run import Finding, Run
from rmsprop_jax.diagnostics._troubles import Trouble

TROUBLES: tuple[Trouble, ...] = (
    _troubles.the_loss_explodes,
    _troubles.unstable_start,
    _troubles.stale_accumulator,
    _troubles.eps_dominates,
    _troubles.steps_too_small,
    _troubles.dead_layer,
    _troubles.accumulator_rounded_away,
    _troubles.non_finite_gradients,
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
      history: of :func:`history`, of `jax.lax.scan`, or a list of measurements.
      losses: one for each update, from the first on, or one for each measurement. Where some are negative,
        as in reinforcement learning, they cannot be compared by ratio, and nothing is concluded from them.
      troubles: what to look for, gravest first: functions from a :class:`Run` to a :class:`Finding` or None.

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
