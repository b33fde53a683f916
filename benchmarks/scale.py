"""How do a step's time and state grow with parameters, leaves and devices?

Update and apply, jitted and donated.

Parameters: one leaf of 1e4 to 1e8 (1e9 on a GPU), and its bytes per second beside the bandwidth measured in
the same run (`bandwidth.py`). Leaves: a million parameters in 1 to 2,000, and the kernels in the compiled
program. Devices: 4 million parameters and their accumulators in shards, on 1 to 8 devices. On a CPU these are
simulated and share its cores: what a device keeps falls, the time does not.

On a GPU, `python -m benchmarks scale` measures it and keeps it as scale_gpu.json.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rmsprop_jax
from benchmarks._frame import accumulators, markdown
from benchmarks._run import Run, parser
from benchmarks._steps import PACKAGES, both, kernels, on_accelerator, size, update_step
from benchmarks.bandwidth import gigabytes_per_second, streams
from benchmarks.side_by_side import alternate, milliseconds, pooled, ratio


def state_bytes(params, accumulator="float32"):
    state = jax.eval_shape(rmsprop_jax.rmsprop(1e-3, accumulator=accumulator).init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def measure(params, rounds):
    """One point: times, kernels, bytes of state."""
    sides, total, queued = both(params), size(params), on_accelerator()
    repeat = 20 if queued else max(1, min(20, int(2e6 / total)))
    seconds = pooled(alternate(sides, rounds, repeat, queued))
    return {
        "parameters": total,
        "leaves": len(jax.tree.leaves(params)),
        "milliseconds": {name: milliseconds(times) for name, times in seconds.items()},
        "ratio": ratio(seconds["ours"], seconds["optax"]),
        "kernels": {name: kernels(sides[name].operations) for name in PACKAGES},
        "gigabytes_per_second": 20 * total / (milliseconds(seconds["ours"]) * 1e6),
        "state_bytes": {accumulator: state_bytes(params, accumulator) for accumulator in accumulators()},
    }


def over_parameters(sizes, rounds):
    return {f"{n:,} parameters": lambda n=n: measure({"w": jnp.full(n, 0.1)}, rounds) for n in sizes}


def over_leaves(size, counts, rounds):
    return {f"{n:,} leaves": lambda n=n: measure([jnp.full(size // n, 0.1)] * n, rounds) for n in counts}


def over_devices(total, rounds, simulated=None):
    """The points of 1, 2, 4, ... devices; `simulated` of them in a process that has no others."""
    if simulated is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated)
    devices, points = jax.devices(), []
    for count in (2**i for i in range(4) if 2**i <= len(devices)):
        mesh = Mesh(np.array(devices[:count]), ("shards",))
        sharding = NamedSharding(mesh, PartitionSpec("shards"))
        params = {"w": jax.device_put(jnp.full((total // 512, 512), 0.1), sharding)}
        tx = rmsprop_jax.rmsprop(1e-3)
        rms, *others = tx.init(params)
        state = rms._replace(nu=jax.device_put(rms.nu, sharding)), *others
        side = update_step(tx, params, state)
        seconds = alternate({"ours": side}, rounds, 20 if on_accelerator() else 1, on_accelerator())
        kept = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(side.kept[1]))
        points.append(
            {
                "devices": count,
                "parameters": total,
                "milliseconds": milliseconds(seconds["ours"]),
                "state_bytes_on_each": kept,
            }
        )
    return points


def table(data):
    """Three: over parameters, leaves and devices."""
    best = max(data["gigabytes_per_second"].values())
    over_parameters, over_leaves, over_devices = [], [], []
    for p in data["parameters"]:
        ms, rate, kept = p["milliseconds"], p["gigabytes_per_second"], p["state_bytes"].values()
        rates = f"{ms['optax']:.3f} ms", f"{ms['ours']:.3f} ms", f"{rate:.1f}", f"{rate / best:.2f}"
        megabytes = ", ".join(f"{x / 1e6:.2f}" for x in kept) + " MB"
        over_parameters.append((f"{p['parameters']:,}", *rates, megabytes))
    for p in data["leaves"]:
        ms, kernels = p["milliseconds"], p["kernels"]
        times = f"{ms['optax']:.3f} ms", f"{ms['ours']:.3f} ms"
        over_leaves.append((f"{p['leaves']:,}", *times, f"{kernels['optax']:,}, {kernels['ours']:,}"))
    for p in data["devices"]:
        megabytes = p["state_bytes_on_each"] / 1e6
        over_devices.append((f"{p['devices']}", f"{p['milliseconds']:.2f} ms", f"{megabytes:.2f} MB"))
    sides = ["`optax.rmsprop`", "`rmsprop`"]
    states = f"state: {', '.join(data['parameters'][0]['state_bytes'])}"
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in data["gigabytes_per_second"].items())
    return "\n\n".join(
        [
            markdown(["parameters, one leaf", *sides, "GB/s", "of the bandwidth", states], over_parameters),
            markdown(["leaves, a million parameters", *sides, "kernels"], over_leaves),
            markdown(["devices", "`rmsprop`", "state on each device"], over_devices),
            f"Bandwidth, GB/s: {rates}.",
        ]
    )


def draw(data):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    best = max(data["gigabytes_per_second"].values())
    for axes, points, key in ((left, data["parameters"], "parameters"), (middle, data["leaves"], "leaves")):
        x = [p[key] for p in points]
        for name, style in (
            ("optax", {"lw": 5, "alpha": 0.5, "color": "tab:orange"}),
            ("ours", {"lw": 1.7, "marker": "o", "ms": 4, "color": "tab:blue"}),
        ):
            label = "optax.rmsprop" if name == "optax" else "rmsprop"
            axes.loglog(x, [p["milliseconds"][name] for p in points], label=label, **style)
    x = [p["parameters"] for p in data["parameters"]]
    left.loglog(x, [20 * n / best / 1e6 for n in x], "k--", lw=1, label="20 bytes at the bandwidth")
    left.set(xlabel="parameters, one leaf", ylabel="milliseconds per step", title="Parameters")
    middle.set(xlabel="leaves", title="Leaves of a million parameters")
    left.legend(frameon=False)
    devices = [str(p["devices"]) for p in data["devices"]]
    right.bar(devices, [p["state_bytes_on_each"] / 1e6 for p in data["devices"]], color="tab:blue", alpha=0.7)
    for i, p in enumerate(data["devices"]):
        text = f"{p['milliseconds']:.1f} ms"
        right.annotate(
            text, (i, p["state_bytes_on_each"] / 1e6), (0, 3), textcoords="offset points", ha="center"
        )
    right.set(xlabel="devices", ylabel="MB of state on each", title="Devices, 4 million parameters in shards")
    right.margins(y=0.1)
    return figure


def bandwidth(size, rounds):
    sides, queued = streams(size), on_accelerator()
    return gigabytes_per_second(sides, alternate(sides, rounds, 20 if queued else 1, queued))


def main(argv=None):
    options = parser("scale", __doc__, short="small sizes, a few rounds, nothing kept").parse_args(argv)
    short, cpu = options.short, not on_accelerator()
    rounds = 3 if short else 20
    sizes = [10**n for n in range(4, 6 if short else 9 if cpu else 10)]
    counts = (1, 10) if short else (1, 10, 100, 1000, 2000)
    total = 2**16 if short else 2**22
    run = Run("scale", options)
    run.data |= {"rounds": rounds, "devices": []}
    run.data["gigabytes_per_second"] = bandwidth(sizes[-1] if short else 2**25 if cpu else 2**28, rounds)
    if cpu:  # devices are simulated, and their number is fixed before the first of them is used
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            run.data["devices"] = process.submit(over_devices, total, rounds, simulated=8).result()
    else:
        run.data["devices"] = over_devices(total, rounds)
    for key, cases in (
        ("parameters", over_parameters(sizes, rounds)),
        ("leaves", over_leaves(10**5 if short else 10**6, counts, rounds)),
    ):
        for point in run.measured(cases, key):
            print(f"{key}: {point[key]:,}, {point['milliseconds']['ours']:.3f} ms", flush=True)
    print(table(run.data))
    run.end(draw)
