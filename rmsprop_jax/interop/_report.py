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

    Example:
      >>> from rmsprop_jax import interop
      >>> print(interop.Report(("fc/kernel",), ("head/kernel",), ("fc2.weight",)))
      1 carried over. Kept as init made them: 'head/kernel'. Left behind: 'fc2.weight'.
    """

    carried: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.carried)} carried over."]
        if self.kept:
            parts.append(f"Kept as init made them: {', '.join(map(repr, self.kept))}.")
        if self.left_behind:
            parts.append(f"Left behind: {', '.join(map(repr, self.left_behind))}.")
        return " ".join(parts)


Reporter = Callable[[Report], object]


def tell(report: Report, reporter: Reporter | None, strict: bool) -> None:
    """Hands the report over; without anybody to take it, logs one that is not strict."""
    if reporter is not None:
        reporter(report)
    elif not strict:
        LOGGER.log(logging.WARNING if report.kept or report.left_behind else logging.INFO, "%s", report)
