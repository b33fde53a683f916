"""What do the compilers for GPUs and TPUs make of a step? Compiled, not run: kernels, bytes, collectives.

    make accelerators             installs the compilers, runs the tests, and prints the short form
    .venv-accelerators/bin/python -m benchmarks accelerators         all chips; the data go into results

One matrix that is larger than a TPU's fast memory, update and apply, jitted and donated. Counted are the
kernels that run on every step, the bytes of memory that they read and write, and temporary bytes; beside them
stands the least: each array read and written once, the gradient read. Then come steps on eight devices, with
the bytes that each puts into collectives. No time is measured. The least time is bytes over the bandwidth of
the memory, from the data sheet.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import rmsprop_jax
from benchmarks import _aot
from benchmarks._frame import environment, markdown, parser, printed, save
from benchmarks._steps import FORMS, PACKAGES
from benchmarks.memory import SETTINGS
from rmsprop_jax.sharding import state_sharding

SHAPE = 8192, 16384
STEPS = {
    f"{name}, {form}": (package.rmsprop, options, jnp.float32)
    for form, options in FORMS.items()
    for name, package in PACKAGES.items()
} | {name: setting for name, setting in SETTINGS.items() if name not in ("float32", "optax, float32")}
TABLE, TOUCHED = (1_000_000, 128), 4096


def step(make, options, dtype):
    """Update and apply, and the shapes of what they take."""
    tx, params = make(1e-3, **options), jax.ShapeDtypeStruct(SHAPE, dtype)
    is_small = jnp.finfo(dtype).bits < 32

    def run(params, state, grads, key):
        updates, state = tx.update(grads, state, params)
        return rmsprop_jax.apply_updates(params, updates, key=key if is_small else None), state

    key = jax.eval_shape(jax.random.key, 0)
    return run, (params, jax.eval_shape(tx.init, params), params, key)


def step_on_rows():
    """The same on rows of a table."""
    tx, table = rmsprop_jax.rows.exact(rmsprop_jax.rmsprop(1e-3)), jax.ShapeDtypeStruct(TABLE, jnp.float32)

    def run(table, state, ids, values):
        gradient = rmsprop_jax.rows.RowGradient(ids, values, TABLE[0])
        updates, state = tx.update(gradient, state, table)
        return rmsprop_jax.apply_updates(table, updates), state

    ids = jax.ShapeDtypeStruct((TOUCHED,), jnp.int32)
    values = jax.ShapeDtypeStruct((TOUCHED, TABLE[1]), jnp.float32)
    return run, (table, jax.eval_shape(tx.init, table), ids, values)


def least(params, state, grads):
    """Bytes that a step moves at least."""
    kept, read = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(x)) for x in ((params, state), grads)
    )
    return 2 * kept + read


def compiled_step(chip, name):
    """A row: what one device does in one step."""
    run, arguments = step_on_rows() if name == "rows.exact" else step(*STEPS[name])
    elements = TOUCHED * TABLE[1] if name == "rows.exact" else arguments[0].size
    placed = _aot.placed(arguments, _aot.devices(chip))
    row = {"chip": chip, "step": name, "elements": elements}
    try:
        counts = _aot.counts(_aot.compiled(run, *placed, donate_argnums=(0, 1)))
    except jax.errors.JaxRuntimeError as error:
        return row | {"error": str(error).splitlines()[0]}
    at_least = None if name == "rows.exact" else least(*arguments[:3])
    return row | {"least": at_least} | counts


def _zero1(mesh):
    """A training step whose state is split over devices that each have a part of the batch."""
    replicated, over = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    tx, size = rmsprop_jax.rmsprop(1e-3, momentum=0.9), SHAPE[0]
    params = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=replicated)
    shardings = state_sharding(tx, params, mesh, "data")
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        shardings,
    )

    def run(params, state, batch):
        grads = jax.grad(lambda params: jnp.mean((batch @ params - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    batch = jax.ShapeDtypeStruct((1024, size), jnp.float32, sharding=over)
    return partial(_aot.compiled, run, params, state, batch, out_shardings=(replicated, shardings))


def _sharded(mesh, accumulator, in_shard_map=False):
    """Update and apply of a matrix whose rows are split over devices."""
    tx, spec = rmsprop_jax.rmsprop(1e-3, accumulator=accumulator), PartitionSpec("data")
    params = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    state = jax.eval_shape(tx.init, params)
    specs = jax.tree.map(lambda x: spec if x.ndim and x.shape[0] == SHAPE[0] else PartitionSpec(), state)

    def run(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if in_shard_map:
        run = jax.shard_map(run, mesh=mesh, in_specs=(spec, specs, spec), out_specs=(spec, specs))
    state = jax.tree.map(lambda x, s: _aot.placed(x, mesh, *s), state, specs)
    params = _aot.placed(params, mesh, *spec)
    return partial(_aot.compiled, run, params, state, params)


MESHES = {
    "data parallel, ZeRO stage 1": _zero1,
    "sharded matrix": partial(_sharded, accumulator="float32"),
    "sharded matrix, uint8": partial(_sharded, accumulator="uint8"),
    "sharded matrix, factored": partial(_sharded, accumulator="factored"),
    "in shard_map, uint8": partial(_sharded, accumulator="uint8", in_shard_map=True),
}


def compiled_on_mesh(chip, name):
    """A row: what each of eight devices puts into collectives."""
    done = MESHES[name](_aot.devices(chip, 8))(donate_argnums=(0, 1))
    return {"chip": chip, "step": name, "collectives": _aot.counts(done)["collectives"]}


def table(data):
    """What runs on one device: bytes and temporaries for each parameter, and kernels."""
    chips = list(dict.fromkeys(row["chip"] for row in data["rows"]))
    cells = {}
    for row in data["rows"]:
        cells.setdefault(row["step"], {})[row["chip"]] = _cell(row)
        if row.get("least"):
            cells[row["step"]]["least"] = f"{row['least'] / row['elements']:.2f}"
    columns = ["least", *chips]
    rows = [(name, *(found.get(column, "-") for column in columns)) for name, found in cells.items()]
    return markdown(["step", *columns], rows)


def _cell(row):
    if "error" in row:
        return "not read"
    moved, temporary = (row[what] / row["elements"] for what in ("bytes", "temporary"))
    copies = f", {row['copies']} copies" if row["copies"] else ""
    return f"{moved:.2f} / {temporary:.2f} / {row['kernels']}{copies}"


def bounds(data):
    """Milliseconds that it takes at least to move the bytes of a step of 10^9 parameters."""
    chips = [chip for chip in _aot.CHIPS if any(row["chip"] == chip for row in data["rows"])]
    cells = {}
    for row in data["rows"]:
        if row["chip"] in chips and row.get("least"):
            bound = 1e12 * row["bytes"] / row["elements"] / _aot.CHIPS[row["chip"]].bandwidth
            cells.setdefault(row["step"], {})[row["chip"]] = f"{bound:.1f}"
    rows = [(name, *(found.get(chip, "-") for chip in chips)) for name, found in cells.items()]
    return markdown(["step", *chips], rows)


def collectives(data):
    """What each of eight devices puts in, in MB."""
    rows = []
    for row in data["on eight devices"]:
        found = [
            f"{len(put_in)} {kind} ({sum(put_in) / 1e6:.2f} MB)"
            for kind, put_in in row["collectives"].items()
        ]
        rows.append((row["step"], row["chip"], ", ".join(found) or "none"))
    return markdown(["step", "chip", "collectives"], rows)


def main(argv=None):
    made = parser("accelerators", __doc__, short="this machine's CPU, H100 and v5e; nothing kept")
    options = made.parse_args(argv)
    if not _aot.installed():
        sys.exit("The compilers for GPUs and TPUs are not installed: `make accelerators`.")
    chips = ("cpu", "H100", "v5e") if options.short else tuple(_aot.CHIPS)
    rows = (compiled_step(chip, name) for name in [*STEPS, "rows.exact"] for chip in chips)
    heading = "bytes / temporary bytes for each parameter / kernels; least: bytes that must move"
    rows = printed(heading, rows, lambda row: f"{row['step']:26} {row['chip']:5} {_cell(row)}")
    meshes = (compiled_on_mesh(chip, name) for name in MESHES for chip in chips if chip != "cpu")
    on_eight = list(meshes)
    print(collectives({"on eight devices": on_eight}))
    if not options.short:
        where = environment("jax-cuda12-plugin", "libtpu") | {"device": "Compiled, not run"}
        print(save("accelerators", {"environment": where, "rows": rows, "on eight devices": on_eight}))
