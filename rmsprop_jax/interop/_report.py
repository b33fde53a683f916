"""What was carried over and what was not: handed to `report`, or logged."""

import logging
from collections.abc import Callable
from typing import NamedTuple

LOGGER = logging.getLogger("rmsprop_jax.interop")


class Report(NamedTuple):
    """What became of each parameter when a state was carried over.

    Attributes:
      carried: the paths of those that have their state, or their value, from there.
      kept: the paths of those that have what was in the tree before: they have no name in `names`, or nothing
        under that name there (a new head, a frozen layer, one that was never stepped).
      left_behind: the names of those there that have no place here.
      older: those of `kept` that start anew beside a count that goes on.
      updates: that count.
      groups: the names in each of PyTorch's groups, where `order` alone says so and arrays of one shape are
        in several groups, so that another order would have fitted too.

    Example:
      >>> from rmsprop_jax import interop
      >>> print(interop.Report(("fc/kernel",), ("head/kernel",), ("fc2.weight",)))
      1 carried over. Kept as init made them: 'head/kernel'. Left behind: 'fc2.weight'.
    """

    carried: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    updates: int = 0
    groups: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.carried)} carried over."]
        if self.kept:
            parts.append(f"Kept as init made them: {_listed(self.kept)}.")
        if self.left_behind:
            parts.append(f"Left behind: {_listed(self.left_behind)}.")
        if self.older:
            parts.append(
                f"The count of {self.updates} updates holds for {_listed(self.older)} too: first steps are "
                "up to 1/sqrt(1 - decay) times too long with bias_correction, a warm-up is over. A part of "
                "optax.partition, as resume_torch(new_group=) makes one, has a count that starts at 0."
            )
        if self.groups:
            groups = "; ".join(f"group {i}: {_listed(group)}" for i, group in enumerate(self.groups))
            parts.append(f"By `order` alone, which nothing in the checkpoint confirms, {groups}.")
        return " ".join(parts)


Reporter = Callable[[Report], object]


def tell(report: Report, reporter: Reporter | None, strict: bool) -> None:
    """Hands the report over; without anybody to take it, logs one that is not strict or has a doubt."""
    if reporter is not None:
        reporter(report)
    elif not strict or report.groups:
        is_whole = not (report.kept or report.left_behind or report.groups)
        LOGGER.log(logging.INFO if is_whole else logging.WARNING, "%s", report)


def _listed(names):
    return ", ".join(map(repr, names))
