"""What does it cost to keep the accumulator in fewer bytes? Time and memory of a step beside float32's.

Update and apply, jitted and donated, on the transformer tree of `benchmarks/step.py`. "8 bytes" has bfloat16
parameters and gradients, a one-byte accumulator, and parameters that are rounded without bias; "6 bytes" the
same with a factored one. Beside them, whom one would leave for memory's sake or go to: Optax's Adam,
Adafactor, and its factored second moments alone (`optax.scale_by_factored_rms`). PyTorch's RMSprop and
bitsandbytes' in 8 bits, on the same tree, are measured on a CPU where they are installed.
"""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from benchmarks._frame import accumulators, markdown, printed, spread
from benchmarks._run import Run, parser
from benchmarks._steps import Step, gradients, on_accelerator, size, wider
from benchmarks.bandwidth import gigabytes_per_second, streams
from benchmarks.side_by_side import alternate, milliseconds, ratio
from benchmarks.step import transformer


def factored_rms(rate):
    return optax.chain(optax.scale_by_factored_rms(), optax.scale_by_learning_rate(rate))


SETTINGS = {
    "optax, float32": (optax.rmsprop, {}, jnp.float32),
    **{name: (rmsprop_jax.rmsprop, {"accumulator": name}, jnp.float32) for name in accumulators()},
    "8 bytes": (rmsprop_jax.rmsprop, {"accumulator": "uint8"}, jnp.bfloat16),
    "6 bytes": (rmsprop_jax.rmsprop, {"accumulator": "factored"}, jnp.bfloat16),
    "optax, factored rms": (factored_rms, {}, jnp.float32),
    "optax, adafactor": (optax.adafactor, {}, jnp.float32),
    "optax, adam": (optax.adam, {}, jnp.float32),
}


class JaxStep(Step):
    """Only small parameters need its key."""

    def __init__(self, make, options, dtype, params):
        tx = make(1e-3, **options)

        def step(kept, grads):
            params, state, key = kept
            key, now = jax.random.split(key)
            updates, state = tx.update(grads, state, params)
            return (rmsprop_jax.apply_updates(params, updates, key=now), state, key), ()

        params = jax.tree.map(lambda p: p.astype(dtype) + 0, params)
        super().__init__(step, (params, tx.init(params), jax.random.key(0)), gradients(params))

    def figures(self):
        """Bytes, of the arrays as they are: state kept and, for each step, read and written once."""
        params, state, _ = self.kept
        kept, params_bytes, grads = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (state, params, self.inputs)
        )
        return {
            "parameters": size(params),
            "state_bytes_per_parameter": kept / size(params),
            "moved_bytes_per_parameter": (2 * (kept + params_bytes) + grads) / size(params),
            "temporary_bytes": self.temporary_bytes,
            "operations": self.operations,
        }


class TorchStep:
    """A step of a PyTorch optimizer on CPU, all leaves in one call, and its state."""

    def __init__(self, make, params):
        import numpy as np
        import torch

        tensors = [torch.nn.Parameter(torch.from_numpy(np.array(leaf))) for leaf in jax.tree.leaves(params)]
        for tensor in tensors:
            tensor.grad = 0.3 * tensor.detach()
        self.size = sum(tensor.numel() for tensor in tensors)
        self.optimizer = make(tensors)

    def __call__(self):
        return self.optimizer.step()

    def figures(self):
        tensors = [
            x for entry in self.optimizer.state.values() for x in entry.values() if hasattr(x, "nbytes")
        ]
        return {
            "parameters": self.size,
            "state_bytes_per_parameter": sum(x.nbytes for x in tensors) / self.size,
        }


def torch_steps(params):
    """PyTorch's RMSprop and bitsandbytes' in 8 bits, where they are installed, with their packages' names."""
    steps = {}
    if importlib.util.find_spec("torch"):
        import torch

        make = partial(torch.optim.RMSprop, lr=1e-3, alpha=0.9, foreach=True)
        steps["torch", "torch, float32"] = TorchStep(make, params)
        if importlib.util.find_spec("bitsandbytes"):
            import bitsandbytes

            make = partial(bitsandbytes.optim.RMSprop8bit, lr=1e-3, alpha=0.9)
            steps["bitsandbytes", "bitsandbytes, 8 bits"] = TorchStep(make, params)
    return steps


def table(data):
    columns = ["accumulator", "state, bytes per parameter", "moved per step", "milliseconds", "of optax"]
    counted, rows = "gigabytes_per_second" in data, []
    for name, row in data["rows"].items():
        moved, temporary = row.get("moved_bytes_per_parameter"), row.get("temporary_bytes")
        rows.append(
            (
                name,
                f"{row['state_bytes_per_parameter']:.2f}",
                "" if moved is None else f"{moved:.0f}",
                f"{row['milliseconds']:.{1 if row['milliseconds'] >= 10 else 2}f}",
                f"{row['ratio']['median']:.2f}",
                "" if temporary is None else f"{temporary / 1e6:.1f} MB",
            )
            + ((f"{row['of_the_copy']:.2f}" if "of_the_copy" in row else "",) if counted else ())
        )
    columns += ["temporary", *(["of a copy's bandwidth"] if counted else [])]
    return markdown(columns, rows)


def line(named):
    name, row = named
    kept, moved = (row.get(f"{what}_bytes_per_parameter", float("nan")) for what in ("state", "moved"))
    return (
        f"{name:20} {kept:6.2f} {moved:6.2f}   {row['milliseconds']:7.2f}   {spread(row['ratio'])}   "
        f"{row.get('temporary_bytes', 0) / 1e6:6.1f} MB"
    )


def compare(rounds, params, peers):
    """All settings at once, since they take turns: name and row of each, and the memory's bandwidth."""
    sides = {name: JaxStep(*setting, params) for name, setting in SETTINGS.items()} | peers
    stream, queued = streams(size(params)), on_accelerator()
    seconds = alternate(sides | stream, rounds, 10 if queued else 1, queued)
    bandwidth = gigabytes_per_second(stream, seconds)
    rows = {}
    for name, side in sides.items():
        figures, ms = side.figures(), milliseconds(seconds[name])
        rows[name] = {**figures, "milliseconds": ms, "ratio": ratio(seconds[name], seconds["optax, float32"])}
        if "moved_bytes_per_parameter" in figures:
            moved = figures["moved_bytes_per_parameter"] * figures["parameters"]
            rows[name]["of_the_copy"] = moved / (ms * 1e6) / bandwidth["copy"]
    return {"settings": rows, "gigabytes_per_second": bandwidth}


def main(argv=None):
    made = parser("memory", __doc__, short="a small tree, a few rounds, nothing kept")
    made.add_argument("--no-peers", action="store_true", help="without PyTorch and bitsandbytes")
    options = made.parse_args(argv)
    rounds = 3 if options.short else 20 if on_accelerator() else 40
    params = transformer(1 / 8 if options.short else wider())
    peers = {} if options.no_peers or on_accelerator() else torch_steps(params)
    run = Run("memory", options, *(package for package, _ in peers))
    peers = {name: side for (_, name), side in peers.items()}
    for measured in run.measured({"all settings": partial(compare, rounds, params, peers)}):
        rows = measured.pop("settings")
        run.data |= {"rounds": rounds, **measured, "rows": rows}
        heading = f"{'':20} {'state':>6} {'moved':>6}   {'ms':>7}   of optax (quartiles)   temporary"
        printed(heading, rows.items(), line)
    run.end()
