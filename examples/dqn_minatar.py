"""Does a published agent train here as its paper says?

DQN on MinAtar (Young and Tian, 2019, arXiv 1903.03176): a small network, frames of 10 x 10, and PyTorch's
centred RMSProp with learning rate 2.5e-4, alpha 0.95 and eps 0.01, which is `conventions.torch` here.

    python examples/dqn_minatar.py                                breakout, 100,000 frames, two minutes
    python examples/dqn_minatar.py --frames 1000000 --seeds 3     about an hour; Ctrl-C loses nothing:
    python examples/dqn_minatar.py --frames 1000000 --seeds 3 --resume
    python examples/dqn_minatar.py --optimizer conventions.dqn    the same numbers, eps under the root

The picture sets the mean return of the last 100 episodes beside points of the paper's curve, the mean of 30
seeds after 5 million frames and on the way. Game, replay buffer and updates are one compiled scan, all seeds
at once; on two cores some 900 frames a second, on which the optimizer has an eighth. `_dqn.py` is the agent,
`python -m benchmarks minatar` the comparison in full.
"""

import json
import signal
import sys
import time
from functools import partial

import _dqn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _checkpoints import open_checkpoints, restore, save, signals_collected
from _options import at_least, parser_for
from _pictures import save_figure
from matplotlib.figure import Figure
from tqdm import tqdm

from rmsprop_jax import conventions

# Frames and mean return, read off the published figure by eye; the last is after 5 million frames.
PUBLISHED = {
    "asterix": [(1_500_000, 13.0), (2_000_000, 14.0), (5_000_000, 16.5)],
    "breakout": [(500_000, 8.3), (1_000_000, 9.2), (5_000_000, 10.0)],
    "freeway": [(1_000_000, 48.0), (1_700_000, 50.0), (5_000_000, 50.0)],
    "seaquest": [(5_000_000, 20.0)],
    "space_invaders": [(5_000_000, 44.0)],
}
OPTIMIZERS = {
    "conventions.torch": partial(conventions.torch, 2.5e-4, alpha=0.95, eps=0.01, centered=True),
    "conventions.dqn": conventions.dqn,
    "optax.rmsprop": partial(optax.rmsprop, 2.5e-4, decay=0.95, eps=0.01, centered=True),
    "uncentred": partial(conventions.torch, 2.5e-4, alpha=0.95, eps=0.01),
    "adam": partial(optax.adam, 1e-3),
}


def last_100(episodes, frames):
    """The mean return of the last 100 episodes that had ended by each of `frames`, NaN before the first."""
    ends, scores = np.array(episodes, float).reshape(-1, 2).T
    total = np.concatenate([[0], np.cumsum(scores)])
    upto = np.searchsorted(ends, frames, side="right")
    since = np.maximum(upto - 100, 0)
    return (total[upto] - total[since]) / np.where(upto > since, upto - since, np.nan)


def train(args):
    """Plays and learns; returns each seed's episodes, as pairs of the frame of its end and its return."""
    dqn = _dqn.DQN(args.game, OPTIMIZERS[args.optimizer]())
    settings = {"game": args.game, "optimizer": args.optimizer, "seeds": args.seeds}
    manager, done = open_checkpoints(args.out / "checkpoints", args.resume)
    agents = jax.jit(jax.vmap(dqn.start))(jnp.arange(args.seeds))
    history = {"episodes": [[] for _ in range(args.seeds)], "seconds": 0.0}
    if args.resume:
        leaves, history = restore(manager, done, jax.tree.leaves(agents), settings)
        agents = jax.tree.unflatten(jax.tree.structure(agents), leaves)
        print(f"Continuing after frame {done:,}.")

    @partial(jax.jit, static_argnames="learns", donate_argnames="agents")
    def period(agents, learns):
        return jax.vmap(partial(dqn.period, learns=learns))(agents)

    before, begun = history["seconds"], time.perf_counter()
    with (
        signals_collected(signal.SIGINT, signal.SIGTERM) as received,
        tqdm(total=args.frames, initial=done, unit="frame", unit_scale=True, dynamic_ncols=True) as bar,
    ):
        while done < args.frames:
            agents, outcome = period(agents, learns=done >= _dqn.START)
            ended, scores = map(np.asarray, outcome)
            for seed, episodes in enumerate(history["episodes"]):
                at = np.flatnonzero(ended[seed])
                episodes += zip((done + 1 + at).tolist(), scores[seed, at].tolist(), strict=True)
            done += _dqn.PERIOD
            history["seconds"] = before + time.perf_counter() - begun
            if done % args.every == 0 or done >= args.frames or received:
                save(manager, done, jax.tree.leaves(agents), settings, history)
                about = {**settings, "frames": done, **history}
                (args.out / "returns.json").write_text(json.dumps(about))
            means = [last_100(episodes[-100:], done) for episodes in history["episodes"]]
            bar.set_postfix({"mean return": f"{np.mean(means):.2f}"}, refresh=False)
            bar.update(_dqn.PERIOD)
            if received and done < args.frames:
                bar.close()
                print(f"Stopped after frame {done:,}, and saved: the same command with --resume continues.")
                sys.exit(128 + received[0])
    return history


def draw(history, args, path):
    frames = np.linspace(0, args.frames, 201)[1:]
    curves = np.array([last_100(episodes, frames) for episodes in history["episodes"]])
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(frames, curves.T, color="tab:blue", alpha=0.3, lw=1)
    label = f"{args.optimizer}, mean of {args.seeds} seeds" if args.seeds > 1 else args.optimizer
    axes.plot(frames, curves.mean(axis=0), color="tab:blue", lw=2.5, label=label)
    axes.plot(*zip(*PUBLISHED[args.game], strict=True), "ko", label="published, mean of 30 seeds")
    axes.set(xlabel="frames", ylabel="mean return of the last 100 episodes", ylim=(0, None))
    axes.set_xscale("symlog", linthresh=100_000)
    axes.set_xlim(0, 6e6)
    axes.set_title(f"DQN on MinAtar's {args.game.replace('_', ' ')}")
    axes.legend(frameon=False, loc="upper left")
    save_figure(figure, path)


def main(argv=None):
    parser = parser_for(__doc__, "dqn_minatar", help="folder for picture, returns and checkpoints")
    parser.add_argument("--game", choices=_dqn.GAMES, default="breakout")
    parser.add_argument("--frames", type=at_least(_dqn.START), default=100_000, help="of each seed")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="how many")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="conventions.torch")
    parser.add_argument("--every", type=at_least(_dqn.PERIOD), default=50_000, help="frames between saves")
    parser.add_argument(
        "--resume", action="store_true", help="go on in --out; without it a new run replaces it"
    )
    args = parser.parse_args(argv)

    history = train(args)
    frames = args.seeds * args.frames
    print(f"{args.game}, {args.optimizer}: {frames:,} frames in {history['seconds']:.0f} s.")
    for seed, episodes in enumerate(history["episodes"]):
        mean = last_100(episodes, args.frames)
        print(f"    seed {seed}: {len(episodes):,} episodes, mean return of the last 100 {mean:.2f}")
    print("    published:", ", ".join(f"{mean} at {at:,}" for at, mean in PUBLISHED[args.game]))
    draw(history, args, args.out / "dqn_minatar.png")
    print(f"The picture is {args.out / 'dqn_minatar.png'}")


if __name__ == "__main__":
    main()
