"""A benchmark whose cases can be given a time, and whose data can be written as they come."""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import _frame


def parser(name: str, doc: str, short: str) -> argparse.ArgumentParser:
    """With what a `Run` may take, and where its data go."""
    made = _frame.parser(name, doc, short)
    made.add_argument("--out", type=Path, help="a folder for the data, which are written as they come")
    made.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that would end later")
    return made


class Run:
    """One run of a benchmark: how long it may take, and where its data go.

    With --out, they are written into that folder after every case, also of short runs, so that a run which is
    ended loses only the case that it was at; "not_run" has the cases without a row, and why. Otherwise they
    go into `results`, once all is measured, and of short runs nowhere.
    """

    def __init__(self, name: str, options: argparse.Namespace, *packages: str):
        self.name, self.out, self.short = name, options.out, options.short
        self.ends = time.monotonic() + options.seconds
        self.data: dict[str, Any] = {"environment": _frame.environment(*packages)}
        if self.out is not None:
            self.data["not_run"] = {}

    def measured(self, cases: dict[str, Callable[[], Any]], key: str = "rows") -> Iterator[Any]:
        """What each case returns, which `data[key]` has too.

        With --out, a case that fails is left out, and so is one for which there would not be time if it took
        as long as the longest of those before it.
        """
        rows, longest = self.data.setdefault(key, []), 0.0
        missing = self.data.get("not_run", {})
        missing |= dict.fromkeys(cases, "not reached")
        for name, case in cases.items():
            begun = time.monotonic()
            if begun + longest > self.ends:
                missing[name] = "no time left"
                continue
            try:
                row = case()
            except Exception as error:  # such as a GPU without the memory
                if self.out is None:
                    raise
                missing[name] = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
                print(f"{name} is not measured: {missing[name]}", flush=True)
                continue
            longest = max(longest, time.monotonic() - begun)
            missing.pop(name)
            rows.append(row)
            self.write()
            yield row
        self.write()

    def write(self) -> None:
        if self.out is not None:
            _frame.save(self.name, self.data, self.out)

    def end(self, draw: Callable[[dict[str, Any]], Any] | None = None) -> None:
        """Keeps the data in `results`, with a picture, where they belong there."""
        self.write()
        if self.out is None and not self.short:
            print(_frame.save(self.name, self.data))
            if draw is not None:
                _frame.save_picture(self.name, draw(self.data))
