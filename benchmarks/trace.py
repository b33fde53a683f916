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

import gc
import re
import statistics

import jax
import jax.numpy as jnp

from benchmarks._frame import keep, markdown, parser, printed, save_picture, spread
from benchmarks._steps import FEW_FORMS, FORMS, PACKAGES, compiled, update_and_apply
from benchmarks.side_by_side import ratio

ROUNDS = {20: 10, 200: 5, 1000: 3, 2000: 2}  # by leaves: 2,000 take ten seconds to compile


def measure(package, options, params):
    """Seconds of each stage, lines of the lowered text and instructions of the compiled program."""
    tx = package.rmsprop(1e-3, **options)
    kept = params, tx.init(params)
    jax.clear_caches()
    gc.collect()
    lowered, program, seconds = compiled(update_and_apply(tx, package.apply_updates), kept, params)
    instructions = re.findall(r"^\s+(?:ROOT )?%\S+ = ", program.as_text(), re.MULTILINE)
    return {**seconds, "lines": lowered.as_text().count("\n"), "instructions": len(instructions)}


def compare(form, leaves, rounds):
    params = [jnp.full(64, 0.1)] * leaves
    runs = {name: [] for name in PACKAGES}
    for _ in range(rounds):
        for name, package in PACKAGES.items():
            runs[name].append(measure(package, FORMS[form], params))
    until = {
        last: {name: [sum(run[stage] for stage in stages) for run in some] for name, some in runs.items()}
        for last, stages in (("lower", ("trace", "lower")), ("compile", ("trace", "lower", "compile")))
    }
    return {
        "leaves": leaves,
        "form": form,
        "rounds": rounds,
        **{
            name: {key: statistics.median(run[key] for run in some) for key in some[0]}
            for name, some in runs.items()
        },
        "lowered_faster": ratio(until["lower"]["optax"], until["lower"]["ours"]),
        "compiled_faster": ratio(until["compile"]["optax"], until["compile"]["ours"]),
    }


def table(data):
    columns = [
        "leaves",
        "form",
        "trace and lower: Optax",
        "rmsprop_jax",
        "times faster (interquartile range)",
    ]
    rows = []
    for row in data["rows"]:
        sides = row["optax"], row["ours"]
        lowered = [f"{side['trace'] + side['lower']:.2f} s" for side in sides]
        compiled = [f"{side['compile']:.1f} s" for side in sides]
        lines = ", ".join(f"{side['lines']:,.0f}" for side in sides)
        rows.append(
            (f"{row['leaves']:,}", row["form"], *lowered, spread(row["lowered_faster"], 1), *compiled, lines)
        )
    return markdown([*columns, "compile: Optax", "rmsprop_jax", "lines of StableHLO"], rows)


def draw(rows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, form in zip(figure.subplots(1, len(FEW_FORMS), sharey=True), FEW_FORMS, strict=True):
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
    figure.axes[0].set_ylabel("seconds")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def line(row):
    sides = [
        f"{side['trace'] + side['lower']:7.3f} {side['compile']:7.3f}" for side in (row["optax"], row["ours"])
    ]
    return (
        f"{row['leaves']:7,} {row['form']:19} {sides[0]:>32}   {sides[1]}   "
        f"{row['lowered_faster']['median']:.2f}, {row['compiled_faster']['median']:.2f}"
    )


def main(argv=None):
    options = parser("trace", __doc__, short="20 leaves, two rounds, nothing kept")
    short = options.parse_args(argv).short
    for package in PACKAGES.values():
        measure(package, {}, [jnp.ones(64)])  # what Python imports and caches on the way is no one's time
    cases = (
        compare(form, leaves, rounds)
        for leaves, rounds in ({20: 2} if short else ROUNDS).items()
        for form in FEW_FORMS
    )
    heading = (
        f"{'leaves':>7} {'form':19}   trace + lower, compile, seconds: optax   ours          times faster"
    )
    rows = printed(heading, cases, line)
    if not short:
        keep("trace", {"rows": rows})
        save_picture("trace", draw(rows))
