"""What a trouble is looked for in, a `Run`; what is said of it, a `Finding`; and the register of them all."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop_jax.diagnostics._figures import FIELDS

# Shorter histories are not judged but for gradients that are not finite.
ENOUGH = 8


class Finding(NamedTuple):
    """One trouble; ``str`` of it is three lines to read.

    Attributes:
      trouble: its name: "the loss explodes", "unstable start", "stale accumulator", "eps dominates", "steps
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
    """A history on the host, as troubles are looked for in it.

    The figures of a Measurement are its attributes too, as arrays of shape (measurements, layers): NaN where
    a layer had no gradient.

    Attributes:
      names: of the layers.
      step: of each measurement.
      figures: the arrays, by their names.
      losses: None where there are none, or none that can be compared by ratio.
      loss_steps: the step of each loss.
    """

    names: list[str]
    step: np.ndarray
    figures: dict[str, np.ndarray]
    losses: np.ndarray | None
    loss_steps: np.ndarray | None

    @classmethod
    def of(cls, history: Any, losses: Any = None) -> "Run":
        """Of a Measurement of NumPy arrays, and losses as for `advise`."""
        names, step = list(history.gradient_rms), history.step
        figures = {
            field: np.stack([getattr(history, field)[name] for name in names], axis=1).astype(float)
            for field in FIELDS
        }
        if losses is None:
            return cls(names, step, figures, None, None)
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
        return cls(names, step, figures, losses if comparable else None, loss_steps)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.figures[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def memory(self) -> float:
        """1 / (1 - decay), the updates that an accumulator remembers."""
        factors = np.nanmax(self.bias_correction_factor, axis=1)
        first = int(np.argmax(np.isfinite(factors)))
        return float(-1 / np.expm1(np.log1p(-factors[first]) / self.step[first]))

    def finding(
        self,
        figures: dict[str, float],
        cause: str,
        remedy: str,
        *,
        layers: np.ndarray | None = None,
        steps: tuple[int, int] | None = None,
    ) -> Finding:
        """A finding whose name `trouble` adds.

        Args:
          figures: as of Finding, NumPy numbers too.
          cause: as of Finding.
          remedy: as of Finding.
          layers: a mask of the layers that show it; by default the whole model does.
          steps: as of Finding, by default the first and the last that were measured.
        """
        names: tuple[str, ...] = ()
        if layers is not None and not (layers.all() and len(layers) > 1):
            names = tuple(np.array(self.names)[layers].tolist())
        first, last = self.step[[0, -1]] if steps is None else steps
        numbers = {name: float(value) for name, value in figures.items()}
        return Finding("", names, (int(first), int(last)), numbers, cause, remedy)

    def median_layer(self, figure: np.ndarray) -> np.ndarray:
        """The median over the layers that do not start from zero, for which a size can be told."""
        sized = np.isfinite(self.update_ratio[0]) & (self.update_ratio[0] > 0)
        return np.nanmedian(figure[:, sized], axis=1) if sized.any() else np.zeros(len(figure))


class Trouble(NamedTuple):
    """What `advise` looks for.

    Attributes:
      find: the finding in a run, or None.
      consequence_of: names of the troubles that bring this one about; beside them it is not reported.
      least: measurements that it takes.
    """

    find: Callable[[Run], Finding | None]
    consequence_of: Sequence[str]
    least: int


TROUBLES: dict[str, Trouble] = {}  # by name, gravest first


def trouble(name: str, *, consequence_of: Sequence[str] = (), least: int = ENOUGH) -> Callable:
    """Adds a trouble to those that :func:`advise` looks for, after all others.

    Args:
      name: what it is called.
      consequence_of: names of troubles that bring this one about; beside them it is not looked for.
      least: measurements that it takes.

    Returns:
      A decorator of a function from a :class:`Run` to :meth:`Run.finding`, or None where the run is in order.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import diagnostics
      >>> @diagnostics.trouble("loud layer", consequence_of=["the loss explodes"])
      ... def loud_layer(run):
      ...     rms = np.nanmedian(run.gradient_rms, axis=0)
      ...     loud = rms > 1e6
      ...     if not loud.any():
      ...         return None
      ...     remedy = "optax.clip_by_global_norm before the optimizer."
      ...     return run.finding({"gradients' rms": rms.max()}, "gradients are huge.", remedy, layers=loud)
    """

    def register(find):
        def named(run):
            finding = find(run)
            return None if finding is None else finding._replace(trouble=name)

        TROUBLES[name] = Trouble(named, tuple(consequence_of), least)
        return find

    return register
