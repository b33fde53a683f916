"""How do I train on several devices and machines, and lose nothing when one of them dies?

The network and the text of char_rnn.py, on every device that there is. Each works on its part of the batch
and keeps its part of the optimizer's state (ZeRO stage 1); gradients are averaged, new parameters gathered.

    python examples/multi_process.py                 two processes here, with four simulated devices each
    python examples/multi_process.py --resume        after Ctrl-C, a crash or `kill -9`: goes on, exactly
    python examples/multi_process.py --processes 1 --resume              ... on other devices

**On a cluster** the launcher starts the processes, with what real devices they have. JAX finds it by itself,
in `jax.distributed.initialize()`; --processes and --devices are left out, and --out is a folder that all
processes see.

- Slurm: `srun --ntasks-per-node=8 --gpus-per-node=8 python examples/multi_process.py --out /shared/run`, one
  process for each GPU, in a job or an allocation. `mpirun` of Open MPI likewise.
- Cloud TPU: the same command on all hosts of the pod at once, such as `gcloud compute tpus tpu-vm ssh NAME
  --worker=all --command="..."`; GKE tells its TPU jobs all that JAX asks for.
- Kubernetes: an indexed Job (`completionMode: Indexed`, `parallelism` the number of processes) or a JobSet,
  with a headless service as its pods' `subdomain`, a service account that may read pods, jobs and services,
  and `pip install 'jax[k8s]'` in the image.

**What survives.** Every --every steps all processes write their shards in the background, with the losses so
far (_sharded_checkpoints.py). A run that is killed at any moment, one process or all, goes on from the last
complete checkpoint and ends with the same bits, as batches are a function of (seed, step) and nothing else.
On another number of devices or processes it starts from the same bits and goes on with rounding errors of
its own, about 1e-7 of a gradient in each step, since the sum over the batch is then taken in another order.
A checkpoint with a file that is missing, cut short or changed is refused by name, and the one before it
taken. SIGTERM, a scheduler's notice, saves at a step that the processes agree on.
"""

import argparse
import math
import os
import shutil
import sys
import time
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _checkpoints import misfit, settings_of
from _options import at_least, decay, parser_for_text
from _pictures import draw_references, save_figure
from _processes import SAID_WHY, STOPPED, free_address, join, joined_by_launcher, run_together
from _sharded_checkpoints import fingerprints, open_manager, restore, save
from _text import read_text
from char_rnn import CharRNN, cross_entropy, in_rows
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

from rmsprop_jax import rmsprop, warmup
from rmsprop_jax.sharding import state_sharding

# The training, the same in every process ----------------------------------------------------------------


def train(args):
    text = read_text(args.text, args.window)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    if args.batch % mesh.size:
        give_up(f"--batch {args.batch} cannot be shared out evenly among {mesh.size} devices.")
    valid_rows = in_rows(text.valid, most=max(64, mesh.size))
    valid_rows = valid_rows[: len(valid_rows) // mesh.size * mesh.size]
    everywhere = NamedSharding(mesh, PartitionSpec())

    schedule = warmup(optax.cosine_decay_schedule(args.learning_rate, args.steps), args.decay)
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(schedule, args.decay))
    make_model = partial(CharRNN, len(text.alphabet), args.width)
    graph, shapes, rest = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))), nnx.Param, ...)

    def init():
        params = nnx.state(make_model(nnx.Rngs(args.seed)), nnx.Param)
        return params, tx.init(params)

    layout = jax.tree.map(lambda _: everywhere, shapes), state_sharding(tx, shapes, mesh, "data")

    # Averaged over the devices once, at the end. From jax.jit alone XLA makes a program that adds up the
    # devices' gradients at every character of the window: on CPUs 15 times as slow.
    over_devices = partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def loss_of(params, tokens):
        return cross_entropy(nnx.merge(graph, params, rest), tokens)

    @over_devices
    def loss_and_gradients(params, tokens):
        return jax.lax.pmean(jax.value_and_grad(loss_of)(params, tokens), "data")

    @jax.jit
    @over_devices
    def validation_loss(params, tokens):
        return jax.lax.pmean(loss_of(params, tokens), "data")

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, everywhere))
    def train_step(state, text, key, step):
        params, opt_state = state
        starts = jax.random.randint(
            jax.random.fold_in(key, step), (args.batch, 1), 0, len(text) - args.window
        )
        loss, gradients = loss_and_gradients(params, text[starts + jnp.arange(args.window + 1)])
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    settings = settings_of(args, text)
    directory = (args.out / "checkpoints").absolute()
    state, start, history = begin(directory, args.resume, init, layout, settings)
    manager = open_manager(directory)
    train_text, valid_rows = (jax.device_put(x, everywhere) for x in (text.train, valid_rows))
    key = jax.random.key(args.seed)

    first = jax.process_index() == 0  # the one that talks
    before, begun = history["seconds"], time.perf_counter()
    with tqdm(
        total=args.steps, initial=start, unit="step", smoothing=0.05, dynamic_ncols=True, disable=not first
    ) as bar:
        for step in range(start, args.steps):
            state, loss = train_step(state, train_text, key, step)
            history["train"].append(loss.item())
            if not math.isfinite(history["train"][-1]):
                give_up(f"The loss is {loss} at step {step + 1}. Lower --learning-rate.")
            done = step + 1
            stop = multihost_utils.reached_preemption_sync_point(done)  # the same in every process
            last = done == args.steps
            if done % args.every == 0 or last:
                history["valid"].append([done, validation_loss(state[0], valid_rows).item()])
            history["seconds"] = before + time.perf_counter() - begun
            if done % args.every == 0 or last or stop:
                save(manager, done, state, {"settings": settings, "history": history})
            valid = f"{history['valid'][-1][1]:.3f}" if history["valid"] else "-"
            bar.set_postfix(loss=f"{history['train'][-1]:.3f}", valid=valid, refresh=False)
            bar.update()
            if stop and not last:
                manager.close()
                bar.close()
                if first:
                    print(
                        f"Stopped after step {done:,}, and saved: the same command with --resume continues."
                    )
                sys.exit(STOPPED)
    manager.close()  # when the last checkpoint is complete

    held = bytes_held(state[1])
    bits = np.bitwise_xor.reduce(np.asarray(fingerprints(state)))
    if first:
        report(args, text, history, sum(x.nbytes for x in jax.tree.leaves(state[1])), held, bits)


def begin(directory, resume, init, layout, settings):
    """State, step and history to start with: new ones, or the last checkpoint's."""
    if not resume:
        if jax.process_index() == 0:
            shutil.rmtree(directory, ignore_errors=True)
        multihost_utils.sync_global_devices("the old checkpoints are gone")
        return jax.jit(init, out_shardings=layout)(), 0, {"train": [], "valid": [], "seconds": 0.0}

    def check(about):
        if message := misfit(about["settings"], settings):
            give_up(message)

    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init), layout
    )
    restored = restore(directory, shapes, check)
    if restored is None:
        give_up(
            f"--resume: no checkpoint in {directory} can be used. Start without --resume, or check --out."
        )
    step, state, about = restored
    if jax.process_index() == 0:
        print(f"Continuing after step {step:,}.", flush=True)
    return state, step, about["history"]


def give_up(message):
    """Called by all processes; one of them says why."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr)
    sys.exit(SAID_WHY)


# What it has come to ------------------------------------------------------------------------------------


def bytes_held(tree):
    """What each device of each process keeps of the tree: bytes, [processes, devices]."""
    held = [
        sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        for device in jax.local_devices()
    ]
    held = multihost_utils.process_allgather(np.array(held, np.uint32))
    return held.reshape(jax.process_count(), -1)


def report(args, text, history, total, held, bits):
    loss = history["valid"][-1][1]
    print("\nCross-entropy of the validation text, nats per character, lower is better:")
    for name, value in (("unigram", text.unigram), ("bigram", text.bigram), ("this network", loss)):
        print(f"    {name:13} {value:.3f}")
    print(f"\nThe optimizer's state has {total:,} bytes. Of these, on the devices of")
    for index, row in enumerate(held):
        print(f"    process {index}: {', '.join(f'{x:,}' for x in row)}")
    print(
        f"\nParameters and state, in short: {bits:08x}. A run that was stopped or killed ends with the same."
    )
    picture = args.out / "multi_process.png"
    draw(picture, text, history, total, held)
    print(f"{args.steps:,} steps in {history['seconds']:.0f} s; the picture is {picture}")


def draw(path, text, history, total, held):
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    steps, valid = zip(*history["valid"], strict=True)
    left.plot(np.arange(1, len(history["train"]) + 1), history["train"], lw=0.7, label="training")
    left.plot(steps, valid, marker=".", label=f"validation, at last {valid[-1]:.3f}")
    draw_references(left, text)
    left.set(xlabel="step", ylabel="cross-entropy (nats per character)", title="Loss")
    left.legend(frameon=False)
    for index, row in enumerate(held):
        devices = [str(device) for device in range(index * len(row), (index + 1) * len(row))]
        right.bar(devices, row / 1024, label=f"process {index}")
    right.axhline(total / 1024, color="0.4", ls="--", lw=1, label="all of it")
    right.set(xlabel="device", ylabel="KiB", title="The optimizer's state, on each device")
    figure.legend(*right.get_legend_handles_labels(), frameon=False, loc="outside right upper")
    save_figure(figure, path)


# The processes ------------------------------------------------------------------------------------------


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_for_text(__doc__, "multi_process", "folder for checkpoints and the picture", width=128)
    add = parser.add_argument
    add("--processes", type=at_least(1), help="on this machine; None: as the launcher says, or 2")
    add("--devices", type=at_least(1), default=4, help="simulated ones, in each process on this machine")
    add("--steps", type=at_least(1), default=600, help="updates")
    add("--every", type=at_least(1), default=50, help="steps between checkpoints")
    add("--decay", type=decay, default=0.95, help="of the accumulator, in [0, 1)")
    add("--batch", type=at_least(1), default=64, help="windows per update, on all devices together")
    add("--seed", type=int, default=0, help="of the parameters and the batches")
    add("--join", nargs=4, help=argparse.SUPPRESS)  # for the processes started here: see below
    args = parser.parse_args(argv)
    if args.join:
        join(*args.join, args.devices)
    elif args.processes or not joined_by_launcher():
        count = args.processes or 2
        command = [sys.executable, __file__, *argv, "--join", free_address(), str(count)]
        sys.exit(run_together([[*command, str(index), str(os.getpid())] for index in range(count)]))
    try:
        train(args)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # an ordinary exit waits for the other processes, which wait for this one
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
