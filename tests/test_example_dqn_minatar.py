"""dqn_minatar.py: its game is MinAtar's, its update is PyTorch's, it learns, and it goes on exactly."""

import importlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pgx_minatar", reason="the examples' extra is not installed")

import jax
import jax.numpy as jnp
import optax
from shortened import assert_drawn, example, run, run_alone

from rmsprop_jax import interop


@pytest.fixture
def dqn_minatar():
    return example("dqn_minatar")


def test_ten_frames_are_minatars(dqn_minatar):
    """All of a game's are pgx's own promise."""
    minatar = pytest.importorskip("minatar", reason="MinAtar is not installed; see `make peers`")
    game = dqn_minatar.DQN("breakout", optax.sgd(0.0)).game
    state = jax.jit(game.init)(jax.random.key(0))
    theirs = minatar.Environment("breakout", sticky_action_prob=0.0).env
    theirs.random = SimpleNamespace(
        randint=lambda *_: int(state._ball_x) // 9
    )  # on which side the ball starts
    theirs.reset()
    step = jax.jit(game.step)
    for frame, action in enumerate([1, 1, 3, 3, 0, 1, 3, 3, 1, 1]):
        np.testing.assert_array_equal(theirs.state(), state.observation, err_msg=f"frame {frame}")
        state = step(state, jnp.int32(action), jax.random.key(frame))
        reward, ended = theirs.act(int(state._last_action))  # one in ten is the one before
        assert (reward, bool(ended)) == (state.rewards[0], state.terminated), f"frame {frame}"


@pytest.mark.slow
def test_an_update_is_pytorchs(dqn_minatar):
    """Ten updates on one batch, from the same weights."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; see `make peers`")
    pytest.importorskip("minatar", reason="MinAtar is not installed; see `make peers`")
    theirs = importlib.import_module("benchmarks.minatar_torch")
    channels, actions = 4, 6
    torch.manual_seed(0)
    model, target = theirs.network(channels, actions), theirs.network(channels, actions)
    # The target differs from the network, as it does between two of its renewals.
    dqn = dqn_minatar.DQN("breakout", dqn_minatar.OPTIMIZERS["conventions.torch"](2.5e-4))

    def ours(model):
        """The weights: patches are (row, column, channel), and so is what the hidden layer reads."""
        conv, conv_bias, hidden, hidden_bias, output, output_bias = model.state_dict().values()
        tensors = {
            "conv/kernel": conv.permute(2, 3, 1, 0).reshape(9 * channels, 16),
            "conv/bias": conv_bias,
            "hidden/kernel": hidden.reshape(128, 16, 8, 8).permute(2, 3, 1, 0).reshape(-1, 128),
            "hidden/bias": hidden_bias,
            "output/kernel": output.T,
            "output/bias": output_bias,
        }
        params = jax.eval_shape(lambda: dqn.start(0)).params
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        return interop.params_from(tensors, zeros, {name: name for name in tensors})

    rng = np.random.default_rng(0)
    batch = dqn_minatar.Transition(
        observation=rng.random((32, 10, 10, channels)) < 0.2,
        action=rng.integers(actions, size=32),
        reward=(rng.random(32) < 0.3).astype(np.float32),
        following=rng.random((32, 10, 10, channels)) < 0.2,
        ended=rng.random(32) < 0.2,
    )
    params, fixed = ours(model), ours(target)
    state, tx = dqn.tx.init(params), theirs.optimizer(model, 2.5e-4)
    as_torch = [torch.from_numpy(x) for x in batch]
    as_torch = dqn_minatar.Transition(*as_torch)._replace(
        observation=as_torch[0].permute(0, 3, 1, 2).float(), following=as_torch[3].permute(0, 3, 1, 2).float()
    )
    update = jax.jit(dqn.update)
    begin = params
    for _ in range(10):
        params, state = update(params, fixed, state, batch)
        theirs.update(model, target, tx, as_torch)
    for (path, p), q, p0 in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(ours(model)), jax.tree.leaves(begin), strict=True
    ):
        # Sums of float32 in another order: gradients of 1e-3 differ by 1e-9 or so, and eps = 0.01 damps that.
        np.testing.assert_allclose(p, q, atol=2e-6, err_msg=jax.tree_util.keystr(path))
        assert np.abs(p - p0).max() > 1e-4


# It learns after 400 frames, and the target network follows every 100.
SHORT = {"START": 400, "PERIOD": 100}


@pytest.fixture
def short(dqn_minatar, monkeypatch):
    for name, value in SHORT.items():
        monkeypatch.setattr(dqn_minatar, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_it_goes_on_exactly(tmp_path):
    """From what is saved on the way it plays the same episodes once more."""
    args = ["--every=600", "--seeds=2", "--out", tmp_path]
    run("dqn_minatar", *args, "--frames=1000")
    whole = json.loads((tmp_path / "returns.json").read_text())
    run("dqn_minatar", *args, "--frames=600")
    args.append("--frames=1000")
    output = run("dqn_minatar", *args, "--resume")
    assert "Continuing after frame 600" in output
    assert re.search(r"seed 1: \d+ episodes", output)
    assert json.loads((tmp_path / "returns.json").read_text())["episodes"] == whole["episodes"]
    assert whole["episodes"][0] != whole["episodes"][1]
    assert_drawn(tmp_path / "dqn_minatar.png")
    with pytest.raises(SystemExit, match="game is 'breakout', this run's is 'freeway'"):
        run("dqn_minatar", "--game=freeway", *args, "--resume")


# By frame 3,000 exploration is over.
SOON = f"""
vars(example).update({SHORT})
example.EPSILON = lambda frame: example.jnp.clip(1 - (frame - 1000) / 2000, 0.1, 1.0)
"""


@pytest.mark.slow
def test_it_learns_prints_and_draws(tmp_path):
    """6,000 frames bring returns far above the random policy's."""
    output = run_alone("dqn_minatar", tmp_path, "--frames=6000", "--seeds=2", change=SOON)
    assert re.search(r"seed 1: \d{3} episodes, mean return of the last 100 \d\.\d+", output)
    out = tmp_path / "runs" / "dqn_minatar"
    assert_drawn(out / "dqn_minatar.png")
    seeds = json.loads((out / "returns.json").read_text())["episodes"]
    ends, scores = np.concatenate([np.array(episodes) for episodes in seeds]).T
    # 0.5 and 2.6, the means of some 180 and 120 episodes.
    assert scores[ends > 4000].mean() > scores[ends <= 1000].mean() + 1


def test_mean_of_the_last_hundred(dqn_minatar):
    last_100 = dqn_minatar.last_100
    episodes = [(10 * i, float(i)) for i in range(1, 251)]
    np.testing.assert_array_equal(last_100(episodes, [5, 10, 25, 1000, 2500]), [np.nan, 1, 1.5, 50.5, 200.5])
    assert np.isnan(last_100([], 100))
