"""Which trouble a run is in, and what to try: `advise`."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmsprop_jax.diagnostics._figures import Measurement
from rmsprop_jax.diagnostics._finding import Finding, Run
from rmsprop_jax.diagnostics._measure import stacked
from rmsprop_jax.diagnostics._troubles import TROUBLES


def advise(history: Measurement | Sequence[Measurement], losses: Any = None) -> list[Finding]:
    """What goes wrong in a run and what to try; nothing where the run is in order.

    It knows eight troubles, and those added by :func:`trouble`. Three show in the history alone:

    - "dead layer": the gradients of a layer are zero, and others' are not;
    - "accumulator rounded away": `nu` is stored in bfloat16, rounded to nearest, and cannot fall;
    - "non-finite gradients": for good, or often;

    and five only beside the losses, as a run is in order that gets where it should:

    - "the loss explodes": the learning rate is too large for normalised steps;
    - "unstable start": only the first steps are, up to 1 / sqrt(1 - decay) times the learning rate;
    - "stale accumulator", "eps dominates", "steps too small": the loss has stalled, for this reason.

    The thresholds, with their reasons, are the constants in capitals of `_troubles.py`.

    Args:
      history: of :func:`history`, of `jax.lax.scan`, or a list of measurements.
      losses: one for each update, from the first on, or one for each measurement. Where some are negative,
        as in reinforcement learning, they cannot be compared by ratio, and nothing is concluded from them.

    Returns:
      The findings, gravest first; none before the first measurement.

    Raises:
      ValueError: if the losses are too few for the history.
    """
    measured = stacked(history)
    if not len(measured.step) or not measured.gradient_rms:
        return []
    run = Run.of(measured, losses)
    findings: list[Finding] = []
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of medians where there is no number
        for trouble in TROUBLES.values():
            caused = any(finding.trouble in trouble.consequence_of for finding in findings)
            if len(run.step) >= trouble.least and not caused and (found := trouble.find(run)) is not None:
                findings.append(found)
    return findings
