"""How do I train on several devices and machines, and lose nothing when one of them dies?

Each device works on its part of the batch and keeps its part of the optimizer's state (ZeRO stage 1):
`sharding.state_sharding` says which, and `jax.jit` makes the rest of it. Copy _processes.py with this file.

    python multi_process.py                 two processes here, with four simulated devices each
    python multi_process.py --resume        after Ctrl-C, a crash or `kill -9`: goes on, exactly
    python multi_process.py --processes 1 --resume              ... on other devices

**On a cluster** the launcher starts the processes, with what real devices they have. JAX finds it by itself,
in `jax.distributed.initialize()`; --processes and --devices are left out, and --out is a folder that all
processes see.

- Slurm: `srun --ntasks-per-node=8 --gpus-per-node=8 python multi_process.py --out /shared/run`, one process
  for each GPU, in a job or an allocation. `mpirun` of Open MPI likewise.
- Cloud TPU: the same command on all hosts of the pod at once, such as `gcloud compute tpus tpu-vm ssh NAME
  --worker=all --command="..."`; GKE tells its TPU jobs all that JAX asks for.
- Kubernetes: an indexed Job (`completionMode: Indexed`, `parallelism` the number of processes) or a JobSet,
  with a headless service as its pods' `subdomain`, a service account that may read pods, jobs and services,
  and `pip install 'jax[k8s]'` in the image.

**What survives.** Every --every steps all processes save their shards, with the losses so far. A run that is
killed at any moment, one process or all, goes on from the last complete checkpoint and ends with the same
bits, as batches are a function of the step and nothing else. On another number of devices or processes it
starts from the same bits and goes on with rounding errors of its own, about 1e-7 of a gradient in each step,
since the sum over the batch is then taken in another order. A checkpoint with a file that is missing, cut
short or changed is refused, and the one before it taken. SIGTERM, a scheduler's notice, saves at a step that
the processes agree on.
"""

import argparse
import hashlib
import os
import shutil
import sys
import traceback
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from _processes import REFUSED, STOPPED, join, joined_by_launcher, launch
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

from rmsprop_jax import rmsprop, warmup
from rmsprop_jax.sharding import state_sharding

CONTEXT, WIDTH, HIDDEN, BATCH, LEARNING_RATE, DECAY = 16, 32, 512, 64, 2e-3, 0.95


def new_params(size):
    """A network that guesses the next of `size` characters from the CONTEXT before it."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (size, WIDTH), "hidden": (CONTEXT * WIDTH, HIDDEN), "out": (HIDDEN, size)}
    return {name: jax.random.normal(key, shapes[name]) / 20 for name, key in zip(shapes, keys, strict=True)}


def loss_fn(params, windows):  # int [batch, CONTEXT + 1]
    x = params["embed"][windows[:, :-1]].reshape(len(windows), -1)
    logits = jax.nn.relu(x @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]).mean()


def training(mesh, size, steps):
    """What the devices do: (init, train_step), and how (parameters, state) lie on them."""
    schedule = warmup(optax.cosine_decay_schedule(LEARNING_RATE, steps), DECAY)
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(schedule, DECAY))
    everywhere, in_parts = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    shapes = jax.eval_shape(partial(new_params, size))
    layout = jax.tree.map(lambda _: everywhere, shapes), state_sharding(tx, shapes, mesh, "data")

    def init():
        params = new_params(size)
        return params, tx.init(params)

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, everywhere))
    def train_step(state, text, step):
        params, opt_state = state
        first = jax.random.randint(jax.random.key(step), (BATCH, 1), 0, len(text) - CONTEXT)
        windows = jax.lax.with_sharding_constraint(text[first + jnp.arange(CONTEXT + 1)], in_parts)
        loss, grads = jax.value_and_grad(loss_fn)(params, windows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return init, train_step, layout


def train(args):
    """The same in every process."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    if BATCH % mesh.size:
        give_up(f"A batch of {BATCH} cannot be shared out evenly among {mesh.size} devices.")
    text = "".join(topics[name] for name in sorted(topics))
    alphabet, text = np.unique(np.array([*text]), return_inverse=True)
    text, unseen = np.split(text.astype(np.int32), [len(text) * 9 // 10])
    unseen = unseen[np.arange(CONTEXT, len(unseen), 16)[:, None] + np.arange(-CONTEXT, 1)]
    unseen = unseen[: len(unseen) // mesh.size * mesh.size]
    init, train_step, layout = training(mesh, len(alphabet), args.steps)
    validation_loss = jax.jit(loss_fn)
    text = jax.device_put(text, NamedSharding(mesh, PartitionSpec()))
    unseen = jax.device_put(unseen, NamedSharding(mesh, PartitionSpec("data")))

    state, history = begin(args, init, layout)
    first, start = jax.process_index() == 0, len(history["train"])  # the first process talks
    with (
        manager(args.out) as checkpoints,
        tqdm(total=args.steps, initial=start, unit="step", dynamic_ncols=True, disable=not first) as bar,
    ):
        for step in range(start, args.steps):
            state, loss = train_step(state, text, step)
            history["train"].append(loss.item())
            done = step + 1
            stop = multihost_utils.reached_preemption_sync_point(done)  # the same in every process
            if done % args.every == 0 or done == args.steps:
                history["valid"].append([done, validation_loss(state[0], unseen).item()])
            if done % args.every == 0 or done == args.steps or stop:
                save(checkpoints, done, state, history)
            valid = f"{history['valid'][-1][1]:.3f}" if history["valid"] else "-"
            bar.set_postfix(loss=f"{history['train'][-1]:.3f}", valid=valid, refresh=False)
            bar.update()
            if stop and done < args.steps:
                bar.close()
                if first:
                    print(f"Stopped after step {done:,}, and saved: the same command with --resume goes on.")
                sys.exit(STOPPED)
    report(args, state, history)


# Checkpoints --------------------------------------------------------------------------------------------


def manager(folder):
    """Orbax writes a checkpoint under another name and renames it when all processes have written theirs."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def save(checkpoints, step, state, about):
    """`state`, `about` and a checksum: Orbax does not notice a bit that changes on the disk."""
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
    checkpoints.save(step, args=args, force=True)
    if jax.process_index() == 0:
        path = Path(checkpoints.directory) / str(step)  # a plain one
        (path / "unfinished").write_text(checksum(path))
        (path / "unfinished").rename(path / "sha256")


def checksum(folder):
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "sha256"):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def restore(folder, like):
    """State and `about` of the newest checkpoint that is as it was saved; None where there is none.

    `like` is a tree of `jax.ShapeDtypeStruct` with the shardings to restore to, on whatever mesh.
    """
    step, paths = 0, (path for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
    if jax.process_index() == 0:
        for path in sorted(paths, key=lambda path: int(path.name), reverse=True):
            if (path / "sha256").is_file() and (path / "sha256").read_text() == checksum(path):
                step = int(path.name)
                break
            print(f"Checkpoint {path} is refused: it is incomplete, or has changed.", file=sys.stderr)
            shutil.rmtree(path.with_suffix(".refused"), ignore_errors=True)
            path.rename(path.with_suffix(".refused"))  # for you to look at
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == 0:
        return None
    with manager(folder) as checkpoints:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), about=ocp.args.JsonRestore())
        restored = checkpoints.restore(step, args=args)
    return restored.state, restored.about


def begin(args, init, layout):
    """State and history to start with: new ones, or the last checkpoint's."""
    first, directory = jax.process_index() == 0, args.out / "checkpoints"
    if not args.resume:
        if first:
            shutil.rmtree(directory, ignore_errors=True)
        multihost_utils.sync_global_devices("the old checkpoints are gone")
        history = {"steps": args.steps, "every": args.every, "train": [], "valid": []}
        return jax.jit(init, out_shardings=layout)(), history
    like = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), jax.eval_shape(init), layout
    )
    restored = restore(args.out, like)
    if restored is None:
        give_up(
            f"--resume: no checkpoint in {directory} can be used. Start without --resume, or check --out."
        )
    for name in ("steps", "every"):
        if restored[1][name] != getattr(args, name):
            give_up(f"--resume: the checkpoint's run has --{name} {restored[1][name]}.")
    if first:
        print(f"Continuing after step {len(restored[1]['train']):,}.", flush=True)
    return restored


def give_up(message):
    """Called by all processes; one of them says why."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr)
    sys.exit(REFUSED)


# What it has come to ------------------------------------------------------------------------------------


def report(args, state, history):
    params, opt_state = state
    leaves = [(x, shard) for x in jax.tree.leaves(opt_state) for shard in x.addressable_shards]
    held = [sum(s.data.nbytes for _, s in leaves if s.device == device) for device in jax.local_devices()]
    held = multihost_utils.process_allgather(np.array(held, np.uint32)).reshape(jax.process_count(), -1)
    if jax.process_index() > 0:
        return
    total = sum(x.nbytes for x in jax.tree.leaves(opt_state))
    print(f"\nCross-entropy of unseen text: {history['valid'][-1][1]:.3f} nats per character.")
    print(f"The optimizer's state has {total:,} bytes. Of these, on the devices of")
    for index, row in enumerate(held):
        print(f"    process {index}: {', '.join(f'{x:,}' for x in row)}")
    bits = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))).hexdigest()[:8]
    print(f"The parameters, in short: {bits}. A run that was stopped or killed ends with the same.")
    draw(args.out / "multi_process.png", history, total, held)
    print(f"The picture is {args.out / 'multi_process.png'}")


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, history, total, held):
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot(np.arange(1, len(history["train"]) + 1), history["train"], lw=0.7, label="training")
    label = f"unseen text, at last {history['valid'][-1][1]:.3f}"
    left.plot(*zip(*history["valid"], strict=True), marker=".", label=label)
    left.set(xlabel="step", ylabel="cross-entropy (nats per character)", title="Loss")
    left.legend()
    for index, row in enumerate(held):
        devices = [str(device) for device in range(index * len(row), (index + 1) * len(row))]
        right.bar(devices, row / 1024, label=f"process {index}")
    right.axhline(total / 1024, color="0.4", ls="--", lw=1, label="all of it")
    right.set(xlabel="device", ylabel="KiB", title="The optimizer's state, on each device")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=130)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--processes", type=int, help="on this machine; by default as the launcher says, or 2"
    )
    parser.add_argument(
        "--devices", type=int, default=4, help="simulated ones, in each process on this machine"
    )
    parser.add_argument("--steps", type=int, default=600, help="updates")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/multi_process"), help="folder")
    parser.add_argument("--join", nargs=4, help=argparse.SUPPRESS)  # for the processes started here
    args = parser.parse_args(argv)
    if args.join:
        join(*args.join, args.devices)
    elif args.processes or not joined_by_launcher():
        sys.exit(launch(__file__, argv, args.processes or 2))
    try:
        train(args)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # an ordinary exit waits for the other processes, which wait for this one
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
