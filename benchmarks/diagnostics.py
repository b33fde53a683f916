"""What does `diagnostics.watch` cost? The training step of examples/char_rnn.py, with and without it.

A side makes ten updates in a call, and the watched one measures one of them.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side_by_side import alternate, environment, milliseconds, ratio, save
from rmsprop_jax import diagnostics, rmsprop

EVERY = 10


def char_rnn():
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import char_rnn

    return char_rnn


class Trainer:
    """Ten training steps of the main job on random text, with this optimizer."""

    def __init__(self, tx, width, batch, window):
        from flax import nnx

        self.job = char_rnn()
        self.model = self.job.CharRNN(96, width, nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self.text = jnp.asarray(np.random.default_rng(0).integers(0, 96, 100_000))
        self.sizes = batch, window
        self.parameters = sum(x.size for x in jax.tree.leaves(nnx.state(self.model, nnx.Param)))

    def __call__(self):
        for step in range(EVERY):
            loss = self.job.train_step(
                self.model, self.optimizer, self.text, jax.random.key(0), step, *self.sizes
            )
        return loss


def table(data):
    """README's."""
    row, r = data["milliseconds"], data["ratio"]
    return (
        "| a step of the main job | with `watch`, every 10 | ratio, middle half |\n|---|---|---|\n"
        f"| {row['without']:.1f} ms | {row['watched']:.1f} ms "
        f"| {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f}) |"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks diagnostics", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--short", action="store_true", help="a small network, a few rounds, nothing kept")
    short = parser.parse_args(argv).short
    rounds, sizes = (3, (32, 4, 16)) if short else (60, (256, 32, 64))
    tx = rmsprop(1e-3, decay=0.99)
    sides = {
        "without": Trainer(tx, *sizes),
        "watched": Trainer(diagnostics.watch(tx, EVERY, decay=0.99), *sizes),
    }
    seconds = alternate(sides, rounds)
    data = {
        "environment": environment("flax"),
        "rounds": rounds,
        "parameters": sides["without"].parameters,
        "milliseconds": {name: milliseconds(times) / EVERY for name, times in seconds.items()},
        "ratio": ratio(seconds["watched"], seconds["without"]),
    }
    print(table(data))
    if not short:
        print(save("diagnostics", data))
