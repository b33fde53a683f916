"""Tables of the results, for the site: `<!-- table NAME -->` in docs/*.md stands for one.

NAME is a benchmark, a benchmark's on a GPU (`step_gpu`), `gpu`, which has how all of those ended, or `costs`,
which has a few rows of several. Another
table of a benchmark is `<!-- table NAME FUNCTION -->`.
"""

import importlib
import json
import re

from benchmarks._frame import RESULTS, markdown


def filled(text: str) -> str:
    """The page with its tables, each with what it was measured on."""
    return re.sub(r"<!-- table (\w+) ?(\w*) -->", lambda match: _table(match[1], match[2] or "table"), text)


def costs() -> str:
    """What a user pays with and without jit, until the first step and in training."""
    step, eager, trace, train = (_read(name)["rows"] for name in ("step", "eager", "trace", "train"))
    cells = []
    for row in step:
        if row["tree"] == "transformer":
            ms = row["milliseconds"]
            times = f"{ms['optax']:.1f} ms", f"{ms['ours']:.1f} ms", f"{1 / row['ratio']['median']:.2f}"
            cells.append((f"a jitted step, 30 million parameters, {row['form']}", *times))
    for row in eager:
        if row["leaves"] == 200:
            ms = row["milliseconds"]
            times = f"{ms['optax']:.0f} ms", f"{ms['ours']:.0f} ms", f"{row['faster']['median']:.1f}"
            cells.append((f"a step without `jit`, 200 leaves, {row['form']}", *times))
    for row in trace:
        if row["leaves"] == 1000:
            lowered = {name: row[name]["trace"] + row[name]["lower"] for name in ("optax", "ours")}
            times = [f"{s:.1f} s; {s + row[name]['compile']:.1f} s" for name, s in lowered.items()]
            faster = [f"{row[name]['median']:.1f}" for name in ("lowered_faster", "compiled_faster")]
            cells.append((f"1,000 leaves lowered; and compiled, {row['form']}", *times, "; ".join(faster)))
    for row in train:
        shares = [f"{row['share'][name]['median']:.1%}" for name in ("optax", "ours")]
        whole = f"{1 / row['ratio']['median']:.2f}, the whole step"
        cells.append((f"share of a jitted training step, {row['network']}", *shares, whole))
    return markdown(["", "Optax", "here", "times faster"], cells)


def _table(name, function):
    if name.endswith("gpu") and not (RESULTS / f"{name}.json").exists():
        return "Not measured."
    data = _read("train" if name == "costs" else name)
    benchmark = name.removesuffix("_gpu")
    table = (
        costs()
        if name == "costs"
        else getattr(importlib.import_module(f"benchmarks.{benchmark}"), function)(data)
    )
    where = ", ".join(f"{key} {value}" for key, value in data["environment"].items() if key != "device")
    return f"{table}\n\n{data['environment']['device']}; {where}."


def _read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())
