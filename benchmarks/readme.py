"""Puts the kept results into README.md and benchmarks/README.md, between `<!-- NAME -->` and `<!-- end -->`.

NAME is a benchmark, a benchmark's on a GPU (`step_gpu`), or `costs`, which has a few rows of several.
README.md takes a benchmark's `table`, benchmarks/README.md its `report` where it has one.
"""

import importlib
import json
import re
from pathlib import Path

from benchmarks._frame import RESULTS

README = Path(__file__).parents[1] / "README.md"
REPORT = Path(__file__).parent / "README.md"


def filled(text: str, whole: bool = False) -> str:
    """The text with every marked place filled from benchmarks/results; `whole` for reports, not tables."""

    def fill(match):
        name = match[1]
        content = costs() if name == "costs" else _results(name, whole)
        return f"<!-- {name} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def costs() -> str:
    """Without jit, until the first step, and the share of a training step: a row of each benchmark."""
    eager, trace, train = (_read(name) for name in ("eager", "trace", "train"))
    lines = ["| | Optax | here | times faster |", "|---|---|---|---|"]
    for row in eager["rows"]:
        if row["leaves"] == 200:
            ms = row["milliseconds"]
            lines.append(
                f"| a step without `jit`, 200 leaves, {row['form']} "
                f"| {ms['optax']:.0f} ms | {ms['ours']:.0f} ms | {row['faster']['median']:.1f} |"
            )
    for row in trace["rows"]:
        if row["leaves"] == 1000:
            lowered = {name: row[name]["trace"] + row[name]["lower"] for name in ("optax", "ours")}
            cells = [f"{s:.1f} s; {s + row[name]['compile']:.1f} s" for name, s in lowered.items()]
            lines.append(
                f"| 1,000 leaves lowered; and compiled, {row['form']} | {cells[0]} | {cells[1]} "
                f"| {row['lowered_faster']['median']:.1f}; {row['compiled_faster']['median']:.1f} |"
            )
    for row in train["rows"]:
        shares = [f"{row['share'][name]['median']:.1%}" for name in ("optax", "ours")]
        lines.append(
            f"| share of a jitted training step, {row['network']} | {shares[0]} | {shares[1]} "
            f"| {1 / row['ratio']['median']:.2f}, the whole step |"
        )
    return "\n".join(lines) + f"\n\n{_where(train)}"


def _results(name, whole):
    if not (RESULTS / f"{name}.json").exists() and name.endswith("_gpu"):
        return "Not measured."
    data = _read(name)
    module = importlib.import_module(f"benchmarks.{name.removesuffix('_gpu')}")
    content = module.report(data) if whole and hasattr(module, "report") else module.table(data)
    return f"{content}\n\n{_where(data)}"


def _read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def _where(data):
    others = ", ".join(f"{key} {value}" for key, value in data["environment"].items() if key != "device")
    return f"{data['environment']['device']}; {others}."


def main(argv=None):
    README.write_text(filled(README.read_text()))
    REPORT.write_text(filled(REPORT.read_text(), whole=True))
