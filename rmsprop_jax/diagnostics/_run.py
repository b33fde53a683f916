"""The history of a run, as troubles are looked for in it, `Run`; and one trouble that it has, `Finding`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rmsprop_jax.diagnostics._figures import FIGURES, Measurement

# Shorter histories are not judged but for gradients that are not finite.
ENOUGH = 8


class Finding(NamedTuple):
    """One trouble; ``str`` of it is three lines to read.

    Attributes:
      trouble: its name, such as "the loss explodes".
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

    def __str__(self) -> str:
        more = f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else ""
        where = f" in {', '.join(self.layers[:3])}{more}" if self.layers else ""
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        first, last = self.steps
        return (
            f"{self.trouble[0].upper()}{self.trouble[1:]}{where}, steps {first:,} to {last:,}: {figures}.\n"
            f"  Why: {self.cause}\n  Try: {self.remedy}"
        )


class Run(NamedTuple):
    """What a trouble is looked for in: a history, the losses, and what has been found.

    `step` and `names` are the history's. Every figure of a :class:`Measurement` is an attribute, too, an
    array of shape (measurements, layers): NaN where a layer had no gradient.

    Attributes:
      history: of NumPy arrays with a leading axis of time, in float64.
      losses: None where there are none, or none that can be compared by ratio.
      loss_steps: the step of each loss.
      findings: of the troubles before.
    """

    history: Measurement
    losses: np.ndarray | None
    loss_steps: np.ndarray | None
    findings: list[Finding]

    @classmethod
    def of(cls, history: Measurement | Sequence[Measurement], losses: Any = None) -> "Run":
        """The run of what `advise` is given."""
        measured = on_host(history)
        step = measured.step
        if losses is None or not len(step):
            return cls(measured, None, None, [])
        losses = np.asarray(losses, float).ravel()
        if len(losses) == len(step):
            loss_steps = step
        elif len(losses) >= step[-1]:
            loss_steps = np.arange(1, len(losses) + 1)
        else:
            raise ValueError(
                f"Invalid losses: there are {len(losses)}, expected one for each of the {len(step)} "
                f"measurements or for each of the {step[-1]} updates."
            )
        comparable = losses[0] > 0 and not np.any(losses < 0)
        return cls(measured, losses if comparable else None, loss_steps, [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.history, name) if name in ("step", "names") else self.history.array(name)

    @property
    def is_short(self) -> bool:
        """Whether there are fewer than eight measurements, too few to judge most troubles by."""
        return len(self.step) < ENOUGH

    @property
    def memory(self) -> float:
        """1 / (1 - decay), the updates that an accumulator remembers."""
        factors = np.nanmax(self.bias_correction_factor, axis=1)
        first = int(np.argmax(np.isfinite(factors)))
        return float(-1 / np.expm1(np.log1p(-factors[first]) / self.step[first]))

    def median_layer(self, figure: np.ndarray) -> np.ndarray:
        """The median over the layers that do not start from zero, which alone have a size to compare with."""
        sized = np.isfinite(self.update_ratio[0]) & (self.update_ratio[0] > 0)
        return np.nanmedian(figure[:, sized], axis=1) if sized.any() else np.zeros(len(figure))

    def has(self, *troubles: str) -> bool:
        """Whether one of these troubles has been found, of which another may be a consequence."""
        return any(finding.trouble in troubles for finding in self.findings)

    def finding(
        self,
        trouble: str,
        figures: dict[str, float],
        cause: str,
        remedy: str,
        *,
        layers: np.ndarray | None = None,
        steps: tuple[int, int] | None = None,
    ) -> Finding:
        """A :class:`Finding`, of NumPy numbers too.

        `layers` is a mask of the layers that show it, by default the whole model does; `steps` are by default
        the first and the last that were measured.
        """
        names: tuple[str, ...] = ()
        if layers is not None and not (layers.all() and len(layers) > 1):
            names = tuple(np.array(self.names)[layers].tolist())
        first, last = self.step[[0, -1]] if steps is None else steps
        numbers = {name: float(value) for name, value in figures.items()}
        return Finding(trouble, names, (int(first), int(last)), numbers, cause, remedy)


def on_host(history: Any) -> Any:
    """A Measurement of NumPy arrays in float64, with a leading axis of time, of one or of a list of them."""
    if not isinstance(history, Measurement):
        if not history:
            return Measurement(np.zeros(0, np.int32), (), np.zeros((0, len(FIGURES), 0)))
        history = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *history)
    step, table = np.atleast_1d(np.asarray(history.step)), np.asarray(history.table, float)
    if step.ndim > 1:
        raise ValueError(
            f"Invalid history: its steps have shape {step.shape}, those of several runs under jax.vmap. Pass "
            "one at a time: jax.tree.map(lambda x: x[0], history)."
        )
    return Measurement(step, history.names, table.reshape(len(step), *table.shape[-2:]))
