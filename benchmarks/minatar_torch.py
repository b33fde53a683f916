"""The agent of examples/dqn_minatar.py in PyTorch, on MinAtar's own games: what `minatar` compares with.

python -m benchmarks.minatar_torch --game breakout --step-size 0.00195 --frames 200000 --seeds 2 --out FILE
"""

import argparse
import json
import time
from pathlib import Path

import minatar
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks._frame import example

dqn = example("dqn_minatar")


def network(channels: int, actions: int) -> nn.Module:
    """Observations come as (batch, channels, 10, 10)."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, actions)),
    )


def optimizer(model: nn.Module, step_size: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=step_size, alpha=0.95, eps=0.01, centered=True)


def update(model, target, tx, batch) -> None:
    """One update on a `Transition` of tensors."""
    with torch.no_grad():
        worth = target(batch.following).max(dim=1).values * ~batch.ended
    chosen = model(batch.observation).gather(1, batch.action[:, None])[:, 0]
    tx.zero_grad()
    nn.functional.smooth_l1_loss(chosen, batch.reward + dqn.DISCOUNT * worth).backward()
    tx.step()


def train(name: str, step_size: float, frames: int, seed: int) -> list[tuple[int, float]]:
    """Each episode's last frame and return."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    game = minatar.Environment(name)
    game.seed(seed)
    game.reset()
    channels = game.state_shape()[2]
    model, target = (network(channels, game.num_actions()) for _ in range(2))
    target.load_state_dict(model.state_dict())
    tx = optimizer(model, step_size)

    def buffer(dtype, *shape):
        return torch.zeros((dqn.REPLAY, *shape), dtype=dtype)

    replay = dqn.Transition(
        observation=buffer(torch.bool, channels, 10, 10),
        action=buffer(torch.int64),
        reward=buffer(torch.float32),
        following=buffer(torch.bool, channels, 10, 10),
        ended=buffer(torch.bool),
    )

    def observation():
        return torch.from_numpy(game.state()).permute(2, 0, 1)

    epsilon = np.asarray(dqn.EPSILON(np.arange(frames)))
    episodes, score, seen = [], 0.0, observation()
    for frame in tqdm(range(frames), unit="frame", unit_scale=True, mininterval=5):
        if rng.random() < epsilon[frame]:
            action = int(rng.integers(game.num_actions()))
        else:
            with torch.no_grad():
                action = int(model(seen[None].float()).argmax())
        reward, ended = game.act(action)
        following = observation()
        for part, x in zip(replay, (seen, action, reward, following, ended), strict=True):
            part[frame % dqn.REPLAY] = x
        seen, score = following, score + reward
        if ended:
            episodes.append((frame + 1, score))
            game.reset()
            seen, score = observation(), 0.0
        if frame >= dqn.START:
            drawn = torch.from_numpy(rng.integers(min(frame + 1, dqn.REPLAY), size=dqn.BATCH))
            batch = dqn.Transition(*(part[drawn] for part in replay))
            batch = batch._replace(observation=batch.observation.float(), following=batch.following.float())
            update(model, target, tx, batch)
        if (frame + 1) % dqn.PERIOD == 0:
            target.load_state_dict(model.state_dict())
    return episodes


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--game", choices=dqn.PUBLISHED, default="breakout")
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--step-size", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the network is small
    begun = time.perf_counter()
    episodes = [train(args.game, args.step_size, args.frames, seed) for seed in range(args.seeds)]
    seconds = time.perf_counter() - begun
    about = {"game": args.game, "optimizer": "torch.optim.RMSprop", "step_size": args.step_size}
    done = {"seeds": args.seeds, "frames": args.frames, "episodes": episodes, "seconds": seconds}
    args.out.write_text(json.dumps(about | done))


if __name__ == "__main__":
    main()
