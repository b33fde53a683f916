"""Exact rows against dense `optax.rmsprop`: time and temporary memory of a training step.

A step looks up ids in a table of 64 columns, has the loss mean((rows @ w - y)^2), and updates table and w:
forward, backward and update in one jitted function that donates its state. Both sides have the same ids, in
one process, and take turns of ten steps, each with ids of its own. Times are medians over steps without the
first of a turn, which finds the other side's data in the caches; compile time is apart. A dense update of a
large table allocates and frees gigabytes, and the next steps pay for that: so rows are also timed alone.

    python -m benchmarks rows            tables of 1e4 to 1e7 rows, 256 to 16,384 ids, uniform and Zipf
    python -m benchmarks rows --short    the smallest tables, a few turns
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks._frame import markdown, printed
from benchmarks._run import Run, parser
from benchmarks._steps import Step, on_accelerator
from rmsprop_jax import apply_updates, rmsprop, rows

WIDTH = 64
BATCHES = (256, 1024, 4096, 16384)
ALONE = 40


def loss_fn(found, params, target):
    return jnp.mean((found @ params - target) ** 2)


def row_side():
    tx = optax.partition({"rows": rows.exact(rmsprop(1e-3)), "dense": rmsprop(1e-3)}, ("rows", "dense"))

    def step(kept, ids, target):
        both, state = kept
        table, params = both
        loss, grads = rows.value_and_grad(loss_fn)(table, ids, params, target)
        updates, state = tx.update(grads, state, both)
        return (apply_updates(both, updates), state), loss

    return tx, step


def dense_side():
    tx = optax.rmsprop(1e-3)

    def step(kept, ids, target):
        both, state = kept
        loss, grads = jax.value_and_grad(lambda both: loss_fn(both[0][ids], both[1], target))(both)
        updates, state = tx.update(grads, state, both)
        return (optax.apply_updates(both, updates), state), loss

    return tx, step


SIDES = {"rows": row_side, "dense": dense_side}


class Side(Step):
    def __init__(self, name, num_rows, batch):
        tx, step = SIDES[name]()
        both = jnp.zeros((num_rows, WIDTH)), jnp.ones(WIDTH)
        ids, target = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.float32)
        super().__init__(step, (both, jax.jit(tx.init)(both)), ids, target)
        self.milliseconds = []

    def take_steps(self, batches):
        """Their losses. Each step is timed; on an accelerator they are queued, and timed together."""
        each, losses = not on_accelerator(), []
        start = time.perf_counter()
        for batch in batches:
            losses.append(self(*batch)[1])
            if each:
                jax.block_until_ready((self.kept, losses[-1]))
                self.milliseconds.append(1e3 * (time.perf_counter() - start))
                start = time.perf_counter()
        if not each:
            jax.block_until_ready((self.kept, losses))
            self.milliseconds += [1e3 * (time.perf_counter() - start) / len(losses)] * len(losses)
        return [float(loss) for loss in losses]


def draw_ids(rng, distribution, num_rows, batch):
    if distribution == "uniform":
        return jnp.asarray(rng.integers(num_rows, size=batch, dtype=np.int32))
    # Zipf with exponent 1, as words have it: the rank's logarithm is uniform. Ranks scattered over the table.
    ranks = np.exp(rng.uniform(0, np.log(num_rows), batch)).astype(np.int64) - 1
    return jnp.asarray((ranks * 7_368_787 % num_rows).astype(np.int32))


def compare(num_rows, batch, distribution, turns, steps):
    """One row of the results. The first turn is not measured."""
    rng = np.random.default_rng(0)
    sides = {name: Side(name, num_rows, batch) for name in SIDES}
    losses = {name: [] for name in SIDES}
    for _ in range(turns + 1):
        batches = [
            (draw_ids(rng, distribution, num_rows, batch), jnp.asarray(rng.normal(size=batch), jnp.float32))
            for _ in range(steps)
        ]
        for name, side in sides.items():
            losses[name] += side.take_steps(batches)
    # An accelerator adds gradients of the same row in an order that varies.
    np.testing.assert_allclose(losses["rows"], losses["dense"], rtol=1e-3 if on_accelerator() else 1e-4)
    milliseconds = {name: np.reshape(side.milliseconds, (-1, steps))[1:, 1:] for name, side in sides.items()}
    for _ in range(ALONE // 10):
        ones = jnp.ones(batch)
        sides["rows"].take_steps([(draw_ids(rng, distribution, num_rows, batch), ones) for _ in range(10)])
    result = {
        "num_rows": num_rows,
        "batch": batch,
        "distribution": distribution,
        "turns": turns,
        "steps": steps,
    }
    for name, side in sides.items():
        result[name] = {
            "ms": float(np.median(milliseconds[name])),
            "temporary_bytes": side.temporary_bytes,
            "compile_s": side.stages["compile"],
            "operations": side.operations,
        }
    result["rows"]["alone_ms"] = float(np.median(sides["rows"].milliseconds[-ALONE // 2 :]))
    return result | {"ratio": result["dense"]["ms"] / result["rows"]["ms"]}


def draw(results):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, distribution in zip(figure.subplots(1, 2, sharey=True), ("uniform", "zipf"), strict=True):
        some = [r for r in results if r["distribution"] == distribution]
        for shade, batch in enumerate(sorted({r["batch"] for r in some})):
            lines = [r for r in some if r["batch"] == batch]
            for name, color, mark in (("rows", "tab:blue", "o-"), ("dense", "tab:orange", "s--")):
                times = [r[name].get("alone_ms", r[name]["ms"]) for r in lines]
                x, y = [r["num_rows"] for r in lines], times
                alpha = 0.4 + 0.2 * shade
                axes.loglog(x, y, mark, color=color, alpha=alpha, ms=4, label=f"{name}, {batch:,} ids")
        axes.set(xlabel="rows of the table", title=f"{distribution} ids")
    figure.axes[0].set_ylabel("milliseconds per training step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i].startswith("rows"))
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside right center", frameon=False
    )
    return figure


def _time(ms):
    return f"{ms:.1f} ms" if ms >= 0.5 else f"{ms:.3f} ms"


def table(data):
    """Tables of every size, with the ids of one batch size and distribution."""
    columns = ["rows of the table", "dense `optax.rmsprop`", "`rows.exact`", "ratio", "rows, alone"]
    cells = []
    for r in data["results"]:
        if (r["batch"], r["distribution"]) == (4096, "zipf"):
            dense, ours = r["dense"], r["rows"]
            times = _time(dense["ms"]), _time(ours["ms"]), f"{r['ratio']:.1f}"
            megabytes = [side["temporary_bytes"] / 1e6 for side in (dense, ours)]
            temporaries = f"{megabytes[0]:,.0f} MB, {megabytes[1]:.0f} MB"
            cells.append((f"{r['num_rows']:,}", *times, _time(ours["alone_ms"]), temporaries))
    return markdown([*columns, "temporaries"], cells)


def line(r):
    megabytes = [r[name]["temporary_bytes"] / 1e6 for name in SIDES]
    return (
        f"{r['num_rows']:10,} {r['batch']:8,} {r['distribution']:8} {r['rows']['ms']:9.2f} "
        f"{r['rows']['alone_ms']:9.2f} {r['dense']['ms']:9.2f} "
        f"{r['ratio']:7.1f} {megabytes[0]:8.1f} {megabytes[1]:9.1f}"
    )


def main(argv=None):
    options = parser("rows", __doc__, short="the smallest tables, a few turns")
    sizes = [1e4, 1e5, 1e6, 1e7]
    options.add_argument("--tables", type=float, nargs="+", default=sizes, help="rows of the tables")
    options.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="ids per step")
    args = options.parse_args(argv)
    tables, batches = args.tables, args.batches
    if args.short:
        tables, batches = sorted(tables)[:2], [b for b in batches if b in (256, 4096)]

    def measured(num_rows, batch, distribution):
        turns, steps = (1, 3) if args.short or num_rows > 2e6 else (4, 10)
        return compare(num_rows, batch, distribution, *((8, 20) if on_accelerator() else (turns, steps)))

    cases = {
        f"{int(n):,} rows, {b:,} ids, {d}": partial(measured, int(n), b, d)
        for n in tables
        for d in ("uniform", "zipf")
        for b in batches
    }
    heading = (
        f"{'rows':>10} {'ids':>8} {'':8} {'rows ms':>9} {'alone':>9} {'dense ms':>9} {'ratio':>7} "
        f"{'rows MB':>8} {'dense MB':>9}"
    )
    run = Run("rows", args)
    run.data["width"] = WIDTH
    with tqdm(
        run.measured(cases, "results"), total=len(cases), desc="rows", leave=False, disable=None
    ) as bar:
        printed(heading, bar, line, write=tqdm.write)
    run.end(lambda data: draw(data["results"]))
