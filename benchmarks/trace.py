"""How long until the first step? Tracing, lowering and compiling an update and its addition, and their size.

For 20 to 2,000 leaves of 64. Before each measurement JAX forgets everything that it has compiled, as in a
process that begins. The rule is traced and lowered once for equal leaves and called for each, its
hyper-parameters constants in it: passed to it, they made lowering a third longer. Plainly, what is left to
lower for each leaf is that call, Optax's multiplication by the learning rate and the addition; momentum adds
two operations on either side.

XLA puts the calls back in place before it compiles, which takes most of the time, and here longer than
Optax's: the rule has more operations, those that keep a huge gradient and a zero one finite. Without these,
400 leaves compiled in 0.87 s, with them in 1.17, Optax's in 0.82; other ways to write them took as long or
longer.
"""

import argparse
import gc
import re
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks.eager import FORMS, PACKAGES
from benchmarks.side_by_side import environment, ratio, result, save

ROUNDS = {20: 10, 200: 5, 1000: 3, 2000: 2}  # by leaves: 2,000 take ten seconds to compile


def measure(package, options, params):
    """Seconds of each stage, lines of the lowered text and instructions of the compiled program."""
    tx = package.rmsprop(1e-3, **options)
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return package.apply_updates(params, updates), state

    jax.clear_caches()
    gc.collect()
    times = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    return {
        "trace": times[1] - times[0],
        "lower": times[2] - times[1],
        "compile": times[3] - times[2],
        "lines": lowered.as_text().count("\n"),
        "instructions": len(re.findall(r"^\s+(?:ROOT )?%\S+ = ", compiled.as_text(), re.MULTILINE)),
    }


def compare(form, leaves, rounds):
    params = [jnp.full(64, 0.1)] * leaves
    runs = {name: [] for name in PACKAGES}
    for _ in range(rounds):
        for name, package in PACKAGES.items():
            runs[name].append(measure(package, FORMS[form], params))
    until_lowered = {name: [run["trace"] + run["lower"] for run in some] for name, some in runs.items()}
    until_compiled = {
        name: [run["trace"] + run["lower"] + run["compile"] for run in some] for name, some in runs.items()
    }
    return {
        "leaves": leaves,
        "form": form,
        "rounds": rounds,
        **{
            name: {key: statistics.median(run[key] for run in some) for key in some[0]}
            for name, some in runs.items()
        },
        "lowered_faster": ratio(until_lowered["optax"], until_lowered["ours"]),
        "compiled_faster": ratio(until_compiled["optax"], until_compiled["ours"]),
    }


def table(data):
    lines = [
        "| leaves | form | trace and lower: Optax | rmsprop_jax | times faster, middle half | compile: Optax "
        "| rmsprop_jax | lines of StableHLO |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        theirs, ours, r = row["optax"], row["ours"], row["lowered_faster"]
        lines.append(
            f"| {row['leaves']:,} | {row['form']} | {theirs['trace'] + theirs['lower']:.2f} s "
            f"| {ours['trace'] + ours['lower']:.2f} s "
            f"| {r['median']:.1f} ({r['low']:.1f} to {r['high']:.1f}) "
            f"| {theirs['compile']:.1f} s | {ours['compile']:.1f} s "
            f"| {theirs['lines']:,}, {ours['lines']:,} |"
        )
    return "\n".join(lines)


def draw(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, form in zip(figure.subplots(1, len(FORMS), sharey=True), FORMS, strict=True):
        some = [row for row in rows if row["form"] == form]
        x = [row["leaves"] for row in some]
        for name, color in (("optax", "tab:orange"), ("ours", "tab:blue")):
            label = "optax.rmsprop" if name == "optax" else "rmsprop_jax"
            lowered = [row[name]["trace"] + row[name]["lower"] for row in some]
            compiled = [row[name]["compile"] for row in some]
            axes.loglog(x, lowered, "o-", color=color, ms=4, label=f"{label}: trace and lower")
            axes.loglog(x, compiled, "s--", color=color, ms=4, alpha=0.5, label=f"{label}: compile")
        axes.set_xticks(x, [f"{leaves:,}" if leaves != 1000 else "" for leaves in x])  # 2,000 needs the room
        axes.minorticks_off()
        axes.set(xlabel="leaves of 64", title=form)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel("seconds")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks trace", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="20 leaves, two rounds, nothing kept")
    short = parser.parse_args(argv).short
    rows = []
    for package in PACKAGES.values():
        measure(package, {}, [jnp.ones(64)])  # what Python imports and caches on the way is no one's time
    print(f"{'leaves':>7} {'form':19}   trace + lower, compile, seconds: optax   ours          times faster")
    for leaves, rounds in list(ROUNDS.items())[: 1 if short else None]:
        for form in FORMS:
            row = compare(form, leaves, rounds=2 if short else rounds)
            rows.append(row)
            cells = [
                f"{side['trace'] + side['lower']:7.3f} {side['compile']:7.3f}"
                for side in (row["optax"], row["ours"])
            ]
            print(
                f"{leaves:7,} {form:19} {cells[0]:>32}   {cells[1]}   "
                f"{row['lowered_faster']['median']:.2f}, {row['compiled_faster']['median']:.2f}",
                flush=True,
            )
    if not short:
        print(save("trace", {"environment": environment(), "rows": rows}))
        draw(rows, result("trace", ".png"))
