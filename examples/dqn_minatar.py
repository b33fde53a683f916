"""Does a published agent train here as its paper says?

DQN on MinAtar (Young and Tian, 2019, arXiv 1903.03176): a small network, frames of 10 x 10, and PyTorch's
centred RMSProp with alpha 0.95 and eps 0.01, which is `conventions.torch` here. The paper's curves are drawn
at the best step size of its sweep in each game, 2^-9 in breakout, not at its program's 0.00025; so are these.

    python dqn_minatar.py                                breakout, 100,000 frames, two minutes
    python dqn_minatar.py --frames 1000000 --seeds 3     about an hour; after Ctrl-C the same with --resume
    python dqn_minatar.py --step-size 0.00025            the program's default, below the published curve
    python dqn_minatar.py --optimizer conventions.dqn    the same numbers, eps under the root

Copy minatar_published.json with this file: the paper's curves, the mean return of the last 100 episodes over
30 seeds, which the picture shows beside this run. Game, replay buffer and updates are one compiled scan, all
seeds at once: on two cores some 900 frames a second, and the optimizer takes an eighth of the time.

What the paper leaves open was read off the authors' program (github.com/kenjyoung/MinAtar, examples/dqn.py).
PyTorch's smooth L1 loss is Optax's Huber loss; its layers start uniform within 1/sqrt(fan-in); exploration
falls from the first update on; all six actions are open in every game; and no optimizer's momentum: the 0.95
that the paper calls gradient momentum is the decay of the running mean that centring subtracts.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from rmsprop_jax import conventions

OPTIMIZERS = {
    "conventions.torch": partial(conventions.torch, alpha=0.95, eps=0.01, centered=True),
    "conventions.dqn": partial(conventions.dqn, decay=0.95, eps=0.01),
    "optax.rmsprop": partial(optax.rmsprop, decay=0.95, eps=0.01, centered=True),
    "uncentred": partial(conventions.torch, alpha=0.95, eps=0.01),
    "adam": optax.adam,
}
PUBLISHED = json.loads(Path(__file__).with_name("minatar_published.json").read_text())["games"]
BATCH, REPLAY, START, PERIOD, DISCOUNT = 32, 100_000, 5_000, 1_000, 0.99
EPSILON = optax.linear_schedule(1.0, 0.1, 100_000, transition_begin=START)  # of a frame


def linear(inputs, outputs, rngs):
    """A layer that starts as PyTorch's does."""

    def uniform(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=uniform, rngs=rngs)


class QNetwork(nnx.Module):
    """The value of each action, [batch, actions], for observations [batch, 10, 10, channels]."""

    def __init__(self, channels, actions, rngs):
        self.conv = linear(9 * channels, 16, rngs)
        self.hidden = linear(8 * 8 * 16, 128, rngs)
        self.output = linear(128, actions, rngs)

    def __call__(self, observation):
        x = observation.astype(jnp.float32)
        # A 3x3 convolution, as a matrix product: on CPU an update is four times as fast as with XLA's.
        x = jnp.concatenate([x[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)], axis=-1)
        x = nnx.relu(self.conv(x)).reshape(len(x), -1)
        return self.output(nnx.relu(self.hidden(x)))


def loss_fn(network, target, batch):
    """Huber loss of the one-step error, over a batch whose observations are not packed."""
    value = jnp.where(batch.ended, 0.0, target(batch.following).max(axis=-1))
    chosen = jnp.take_along_axis(network(batch.observation), batch.action[:, None], axis=-1)[:, 0]
    return optax.losses.huber_loss(chosen, batch.reward + DISCOUNT * value).mean()


# The agent ----------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One frame, or a batch or buffer of them; the observations' 0s and 1s are packed, eight in a byte."""

    observation: Any
    action: Any
    reward: Any
    following: Any
    ended: Any


class Agent(NamedTuple):
    """All that the next frame depends on."""

    seed: Any
    frame: Any
    params: Any
    target: Any
    state: Any  # the optimizer's
    replay: Transition
    game: Any
    score: Any  # of the episode so far


class DQN:
    """Makes agents for a game and an optimizer, and lets them play and learn."""

    def __init__(self, game, tx):
        make = getattr(import_module(f"pgx_minatar.{game}"), "MinAtar" + game.title().replace("_", ""))
        # All actions and, as in MinAtar, one in ten replaced by the one before it.
        self.game, self.tx = make(use_minimal_action_set=False, sticky_action_prob=0.1), tx
        self.shape = self.game.observation_shape
        self.new_network = partial(QNetwork, self.shape[-1], self.game.num_actions)
        self.network, _ = nnx.split(self.new_network(nnx.Rngs(0)))

    def start(self, seed):
        """An agent that has seen nothing."""
        key = jax.random.key(seed)
        params, game = nnx.state(self.new_network(nnx.Rngs(key)), nnx.Param), self.game.init(key)
        bits = jnp.packbits(game.observation)
        one = Transition(bits, jnp.int32(0), jnp.float32(0), bits, jnp.bool(False))
        replay = jax.tree.map(lambda x: jnp.zeros((REPLAY, *x.shape), x.dtype), one)
        zero, state = jnp.int32(0), self.tx.init(params)
        return Agent(jnp.int32(seed), zero, params, params, state, replay, game, jnp.float32(0))

    def update(self, params, target, state, batch):
        """The optimizer's step on a batch whose observations are not packed."""

        def loss(params):
            return loss_fn(nnx.merge(self.network, params), nnx.merge(self.network, target), batch)

        updates, state = self.tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def play(self, agent, keys):
        """One frame, written into the replay buffer; whether the episode ended, and its score."""
        explore, at_random, sticky, reset = keys
        values = nnx.merge(self.network, agent.params)(agent.game.observation[None])[0]
        action = jnp.where(
            jax.random.bernoulli(explore, EPSILON(agent.frame)),
            jax.random.randint(at_random, (), 0, self.game.num_actions),
            values.argmax(),
        )
        game = self.game.step(agent.game, action, sticky)
        before, after = jnp.packbits(agent.game.observation), jnp.packbits(game.observation)
        seen = Transition(before, action, game.rewards[0], after, game.terminated)
        replay = jax.tree.map(lambda all, x: all.at[agent.frame % REPLAY].set(x), agent.replay, seen)
        score, ended = agent.score + game.rewards[0], game.terminated
        # The action that may stick is remembered beyond an episode's end, as MinAtar does.
        fresh = self.game.init(reset).replace(_last_action=game._last_action)
        game = jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, game)
        agent = agent._replace(game=game, replay=replay, score=jnp.where(ended, 0.0, score))
        return agent._replace(frame=agent.frame + 1), (ended, score)

    def learn(self, agent, key):
        """One update, on frames drawn from the buffer."""
        drawn = jax.random.randint(key, (BATCH,), 0, jnp.minimum(agent.frame, REPLAY))
        batch = jax.tree.map(lambda x: x[drawn], agent.replay)
        unpacked = partial(jnp.unpackbits, axis=-1, count=math.prod(self.shape))
        shape = (BATCH, *self.shape)
        before, after = (unpacked(bits).reshape(shape) for bits in (batch.observation, batch.following))
        batch = batch._replace(observation=before, following=after)
        params, state = self.update(agent.params, agent.target, agent.state, batch)
        return agent._replace(params=params, state=state)

    def period(self, agent, learns):
        """PERIOD frames, each with an update if the agent `learns`; then the target network follows."""

        def frame(agent, _):
            *keys, draw = jax.random.split(jax.random.fold_in(jax.random.key(agent.seed), agent.frame), 5)
            agent, outcome = self.play(agent, keys)
            return (self.learn(agent, draw) if learns else agent), outcome

        agent, outcome = jax.lax.scan(frame, agent, length=PERIOD)
        return agent._replace(target=agent.params), outcome


# The job ------------------------------------------------------------------------------------------------


def last_100(episodes, frames):
    """The mean return of the last 100 episodes that had ended by each of `frames`, NaN before the first."""
    ends, scores = np.array(episodes, float).reshape(-1, 2).T
    total = np.concatenate([[0], np.cumsum(scores)])
    upto = np.searchsorted(ends, frames, side="right")
    since = np.maximum(upto - 100, 0)
    return (total[upto] - total[since]) / np.where(upto > since, upto - since, np.nan)


def train(args):
    """Plays and learns; returns each seed's episodes, as pairs of the frame of its end and its return."""
    dqn = DQN(args.game, OPTIMIZERS[args.optimizer](args.step_size))
    agents = jax.jit(jax.vmap(dqn.start))(jnp.arange(args.seeds))
    history = {name: getattr(args, name) for name in ("game", "optimizer", "step_size", "seeds")}
    history |= {"frames": 0, "episodes": [[] for _ in range(args.seeds)], "seconds": 0.0}
    if args.resume:
        agents, history = restored(args.out, agents, history)
        print(f"Continuing after frame {history['frames']:,}.")

    @partial(jax.jit, static_argnames="learns", donate_argnames="agents")
    def period(agents, learns):
        return jax.vmap(partial(dqn.period, learns=learns))(agents)

    done, before, begun = history["frames"], history["seconds"], time.perf_counter()
    with tqdm(total=args.frames, initial=done, unit="frame", unit_scale=True, dynamic_ncols=True) as bar:
        while done < args.frames:
            agents, outcome = period(agents, learns=done >= START)
            ended, scores = map(np.asarray, outcome)
            for seed, episodes in enumerate(history["episodes"]):
                at = np.flatnonzero(ended[seed])
                episodes += zip((done + 1 + at).tolist(), scores[seed, at].tolist(), strict=True)
            done += PERIOD
            history |= {"frames": done, "seconds": before + time.perf_counter() - begun}
            if done % args.every == 0 or done >= args.frames:
                save(args.out, agents, history)
            means = [last_100(episodes[-100:], done) for episodes in history["episodes"]]
            bar.set_postfix({"mean return": f"{np.mean(means):.2f}"}, refresh=False)
            bar.update(PERIOD)
    return history


def save(folder, agents, history):
    """The returns for you to read, and with them all that the next frame depends on, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, text = [np.asarray(x) for x in jax.tree.leaves(agents)], json.dumps(history)
    np.savez(folder / "unfinished.npz", *arrays, history=text)
    (folder / "unfinished.npz").replace(folder / "checkpoint.npz")  # a run that is killed leaves a whole one
    (folder / "returns.json").write_text(text)


def restored(folder, agents, history):
    if not (folder / "checkpoint.npz").exists():
        sys.exit(f"--resume: no checkpoint in {folder}. Start without --resume, or check --out.")
    leaves, treedef = jax.tree.flatten(agents)
    with np.load(folder / "checkpoint.npz") as saved:
        leaves = [jnp.asarray(saved[f"arr_{i}"]) for i in range(len(leaves))]
        found = json.loads(str(saved["history"]))
    for name in ("game", "optimizer", "step_size", "seeds"):
        if found[name] != history[name]:
            of = f"the checkpoint's {name} is {found[name]!r}, this run's is {history[name]!r}"
            sys.exit(f"--resume: {of}.")
    return treedef.unflatten(leaves), found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--game", choices=PUBLISHED, default="breakout")
    parser.add_argument("--frames", type=int, default=100_000, help="of each seed")
    parser.add_argument("--seeds", type=int, default=2, help="how many; two take no longer than one")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="conventions.torch")
    parser.add_argument("--step-size", type=float, help="the game's best in the paper's sweep, if not given")
    parser.add_argument("--every", type=int, default=10_000, help="frames between saves")
    parser.add_argument("--resume", action="store_true", help="go on from the last save in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/dqn_minatar"), help="folder")
    args = parser.parse_args()
    args.step_size = args.step_size or 2.0 ** PUBLISHED[args.game]["log2_step_size"]

    history = train(args)
    print(f"{args.seeds} x {args.frames:,} frames of {args.game} in {history['seconds']:.0f} s.")
    for seed, episodes in enumerate(history["episodes"]):
        mean = last_100(episodes, args.frames)
        print(f"    seed {seed}: {len(episodes):,} episodes, mean return of the last 100 {mean:.2f}")
    frames, means = np.transpose(PUBLISHED[args.game]["curve"])
    print(f"    published {np.interp(args.frames, frames, means):.2f}, and in the end {means[-1]:.2f}")
    draw(args.out / "dqn_minatar.png", history, args)
    print(f"The picture is {args.out / 'dqn_minatar.png'}")


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, history, args):
    frames = np.linspace(0, args.frames, 201)[1:]
    curves = np.array([last_100(episodes, frames) for episodes in history["episodes"]])
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(frames, curves.T, color="tab:blue", alpha=0.3, lw=1)
    label = f"{args.optimizer}, mean of {args.seeds} seeds, step size {args.step_size:g}"
    axes.plot(frames, curves.mean(axis=0), color="tab:blue", lw=2.5, label=label)
    curve, power = (PUBLISHED[args.game][name] for name in ("curve", "log2_step_size"))
    label = f"published, mean of 30 seeds, step size 2^{power}"
    axes.plot(*zip(*curve, strict=True), "k--", lw=1.5, label=label)
    axes.set(title=f"DQN on MinAtar's {args.game.replace('_', ' ')}", xlabel="frames")
    axes.set(ylabel="mean return of the last 100 episodes", xlim=(0, 1.5 * args.frames), ylim=(0, None))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
