"""Both sides in one process, alternating, so that what else the machine does falls on both."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_AGAIN = ", again"


def alternate(
    sides: dict[str, Callable[[], Any]], rounds: int, repeat: int = 1, queued: bool = False
) -> dict[str, list[float]]:
    """Seconds per call of each side, `repeat` calls each in turn, after one round that does not count.

    Every round has an order of its own, drawn by lot: a side finds in the caches what the one before it left,
    and there and back the first and the last would come twice in a row, by which they were 10% faster. A side
    returns arrays, which are waited for, or the seconds that it took, where it measures them itself. With
    `queued`, arrays are waited for after the last call only, so that a device has the next step before it is
    through with this one, as in training; what measures itself then does so in its method `queued(repeat)`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order, lot = list(sides), random.Random(0)
    for counts in [False] + [True] * rounds:
        lot.shuffle(order)
        for name in order:
            took = _timed(sides[name], repeat, queued)
            if counts:
                seconds[name].append(took)
    return seconds


def _timed(run, repeat, queued):
    if queued and hasattr(run, "queued"):
        return run.queued(repeat)
    measured = 0.0
    begun = time.perf_counter()
    for _ in range(repeat):
        result = run()
        if isinstance(result, float):
            measured += result
        elif not queued:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (measured or time.perf_counter() - begun) / repeat


def built_twice(make: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The sides, and each again, built in the order first, second, second again, first again.

    Equal steps of 2,000 leaves differ by up to 8%, by where their arrays and code come to lie in memory.
    """
    there = {name: build() for name, build in make.items()}
    back = {name + _AGAIN: make[name]() for name in reversed(make)}
    return there | back


def pooled(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Each round's mean over what was built twice."""
    return {
        name: [(a + b) / 2 for a, b in zip(times, seconds.get(name + _AGAIN, times), strict=True)]
        for name, times in seconds.items()
        if not name.endswith(_AGAIN)
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and the quarter and three-quarter quantiles as its spread."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def milliseconds(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)
