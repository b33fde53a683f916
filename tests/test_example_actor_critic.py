"""actor_critic.py: cart and pole obey their equations, episodes end, and returns stop where they end."""

import numpy as np
import pytest

pytest.importorskip("flax", reason="the examples' extra is not installed")

import jax
import jax.numpy as jnp
from shortened import example


@pytest.fixture(scope="module")
def actor_critic():
    return example("actor_critic")


def test_the_cart_obeys_its_equations(actor_critic):
    """The accelerations, from the velocities before and after, in the equations of the module's docstring."""
    rng = np.random.default_rng(0)
    before = rng.uniform(-1, 1, (50, 4)).astype(np.float32) * [2.4, 3, 0.2, 3]
    actions = rng.integers(0, 2, 50)
    after = np.asarray(jax.vmap(actor_critic.move)(jnp.asarray(before, jnp.float32), jnp.asarray(actions)))
    np.testing.assert_allclose(
        after[:, [0, 2]], (before + 0.02 * before[:, [1, 1, 3, 3]])[:, [0, 2]], rtol=1e-5
    )
    pull, turn = ((after - before) / 0.02)[:, [1, 3]].T
    angle, spin = before[:, 2], before[:, 3]
    force = 1.1 * pull + 0.1 * 0.5 * (turn * np.cos(angle) - spin**2 * np.sin(angle))
    # Differences of float32 numbers up to 3, divided by 0.02: errors of 2e-5 or less.
    np.testing.assert_allclose(force, np.where(actions == 1, 10.0, -10.0), atol=2e-4)
    np.testing.assert_allclose(4 / 3 * 0.5 * turn + pull * np.cos(angle), 9.8 * np.sin(angle), atol=2e-4)


def test_episodes_end_and_begin_anew(actor_critic):
    def play(policy):
        def step(state, _):
            state, outcome = actor_critic.push(state, policy(state.observation))
            return state, (outcome, state.time)

        return jax.lax.scan(step, actor_critic.new_cart(jax.random.key(0)), length=1001)[1]

    # Always to the right, the pole falls to the left within a few steps.
    outcome, time = play(lambda observation: 1)
    assert not outcome.truncated.any()
    ends = np.flatnonzero(outcome.terminated)
    assert np.all(np.diff(ends) <= 12)
    assert np.all(
        outcome.observation[ends, 2] < -actor_critic.TILT
    )  # as it was when it fell, not after the reset
    assert np.all(time[ends] == 0)

    # Pushed to where it leans and turns, it stays up, until the time is over.
    outcome, time = play(
        lambda observation: (observation @ jnp.array([0.01, 0.05, 1.0, 0.3]) > 0).astype(int)
    )
    assert not outcome.terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(outcome.truncated), [499, 999])
    assert time[499] == 0
    np.testing.assert_array_equal(outcome.reward, 1)


def test_returns_go_on_where_time_ran_out(actor_critic, monkeypatch):
    """The critic says 100: one goes on, one falls at the second step, one is out of time."""
    monkeypatch.setattr(
        actor_critic, "values", lambda params, observation: jnp.full(observation.shape[:-1], 100.0)
    )
    at_second = np.arange(3)[:, None] == 1
    outcome = actor_critic.Outcome(
        observation=jnp.zeros((3, 3, 4)),
        reward=jnp.ones((3, 3)),
        terminated=jnp.asarray(at_second & [False, True, False]),
        truncated=jnp.asarray(at_second & [False, False, True]),
    )
    gamma, last = 0.99, 1 + 0.99 * 100
    expected = [
        [1 + gamma * (1 + gamma * last), 1 + gamma, 1 + gamma * last],
        [1 + gamma * last, 1, last],
        [last] * 3,
    ]
    returns = actor_critic.returns(None, outcome, jnp.zeros((3, 4)))
    np.testing.assert_allclose(returns, expected, rtol=1e-6)
