"""CartPole in JAX: a pole on a cart, to be kept upright by pushing the cart left or right.

The equations of Barto, Sutton and Anderson (1983), without friction, with the constants and limits of the
classic control benchmark. A cart of mass M, a uniform pole of mass m and half-length l at an angle from the
vertical, a force F on the cart:

    (M + m) x'' + m l (angle'' cos(angle) - angle'^2 sin(angle)) = F
    4/3 l angle'' + x'' cos(angle) = g sin(angle)

by Euler steps of 0.02 s. Each earns 1. An episode ends where the pole falls or the cart leaves its track, or
after 500 steps; the next one begins by itself.

Pure functions of one cart: `jax.vmap` makes many of them, `jax.lax.scan` an episode.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

GRAVITY, CART, POLE, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5  # m/s^2, kg, kg, m
FORCE, TIME_STEP = 10.0, 0.02  # N, s
TRACK, TILT = 2.4, 12 * jnp.pi / 180  # m to both sides, radians to both sides
MAX_STEPS = 500


class State(NamedTuple):
    observation: jax.Array  # [4] float32: position, velocity, angle, angular velocity
    time: jax.Array  # steps since the episode began
    key: jax.Array  # for the episodes to come


class Outcome(NamedTuple):
    """What a step led to, before a new episode begins.

    A return is cut off by `terminated`, and not by `truncated`: bootstrap with the value of `observation`.
    """

    observation: jax.Array
    reward: jax.Array
    terminated: jax.Array  # fallen, or off the track
    truncated: jax.Array  # still up after MAX_STEPS


def reset(key):
    """The first state of an episode: at rest, but for noise."""
    key, key_start = jax.random.split(key)
    start = jax.random.uniform(key_start, (4,), jnp.float32, -0.05, 0.05)
    return State(start, jnp.zeros((), jnp.int32), key)


def step(state, action):
    """The next state, already that of a new episode where one has ended, and the step's `Outcome`.

    `action` is 0 for a push to the left, 1 to the right.
    """
    observation = move(state.observation, action)
    time = state.time + 1
    position, _, angle, _ = observation
    terminated = (jnp.abs(position) > TRACK) | (jnp.abs(angle) > TILT)
    truncated = (time >= MAX_STEPS) & ~terminated
    outcome = Outcome(observation, jnp.float32(1.0), terminated, truncated)
    moved = State(observation, time, state.key)
    return jax.lax.cond(terminated | truncated, lambda s: reset(s.key), lambda s: s, moved), outcome


def move(observation, action):
    """One Euler step of the equations, solved for the two accelerations."""
    _, velocity, angle, spin = observation
    force = jnp.where(action == 1, FORCE, -FORCE)
    sin, cos, mass = jnp.sin(angle), jnp.cos(angle), CART + POLE
    push = (force + POLE * HALF_LENGTH * spin**2 * sin) / mass
    turn = (GRAVITY * sin - push * cos) / (HALF_LENGTH * (4 / 3 - POLE * cos**2 / mass))
    pull = push - POLE * HALF_LENGTH * turn * cos / mass
    return observation + TIME_STEP * jnp.stack([velocity, pull, spin, turn])
