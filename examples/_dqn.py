"""The agent of dqn_minatar.py: DQN as Young and Tian (2019) trained it on MinAtar, in one compiled scan.

What the paper leaves open was read off the authors' program (github.com/kenjyoung/MinAtar, examples/dqn.py).
PyTorch's smooth L1 loss is Optax's Huber loss; its layers start uniform within 1/sqrt(fan-in); exploration
falls from the first update on; all six actions are open in every game; and no optimizer's momentum: the 0.95
that the paper calls gradient momentum is the decay of the running mean that centring subtracts.
"""

from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

BATCH, REPLAY, START, PERIOD, DISCOUNT = 32, 100_000, 5_000, 1_000, 0.99
EPSILON = optax.linear_schedule(1.0, 0.1, 100_000, transition_begin=START)  # of a frame
GAMES = {
    "asterix": "MinAtarAsterix",
    "breakout": "MinAtarBreakout",
    "freeway": "MinAtarFreeway",
    "seaquest": "MinAtarSeaquest",
    "space_invaders": "MinAtarSpaceInvaders",
}


def environment(game, sticky=0.1):
    """MinAtar's game in JAX, with all actions and, as there, one in ten replaced by the one before it."""
    module = import_module(f"pgx_minatar.{game}")
    return getattr(module, GAMES[game])(use_minimal_action_set=False, sticky_action_prob=sticky)


# The network --------------------------------------------------------------------------------------------


def linear(inputs, outputs, rngs):
    """A layer that starts as PyTorch's does."""

    def uniform(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=uniform, rngs=rngs)


class QNetwork(nnx.Module):
    """What each action is worth, [batch, actions], for observations [batch, 10, 10, channels]."""

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


# What it learns from ------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One frame, or a batch or buffer of them; the observations' 0s and 1s are packed, eight in a byte."""

    observation: Any
    action: Any
    reward: Any
    following: Any
    ended: Any


def packed(observation):
    return jnp.packbits(observation.reshape(-1))


def unpacked(bits, shape):
    return jnp.unpackbits(bits, axis=-1, count=shape[0] * shape[1] * shape[2]).reshape(-1, *shape)


def loss_fn(network, target, batch):
    """Huber loss of the one-step error, over a batch whose observations are not packed."""
    worth = jnp.where(batch.ended, 0.0, target(batch.following).max(axis=-1))
    aim = jax.lax.stop_gradient(batch.reward + DISCOUNT * worth)
    chosen = jnp.take_along_axis(network(batch.observation), batch.action[:, None], axis=-1)[:, 0]
    return optax.huber_loss(chosen, aim).mean()


# The agent ----------------------------------------------------------------------------------------------


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
        self.game, self.tx = environment(game), tx
        self.shape = self.game.observation_shape
        self.network, _ = nnx.split(self._network(0))

    def _network(self, seed):
        return QNetwork(self.shape[-1], self.game.num_actions, nnx.Rngs(jax.random.key(seed)))

    def start(self, seed):
        """An agent that has seen nothing."""
        params = nnx.state(self._network(seed), nnx.Param)
        game = self.game.init(jax.random.key(seed))
        one = Transition(packed(game.observation), jnp.int32(0), 0.0, packed(game.observation), False)
        replay = jax.tree.map(lambda x: jnp.zeros((REPLAY, *jnp.shape(x)), jnp.asarray(x).dtype), one)
        return Agent(
            seed=jnp.int32(seed),
            frame=jnp.int32(0),
            params=params,
            target=params,
            state=self.tx.init(params),
            replay=replay,
            game=game,
            score=jnp.float32(0),
        )

    def values(self, params, observation):
        return nnx.merge(self.network, params)(observation)

    def play(self, agent, keys):
        """One frame, written into the replay buffer; whether the episode ended, and its score."""
        explore, at_random, sticky, reset = keys
        greedy = self.values(agent.params, agent.game.observation[None])[0].argmax()
        action = jnp.where(
            jax.random.bernoulli(explore, EPSILON(agent.frame)),
            jax.random.randint(at_random, (), 0, self.game.num_actions),
            greedy,
        )
        game = self.game.step(agent.game, action, sticky)
        seen = Transition(
            packed(agent.game.observation), action, game.rewards[0], packed(game.observation), game.terminated
        )
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
        observation, following = (unpacked(x, self.shape) for x in (batch.observation, batch.following))
        batch = batch._replace(observation=observation, following=following)
        params, state = self.update(agent.params, agent.target, agent.state, batch)
        return agent._replace(params=params, state=state)

    def update(self, params, target, state, batch):
        def loss(params):
            network, target_network = (nnx.merge(self.network, x) for x in (params, target))
            return loss_fn(network, target_network, batch)

        updates, state = self.tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def period(self, agent, learns):
        """PERIOD frames, each with an update if the agent `learns`; then the target network follows."""

        def frame(agent, _):
            *keys, draw = jax.random.split(jax.random.fold_in(jax.random.key(agent.seed), agent.frame), 5)
            agent, outcome = self.play(agent, keys)
            return (self.learn(agent, draw) if learns else agent), outcome

        agent, outcome = jax.lax.scan(frame, agent, length=PERIOD)
        return agent._replace(target=agent.params), outcome
