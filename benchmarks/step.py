"""What does a step cost beside everything that a user would pick instead? Update and apply, float32.

The trees: one matrix of 33 million parameters; a transformer's, 30 million in 74 leaves; 200 and 2,000 leaves
of 64. The gradients stay the same: their values do not matter to the time. `optax.rmsprop`, `rmsprop` and
Keras 3 (its `stateless_apply`) are jitted and donated; PyTorch runs in a process of its own (`torch_side.py`)
in a loop, by foreach and compiled. All sides take turns. What is not installed is not measured; nor is what a
compiler would need minutes for: torch.compile of forms other than the plain one and of 2,000 leaves, and
2,000 leaves centred with momentum. `optax.rmsprop` and `rmsprop` are built twice each (`built_twice`).

The limit is the time in which memory moves the bytes that must move: parameter and accumulators read and
written, gradient read, plainly 20 bytes per parameter. The bandwidth is measured in the same turns
(`bandwidth.py`), and is that of the fastest of four kernels.

Why a step is not at the limit on a CPU. XLA makes one loop for each array that is written, `optax.rmsprop`'s
too, so that plainly 28 bytes per parameter are read and written: 12 in the loop of the accumulator, 16 in
that of the parameter. Each alone, in a program of its own, moved its bytes at 36 GB/s, where an array
multiplied in place moved its own at 48: together 1.4 * 1.3 = 1.8 of the limit. XLA runs the loops of all
accumulators before those of the parameters; forced to go leaf by leaf, so that the second loop may find in
the caches what the first one left, the step was 10% faster. That is not done here: the order can only be
forced by making each leaf depend on a number from the one before, and in shards that is a message between
devices.

Why centred is above Optax on the transformer's tree, as far as we can tell. Optax's two raw moments are
independent loops, one after the other, so that the second may find the gradient in the caches; here the
variance needs the new mean, and its loop comes after those of all leaves' means, which would make 44 bytes to
Optax's 40. From the old mean, XLA copies an accumulator for every leaf; with the mean made to wait for the
variance it does not, but that was slower still (1.09 of Optax where this was 1.06).

PyTorch's foreach passes over its tensors five times, 52 bytes per parameter by count; with 28 here, five
times its speed is out of reach while both are bound by memory.
"""

import contextlib
import importlib.util
import os
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks._frame import installed, markdown, printed, spread
from benchmarks._run import Run, parser
from benchmarks._steps import (
    FEW_FORMS,
    FORMS,
    PACKAGES,
    Step,
    both,
    gradients,
    kernels,
    on_accelerator,
    size,
    wider,
)
from benchmarks.bandwidth import gigabytes_per_second, streams
from benchmarks.side_by_side import alternate, milliseconds, pooled, ratio
from benchmarks.torch_side import VARIANTS, TorchProcess

PEERS = ("keras", *VARIANTS)


def one_leaf(scale=1):
    return {"w": jnp.full((int(65536 * scale**2), 512), 0.1)}


def transformer(scale=1):
    """As many times as wide as one of 30 million parameters; of a single block where that is narrower."""
    width = int(512 * scale)
    block = {
        **dict.fromkeys(("query", "key", "value", "out"), (width, width)),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        **dict.fromkeys(("norm_attention", "norm_mlp"), (width,)),
    }
    shapes = {
        **{f"block_{i}": block for i in range(9 if scale >= 1 else 1)},
        "embed": (int(3072 * scale), width),
        "norm": (width,),
    }
    return jax.tree.map(lambda shape: jnp.full(shape, 0.1), shapes, is_leaf=lambda x: isinstance(x, tuple))


def small_leaves(count):
    return {f"leaf_{i}": jnp.full(64, 0.1) for i in range(count)}


TREES = {
    "one leaf": one_leaf,
    "transformer": transformer,
    "200 leaves": lambda scale=1: small_leaves(int(200 * min(1, scale**2))),
    "2,000 leaves": lambda scale=1: small_leaves(int(2000 * min(1, scale**2))),
}


def keras_step(options, params):
    """The step of `keras.optimizers.RMSprop`, on Keras's JAX backend."""
    import keras

    variables = [keras.Variable(leaf) for leaf in jax.tree.leaves(params)]
    optimizer = keras.optimizers.RMSprop(1e-3, rho=0.9, epsilon=1e-8, **options)
    optimizer.build(variables)

    def step(kept, grads):
        params, state = kept
        return optimizer.stateless_apply(state, grads, params), ()

    # Copies: Keras's variables keep the arrays that they were built with.
    params, state = ([jnp.copy(v.value) for v in some] for some in (variables, optimizer.variables))
    return Step(step, (params, state), gradients(params))


def has_keras():
    if not importlib.util.find_spec("keras"):
        return False
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    return keras.backend.backend() == "jax"


def forms_of(tree, short):
    if short:
        return ("plain", "centered, momentum")
    if tree in ("one leaf", "transformer"):
        return tuple(FORMS)
    return FEW_FORMS[:2] if tree == "2,000 leaves" else FEW_FORMS


def moved_bytes(params, options):
    """Parameter and accumulators read and written, gradient read: plainly 20 bytes per parameter."""
    accumulators = 1 + len(options)
    return size(params) * 4 * (2 * (1 + accumulators) + 1)


def compare(tree, form, scale, torch, rounds, short):
    options, params, queued = FORMS[form], TREES[tree](scale), on_accelerator()
    leaves = jax.tree.leaves(params)
    total = size(params)
    sides = both(params, **options)
    if torch is not None and has_keras():
        sides["keras"] = keras_step(options, params)
    for variant in VARIANTS if torch is not None else ():
        if variant != "torch compile" or (not short and form == "plain" and len(leaves) <= 200):
            shapes = [leaf.shape for leaf in leaves]
            step = torch.step(variant, shapes, options, jax.default_backend())
            if step is not None:
                sides[variant] = step
    # Small trees fit the caches: many steps in a turn, and streams apart from them.
    small = total < 1e6
    stream = streams(max(total, 2**16))
    repeat = 1 if short else 20 if queued else max(1, min(20, 300_000 // total))
    seconds = pooled(alternate(sides if small else sides | stream, rounds, repeat, queued))
    seconds |= alternate(stream, rounds, repeat, queued) if small else {}
    if torch is not None:
        torch.clear()
    sides = {name: side for name, side in sides.items() if name in seconds}
    bandwidth = gigabytes_per_second(stream, seconds)
    limit = 1e3 * moved_bytes(params, options) / (max(bandwidth.values()) * 1e9)
    ours = seconds["ours"]
    return {
        "tree": tree,
        "form": form,
        "parameters": total,
        "leaves": len(leaves),
        "milliseconds": {name: milliseconds(seconds[name]) for name in sides},
        "compile_seconds": {name: side.compile_s for name, side in sides.items()},
        "ratio": ratio(ours, seconds["optax"]),
        "of_ours": {name: ratio(seconds[name], ours) for name in PEERS if name in sides},
        "gigabytes_per_second": bandwidth,
        "limit_milliseconds": None if small else limit,
        "temporary_bytes": {
            name: side.temporary_bytes for name, side in sides.items() if isinstance(side, Step)
        },
        "operations": {name: sides[name].operations for name in PACKAGES},
    }


def _of_size(row):
    millions = row["parameters"] / 1e6
    return (
        f"{row['tree']}, {millions:.0f} million in {row['leaves']}"
        if millions >= 1
        else f"{row['tree']} of 64"
    )


def _time(ms):
    return f"{ms:.1f} ms" if ms >= 1 else f"{ms:.3f} ms"


def _times(row, name):
    return f"{row['of_ours'][name]['median']:.1f}" if name in row["of_ours"] else "-"


def table(data):
    """Every tree and form, then how long they compile, and the bandwidth."""
    columns = ["tree", "form", "`optax.rmsprop`", "`rmsprop`", "ratio (interquartile range)", "Keras"]
    names = ("optax", "ours", "keras", "torch compile")
    stepping, compiling, rates = [], [], {}
    for row in sorted(data["rows"], key=lambda row: list(TREES).index(row["tree"])):
        ms, limit, seconds = row["milliseconds"], row["limit_milliseconds"], row["compile_seconds"]
        times = _time(ms["optax"]), _time(ms["ours"]), spread(row["ratio"])
        peers = _times(row, "keras"), ", ".join(_times(row, name) for name in VARIANTS)
        of_limit = "" if limit is None else f"{ms['ours'] / limit:.2f}"
        stepping.append((_of_size(row), row["form"], *times, *peers, of_limit))
        cells = (f"{seconds[name]:.2f}" if seconds.get(name) is not None else "-" for name in names)
        compiling.append((_of_size(row), row["form"], *cells))
        if limit is not None:
            for name, rate in row["gigabytes_per_second"].items():
                rates.setdefault(name, []).append(rate)
    medians = ", ".join(f"{name} {sorted(some)[len(some) // 2]:.0f}" for name, some in rates.items())
    return "\n\n".join(
        [
            markdown([*columns, "PyTorch loop, foreach, compiled", "of the limit"], stepping),
            "Seconds to trace, lower and compile; PyTorch's first step:",
            markdown(["tree", "form", *names], compiling),
            *_programs(data["rows"]),
            f"Bandwidth in the same turns, GB/s, median of the large trees' rows: {medians}.",
        ]
    )


def _programs(rows):
    """What the compiled steps consist of, where it was counted."""
    cells = []
    for row in rows:
        for name, operations in row.get("operations", {}).items():
            counts = kernels(operations), operations.get("copy", 0), operations.get("custom-call", 0)
            temporary = f"{row['temporary_bytes'][name] / 1e6:.2f} MB"
            cells.append((_of_size(row), row["form"], name, *(f"{n:,}" for n in counts), temporary))
    columns = ["tree", "form", "side", "kernels", "of them copies", "custom calls", "temporaries"]
    return ["The compiled programs:", markdown(columns, cells)] if cells else []


def line(row):
    ms, limit = row["milliseconds"], row["limit_milliseconds"]
    peers = "  ".join(f"{_times(row, name):>{len(name)}}" for name in PEERS)
    return (
        f"{row['tree']:13} {row['form']:19} {ms['optax']:8.3f} {ms['ours']:8.3f}   "
        f"{spread(row['ratio'], 3)}   {peers}" + ("" if limit is None else f"   {limit:.2f} ms")
    )


def main(argv=None):
    made = parser("step", __doc__, short="small trees, a few rounds, nothing kept")
    made.add_argument("--trees", choices=TREES, nargs="+", default=TREES, metavar="TREE", help="some of them")
    made.add_argument("--no-peers", action="store_true", help="without Keras and PyTorch")
    options = made.parse_args(argv)
    short = options.short
    rounds, scale = (3, 1 / 8) if short else (20, wider())
    heading = (
        f"{'':33} {'optax':>8} {'ours':>8}   ratio (quartiles)      times ours: {'  '.join(PEERS)}   limit"
    )
    run = Run("step", options, *installed("keras", "torch"))
    run.data["rounds"] = rounds
    with contextlib.nullcontext() if options.no_peers else TorchProcess() as torch:
        cases = {
            f"{tree}, {form}": partial(compare, tree, form, scale, torch, rounds, short)
            for form in FORMS  # all plain ones first, where there is not time for all
            for tree in options.trees
            if form in forms_of(tree, short)
        }
        printed(heading, run.measured(cases), line)
    run.end()
