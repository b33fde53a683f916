"""What does `diagnostics.watch` cost? The training step of examples/char_rnn.py, with and without it.

A side makes ten updates in a call, and the watched one measures one of them.
"""

import numpy as np

from benchmarks._frame import example, keep, markdown, parser, spread
from benchmarks._steps import size
from benchmarks.side_by_side import alternate, milliseconds, ratio
from rmsprop_jax import diagnostics, rmsprop

EVERY = 10


class Trainer:
    """Ten training steps of the main job on random text, with this optimizer."""

    def __init__(self, tx, width, batch, window):
        from flax import nnx

        self.job = example("char_rnn")
        self.model = self.job.CharRNN(96, width, nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self.tokens = np.random.default_rng(0).integers(0, 96, (EVERY, batch, window + 1), np.int32)
        self.parameters = size(nnx.state(self.model, nnx.Param))

    def __call__(self):
        for tokens in self.tokens:
            loss = self.job.train_step(self.model, self.optimizer, tokens)
        return loss


def table(data):
    ms = data["milliseconds"]
    cells = f"{ms['without']:.1f} ms", f"{ms['watched']:.1f} ms", spread(data["ratio"], 3)
    return markdown(
        ["a step of the main job", "with `watch`, every 10", "ratio (interquartile range)"], [cells]
    )


def main(argv=None):
    options = parser("diagnostics", __doc__, short="a small network, a few rounds, nothing kept")
    short = options.parse_args(argv).short
    rounds, sizes = (3, (32, 4, 16)) if short else (60, (256, 32, 64))
    tx = rmsprop(1e-3, decay=0.99)
    sides = {
        "without": Trainer(tx, *sizes),
        "watched": Trainer(diagnostics.watch(tx, EVERY), *sizes),
    }
    seconds = alternate(sides, rounds)
    data = {
        "rounds": rounds,
        "parameters": sides["without"].parameters,
        "milliseconds": {name: milliseconds(times) / EVERY for name, times in seconds.items()},
        "ratio": ratio(seconds["watched"], seconds["without"]),
    }
    print(table(data))
    if not short:
        keep("diagnostics", data, "flax")
