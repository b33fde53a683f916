"""The gallery's examples, shortened: that they do what their first line asks, and draw it."""

import re

import numpy as np
import pytest

pytest.importorskip("flax", reason="the examples' extra is not installed")

import jax
import jax.numpy as jnp
import matplotlib.image
from shortened import EXAMPLES, assert_drawn, example, run


def numbers(line):
    return [float(figure) for figure in re.findall(r"-?\d+\.?\d*", line.replace(",", ""))]


@pytest.mark.slow
def test_digits_cnn_reads_most_digits(tmp_path):
    output = run("digits_cnn", "--epochs=3", "--out", tmp_path / "digits.png")
    assert float(re.search(r"accuracy (\d+\.\d)%", output)[1]) > 90
    assert_drawn(tmp_path / "digits.png")


def test_cartpole_obeys_its_equations():
    """The accelerations, from the velocities before and after, in the equations of the module's docstring."""
    cartpole = example("_cartpole")
    rng = np.random.default_rng(0)
    before = rng.uniform(-1, 1, (50, 4)).astype(np.float32) * [2.4, 3, 0.2, 3]
    actions = rng.integers(0, 2, 50)
    after = np.asarray(jax.vmap(cartpole.move)(jnp.asarray(before, jnp.float32), jnp.asarray(actions)))
    np.testing.assert_allclose(
        after[:, [0, 2]], (before + 0.02 * before[:, [1, 1, 3, 3]])[:, [0, 2]], rtol=1e-5
    )
    pull, turn = ((after - before) / 0.02)[:, [1, 3]].T
    angle, spin = before[:, 2], before[:, 3]
    force = 1.1 * pull + 0.1 * 0.5 * (turn * np.cos(angle) - spin**2 * np.sin(angle))
    # Differences of float32 numbers up to 3, divided by 0.02: errors of 2e-5 or less.
    np.testing.assert_allclose(force, np.where(actions == 1, 10.0, -10.0), atol=2e-4)
    np.testing.assert_allclose(4 / 3 * 0.5 * turn + pull * np.cos(angle), 9.8 * np.sin(angle), atol=2e-4)


def test_cartpole_episodes_end_and_begin_anew():
    cartpole = example("_cartpole")

    def play(policy):
        def step(state, _):
            state, outcome = cartpole.step(state, policy(state.observation))
            return state, (outcome, state.time)

        return jax.lax.scan(step, cartpole.reset(jax.random.key(0)), length=1001)[1]

    # Always to the right, the pole falls to the left within a few steps.
    outcome, time = play(lambda observation: 1)
    assert not outcome.truncated.any()
    ends = np.flatnonzero(outcome.terminated)
    assert np.all(np.diff(ends) <= 12)
    assert np.all(
        outcome.observation[ends, 2] < -cartpole.TILT
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


def test_actor_critic_bootstraps_where_time_ran_out(monkeypatch):
    """The critic says 100: one goes on, one falls at the second step, one is out of time."""
    actor_critic = example("actor_critic")
    cartpole = example("_cartpole")
    monkeypatch.setattr(
        actor_critic, "values", lambda params, observation: jnp.full(observation.shape[:-1], 100.0)
    )
    at_second = np.arange(3)[:, None] == 1
    outcome = cartpole.Outcome(
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


@pytest.mark.slow
def test_actor_critic_learns_to_keep_the_pole_up(tmp_path):
    output = run("actor_critic", "--steps=30000", "--seeds=3", "--out", tmp_path / "cartpole.png")
    late = [numbers(line.split("fifth")[1]) for line in output.splitlines() if "last fifth" in line]
    assert np.shape(late) == (2, 3)  # two optimizers, three seeds
    assert np.min(late) > 50  # pushing at random, it falls after 22 steps
    assert np.median(late[0]) > np.median(late[1])  # eps beside the root, as where the numbers come from
    assert_drawn(tmp_path / "cartpole.png")


@pytest.mark.slow
def test_wgan_covers_all_gaussians(tmp_path):
    output = run("wgan", "--updates=3000", "--out", tmp_path / "wgan.png")
    shares = numbers(re.search(r"12.5%:(.*)", output)[1])
    assert len(shares) == 8
    assert min(shares) > 2
    after, before = numbers(re.search(r"distance(.*)", output)[1])
    assert after < before / 2
    assert_drawn(tmp_path / "wgan.png")


@pytest.mark.slow
def test_nonstationary_short_and_long_memories_win_where_it_says(tmp_path):
    output = run("nonstationary", "--steps=3000", "--out", tmp_path / "nonstationary.png")
    error = {
        name: numbers(row)[::2]
        for name, row in re.findall(r"^(storms|steady|rare) +(.*)", output, re.MULTILINE)
    }
    assert np.all(np.diff(error["storms"]) > 0.03)  # with decay 0.9, 0.99, 0.999
    assert np.ptp(error["steady"]) < 0.01
    assert np.all(np.diff(error["rare"]) < -0.05)
    assert_drawn(tmp_path / "nonstationary.png")


@pytest.mark.slow
def test_finetune_bfloat16_with_a_key_follows_float32(tmp_path):
    output = run("finetune_bfloat16", "--steps=240", "--seeds=2", "--out", tmp_path / "finetune.png")
    row = r"^(float32|bfloat16, .*?)  +(\d\.\d\d) +(\d\.\d+) "
    found = {name: (float(size), float(loss)) for name, size, loss in re.findall(row, output, re.MULTILINE)}
    sizes, losses = np.array(list(found.values())).T
    # Of three kernels the means, biases whole: 0.13 bytes for each parameter.
    np.testing.assert_array_equal(sizes, [8, 3, 2.13, 3, 4])
    # The gradients are bfloat16, and the accumulator is right to 5%: 1.00 to 1.01 over five seeds.
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[3] > 1.5 * losses[0]
    assert_drawn(tmp_path / "finetune.png")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digits_cnn", "--epochs=0"], "argument --epochs: 0, expected 1 or more"),
        (["actor_critic", "--steps=9999"], "argument --steps: 9999, expected 10,000 or more"),
        (["wgan", "--clip=-1"], "argument --clip: -1, expected 0.0 or more"),
        (["nonstationary", "--steps=many"], "argument --steps: invalid int value: 'many'"),
        (["finetune_bfloat16", "--learning-rate=nan"], "argument --learning-rate: nan, expected 0.0 or more"),
    ],
)
def test_bad_options_are_named(args, message, capsys):
    with pytest.raises(SystemExit):
        run(*args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_example_is_in_the_gallery(path):
    """With its question, which its first line asks, and a picture that is quickly loaded."""
    gallery = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"({path.name})" in gallery
    assert path.read_text(encoding="utf-8").splitlines()[0].endswith("?")
    picture = EXAMPLES / "pictures" / f"{path.stem}.png"
    assert f"(pictures/{picture.name})" in gallery
    assert picture.stat().st_size < 150_000
    assert min(matplotlib.image.imread(picture).shape[:2]) > 300
