"""Do the published settings of an actor-critic work here, number for number?

A2C (Mnih et al., 2016) on CartPole with Stable-Baselines3's settings: `torch.optim.RMSprop`'s rule with
learning rate 7e-4, alpha 0.99 and eps 1e-5, gradients clipped to 0.5, 8 carts, an update every 5 steps,
discount 0.99, two networks of 64 x 64. In `conventions.torch` these numbers mean what they mean there:

    python examples/actor_critic.py

trains eight seeds for 500,000 steps each, and again with the same numbers in `optax.rmsprop`, where eps is
added under the root: 1e-5 there is 3e-3 beside it, and small gradients make smaller steps. With 32 seeds
the mean return came to 475 (500 is the most there is) after 60,000 to 140,000 steps with the one, 160,000
to 210,000 with the other. Seeds and carts are vmapped, updates scanned: half a minute on two cores.
"""

from functools import partial

import _cartpole as cartpole
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _options import at_least, parser_for
from _pictures import save_figure
from flax import linen as nn
from matplotlib.figure import Figure
from tqdm import tqdm

from rmsprop_jax import conventions

CARTS, ROLLOUT, GAMMA, VALUE_WEIGHT = 8, 5, 0.99, 0.5
CHUNK = (
    10_000  # steps of the carts between two points of the curve: long enough for every cart's episode to end
)
OPTIMIZERS = {
    "conventions.torch": partial(conventions.torch, alpha=0.99, eps=1e-5),
    "optax.rmsprop": partial(optax.rmsprop, decay=0.99, eps=1e-5),
}


def network(outputs, last_scale):
    def dense(width, scale):
        return nn.Dense(width, kernel_init=nn.initializers.orthogonal(scale))

    return nn.Sequential([dense(64, 2**0.5), nn.tanh, dense(64, 2**0.5), nn.tanh, dense(outputs, last_scale)])


ACTOR, CRITIC = network(2, 0.01), network(1, 1.0)  # the first policy is close to a coin toss


def values(params, observation):
    return CRITIC.apply(params["critic"], observation)[..., 0]


@jax.jit
@jax.vmap
def start(seed):
    """Networks, carts, and a key for the actions to come."""
    key_actor, key_critic, key_carts, key = jax.random.split(jax.random.key(seed), 4)
    params = {
        "actor": ACTOR.init(key_actor, jnp.zeros(4)),
        "critic": CRITIC.init(key_critic, jnp.zeros(4)),
    }
    carts = jax.vmap(cartpole.reset)(jax.random.split(key_carts, CARTS))
    return params, carts, key


def act(params, carts, key):
    """One step of all carts: the next carts, and what was seen, done and earned."""
    logits = ACTOR.apply(params["actor"], carts.observation)
    action = jax.random.categorical(key, logits)
    after, outcome = jax.vmap(cartpole.step)(carts, action)
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


def train(tx, seeds, steps, name):
    """Mean returns of the episodes that ended, [time, seed]."""

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


def report(curve):
    """Lines with each seed's figures."""
    reached = [
        f"{(1 + np.argmax(seed >= 475)) * CHUNK // 1000}" if max(seed) >= 475 else "-" for seed in curve.T
    ]
    late = curve[-max(1, len(curve) // 5) :].mean(axis=0)
    yield "    thousands of steps to 475         " + " ".join(f"{steps:>5}" for steps in reached)
    yield "    mean return, last fifth           " + " ".join(f"{value:5.0f}" for value in late)


def draw(curves, path):
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
        times = np.arange(1, len(curve) + 1) * CHUNK / 1000
        axes.plot(times, curve, color=color, alpha=0.25, lw=1)
        axes.plot(times, np.median(curve, axis=1), color=color, lw=2.5, label=f"{name}, median of the seeds")
    axes.axhline(cartpole.MAX_STEPS, color="0.4", ls="--", lw=1)
    axes.set(xlabel="thousands of steps", ylabel="mean return of the episodes that ended", ylim=(0, 520))
    axes.set_title("A2C on CartPole: the same numbers, two places for eps")
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def main(argv=None):
    parser = parser_for(__doc__, "actor_critic.png")
    parser.add_argument("--steps", type=at_least(CHUNK), default=500_000, help="of the carts, for each seed")
    parser.add_argument("--seeds", type=at_least(1), default=8, help="how many")
    parser.add_argument("--learning-rate", type=at_least(0.0, float), default=7e-4)
    args = parser.parse_args(argv)

    curves = {}
    for name, make in OPTIMIZERS.items():
        tx = optax.chain(optax.clip_by_global_norm(0.5), make(args.learning_rate))
        curves[name] = train(tx, args.seeds, args.steps, name)
        print(f"{name}, seeds 0 to {args.seeds - 1}", *report(curves[name]), sep="\n")
    draw(curves, args.out)
    print(f"The picture is {args.out}")


if __name__ == "__main__":
    main()
