"""Do the published settings of an actor-critic work here, number for number?

A2C (Mnih et al., 2016) on CartPole with Stable-Baselines3's settings: `torch.optim.RMSprop`'s rule with
learning rate 7e-4, alpha 0.99 and eps 1e-5, gradients clipped to 0.5, 8 carts, an update every 5 steps,
discount 0.99, two networks of 64 x 64. In `conventions.torch` these numbers mean what they mean there:

    python actor_critic.py

trains eight seeds for 500,000 steps each, and again with the same numbers in `optax.rmsprop`, where eps is
added under the root: 1e-5 there is 3e-3 beside it, and small gradients make smaller steps. With 32 seeds
the mean return came to 475 (500 is the most there is) after 60,000 to 140,000 steps with the one, 160,000
to 210,000 with the other. Seeds and carts are vmapped, updates scanned: half a minute on two cores.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from tqdm import tqdm

from rmsprop_jax import conventions

OPTIMIZERS = {
    "conventions.torch": conventions.torch(7e-4, alpha=0.99, eps=1e-5),
    "optax.rmsprop": optax.rmsprop(7e-4, decay=0.99, eps=1e-5),
}
CARTS, ROLLOUT, GAMMA, VALUE_WEIGHT = 8, 5, 0.99, 0.5
CHUNK = 10_000  # steps between two points of the curve: long enough for every cart's episode to end


def network(outputs, last_scale):
    def dense(width, scale):
        return nn.Dense(width, kernel_init=nn.initializers.orthogonal(scale))

    return nn.Sequential([dense(64, 2**0.5), nn.tanh, dense(64, 2**0.5), nn.tanh, dense(outputs, last_scale)])


ACTOR, CRITIC = network(2, 0.01), network(1, 1.0)  # the first policy is close to a coin toss


def values(params, observation):
    return CRITIC.apply(params["critic"], observation)[..., 0]


def loss_fn(params, observation, action, target):
    log_policy = jax.nn.log_softmax(ACTOR.apply(params["actor"], observation))
    chosen = jnp.take_along_axis(log_policy, action[..., None], axis=-1)[..., 0]
    error = target - values(params, observation)
    return jnp.mean(VALUE_WEIGHT * error**2 - jax.lax.stop_gradient(error) * chosen)


def update(tx, carry, _):
    """ROLLOUT steps of the carts and one of the optimizer; how many episodes ended, their returns in all."""
    params, state, carts, key = carry
    key, key_act = jax.random.split(key)
    keys = jax.random.split(key_act, ROLLOUT)
    carts, (observation, action, time, outcome) = jax.lax.scan(partial(act, params), carts, keys)
    target = returns(params, outcome, carts.observation)
    updates, state = tx.update(jax.grad(loss_fn)(params, observation, action, target), state, params)
    ended = outcome.terminated | outcome.truncated
    carry = optax.apply_updates(params, updates), state, carts, key
    return carry, (ended.sum(), jnp.where(ended, time, 0).sum())


def act(params, carts, key):
    """One step of all carts: the next carts, and what was seen, done and earned."""
    action = jax.random.categorical(key, ACTOR.apply(params["actor"], carts.observation))
    after, outcome = jax.vmap(push)(carts, action)
    return after, (carts.observation, action, carts.time + 1, outcome)


def returns(params, outcome, last_observation):
    """Discounted rewards up to the last of the steps, [ROLLOUT, CARTS], and from there the critic's value."""
    beyond = values(params, outcome.observation)  # where an episode ran out of time

    def back(following, step):
        outcome, beyond = step
        following = jnp.where(outcome.truncated, beyond, jnp.where(outcome.terminated, 0.0, following))
        following = outcome.reward + GAMMA * following
        return following, following

    return jax.lax.scan(back, values(params, last_observation), (outcome, beyond), reverse=True)[1]


# CartPole: push a cart to the left or to the right, so that the pole on it stays up -----------------------
#
# The equations of Barto, Sutton and Anderson (1983), without friction: a cart of mass M, a uniform pole of
# mass m and half-length l at an angle from the vertical, a force F on the cart, by Euler steps of 0.02 s:
#
#     (M + m) x'' + m l (angle'' cos(angle) - angle'^2 sin(angle)) = F
#     4/3 l angle'' + x'' cos(angle) = g sin(angle)

GRAVITY, CART, POLE, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5  # m/s^2, kg, kg, m
FORCE, TIME_STEP = 10.0, 0.02  # N, s
TRACK, TILT, MAX_STEPS = 2.4, 12 * jnp.pi / 180, 500  # m and radians to both sides


class Cart(NamedTuple):
    observation: jax.Array  # [4] float32: position, velocity, angle, angular velocity
    time: jax.Array  # steps since the episode began
    key: jax.Array  # for the episodes to come


class Outcome(NamedTuple):
    """What a push led to. Returns are cut off by `terminated`; `truncated` ones go on with a value."""

    observation: jax.Array  # before a new episode begins
    reward: jax.Array
    terminated: jax.Array  # fallen, or off the track
    truncated: jax.Array  # still up after MAX_STEPS


def new_cart(key):
    """The first state of an episode: at rest, but for noise."""
    key, key_start = jax.random.split(key)
    start = jax.random.uniform(key_start, (4,), jnp.float32, -0.05, 0.05)
    return Cart(start, jnp.zeros((), jnp.int32), key)


def push(cart, action):
    """The cart after a push to the left (0) or the right (1), a new one where an episode has ended."""
    observation, time = move(cart.observation, action), cart.time + 1
    position, _, angle, _ = observation
    terminated = (jnp.abs(position) > TRACK) | (jnp.abs(angle) > TILT)
    truncated = (time >= MAX_STEPS) & ~terminated
    moved = Cart(observation, time, cart.key)
    after = jax.lax.cond(terminated | truncated, lambda cart: new_cart(cart.key), lambda cart: cart, moved)
    return after, Outcome(observation, jnp.float32(1.0), terminated, truncated)


def move(observation, action):
    """One Euler step of the equations, solved for the two accelerations."""
    _, velocity, angle, spin = observation
    force = jnp.where(action == 1, FORCE, -FORCE)
    sin, cos, mass = jnp.sin(angle), jnp.cos(angle), CART + POLE
    forced = (force + POLE * HALF_LENGTH * spin**2 * sin) / mass
    turn = (GRAVITY * sin - forced * cos) / (HALF_LENGTH * (4 / 3 - POLE * cos**2 / mass))
    pull = forced - POLE * HALF_LENGTH * turn * cos / mass
    return observation + TIME_STEP * jnp.stack([velocity, pull, spin, turn])


# The job ------------------------------------------------------------------------------------------------


@jax.jit
@jax.vmap
def start(seed):
    """Networks, carts, and a key for the actions to come."""
    key_actor, key_critic, key_carts, key = jax.random.split(jax.random.key(seed), 4)
    params = {
        "actor": ACTOR.init(key_actor, jnp.zeros(4)),
        "critic": CRITIC.init(key_critic, jnp.zeros(4)),
    }
    return params, jax.vmap(new_cart)(jax.random.split(key_carts, CARTS)), key


def train(tx, seeds, steps, name):
    """Mean returns of the episodes that ended, [time, seed]."""
    tx = optax.chain(optax.clip_by_global_norm(0.5), tx)

    @partial(jax.jit, donate_argnums=0)
    @jax.vmap
    def chunk(carry):
        carry, (ended, total) = jax.lax.scan(partial(update, tx), carry, length=CHUNK // (CARTS * ROLLOUT))
        return carry, total.sum() / ended.sum()

    params, carts, key = start(jnp.arange(seeds))
    carry, curve = (params, jax.vmap(tx.init)(params), carts, key), []
    with tqdm(total=steps // CHUNK * CHUNK, desc=name, unit="step", unit_scale=True) as bar:
        for _ in range(steps // CHUNK):
            carry, mean_return = chunk(carry)
            curve.append(np.asarray(mean_return))
            bar.set_postfix({"median return": f"{np.median(curve[-1]):.0f}"}, refresh=False)
            bar.update(CHUNK)
    return np.array(curve)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500_000, help="of the carts, for each seed")
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--out", type=Path, default=Path("runs/actor_critic.png"), help="the picture")
    args = parser.parse_args()

    curves = {name: train(tx, args.seeds, args.steps, name) for name, tx in OPTIMIZERS.items()}
    for name, curve in curves.items():
        reached = [1 + np.argmax(seed >= 475) if max(seed) >= 475 else None for seed in curve.T]
        late = curve[-max(1, len(curve) // 5) :].mean(axis=0)
        print(f"{name}, seeds 0 to {args.seeds - 1}")
        print(
            "    thousands of steps to 475        ",
            *(f"{n * CHUNK // 1000 if n else '-':>5}" for n in reached),
        )
        print("    mean return, last fifth          ", *(f"{value:5.0f}" for value in late))
    draw(args.out, curves)
    print(f"The picture is {args.out}")


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, curves):
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
        times = np.arange(1, len(curve) + 1) * CHUNK / 1000
        axes.plot(times, curve, color=color, alpha=0.25, lw=1)
        axes.plot(times, np.median(curve, axis=1), color=color, lw=2.5, label=f"{name}, median of the seeds")
    axes.axhline(MAX_STEPS, color="0.4", ls="--", lw=1)
    axes.set(xlabel="thousands of steps", ylabel="mean return of the episodes that ended", ylim=(0, 520))
    axes.set_title("A2C on CartPole: the same numbers, two places for eps")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
