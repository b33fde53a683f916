"""What is the optimizer's share of a whole training step, forward, backward and update, in Flax?

The recurrent network of `examples/char_rnn.py` and a small transformer, on windows of 64 characters. The
share is what a step takes beyond one that stops at the gradients, of the whole step; steps take turns. SGD is
the floor: it reads gradients and parameters and writes parameters.
"""

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from benchmarks._frame import example, installed, keep, markdown, parser, printed, spread
from benchmarks._steps import Step, size
from benchmarks.side_by_side import alternate, milliseconds, ratio

ALPHABET, WINDOW = 100, 64
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(1e-3),
    "optax": lambda: optax.rmsprop(1e-3),
    "ours": lambda: rmsprop_jax.rmsprop(1e-3),
}


def recurrent(scale):
    from flax import nnx

    model = example("char_rnn").CharRNN(ALPHABET, 256 // scale, nnx.Rngs(0))
    return model, lambda model, tokens: model(tokens)[0]


def transformer(scale):
    from flax import nnx

    width, layers = 256 // scale, max(1, 4 // scale)
    rngs = nnx.Rngs(0)

    class Block(nnx.Module):
        def __init__(self):
            self.norm_1, self.norm_2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
            self.up, self.down = (
                nnx.Linear(width, 4 * width, rngs=rngs),
                nnx.Linear(4 * width, width, rngs=rngs),
            )

        def __call__(self, x):
            mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
            x = x + self.attention(self.norm_1(x), mask=mask)
            return x + self.down(jax.nn.gelu(self.up(self.norm_2(x))))

    class Transformer(nnx.Module):
        def __init__(self):
            self.embed, self.place = (nnx.Embed(n, width, rngs=rngs) for n in (ALPHABET, WINDOW))
            self.blocks = nnx.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, ALPHABET, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[1]))[None]
            return self.head(self.norm(self.blocks(x)))

    return Transformer(), lambda model, tokens: model(tokens)


NETWORKS = {"recurrent network": (recurrent, 32), "transformer": (transformer, 8)}  # and windows in a batch


def training_step(tx, loss, params, tokens):
    """Forward, backward and update; without an optimizer, it stops at the gradients."""

    def step(kept, tokens):
        params, state = kept
        value, grads = jax.value_and_grad(loss)(params, tokens)
        if tx is None:
            return (params, grads), value
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    # Without an optimizer the gradients of the step before are what the new ones are written into.
    params = jax.tree.map(jnp.copy, params)
    state = jax.tree.map(jnp.zeros_like, params) if tx is None else tx.init(params)
    return Step(step, (params, state), tokens)


def compare(network, rounds, scale):
    from flax import nnx

    make, batch = NETWORKS[network]
    model, logits = make(scale)
    definition, params, others = nnx.split(model, nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(0), (batch, WINDOW + 1), 0, ALPHABET)

    def loss(params, tokens):
        found = logits(nnx.merge(definition, params, others), tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:]).mean()

    sides = {"none": training_step(None, loss, params, tokens)}
    sides |= {name: training_step(make(), loss, params, tokens) for name, make in OPTIMIZERS.items()}
    seconds = alternate(sides, rounds)
    beyond = {
        name: [1 - without / step for step, without in zip(seconds[name], seconds["none"], strict=True)]
        for name in OPTIMIZERS
    }
    return {
        "network": network,
        "parameters": size(params),
        "leaves": len(jax.tree.leaves(params)),
        "milliseconds": {name: milliseconds(times) for name, times in seconds.items()},
        "share": {name: ratio(some, [1.0] * len(some)) for name, some in beyond.items()},
        "ratio": ratio(seconds["ours"], seconds["optax"]),
    }


def table(data):
    columns = ["network", "gradients alone", "share of SGD", "of `optax.rmsprop`", "of `rmsprop`"]
    rows = []
    for row in data["rows"]:
        network = f"{row['network']}, {row['parameters'] / 1e6:.2f} million"
        alone = f"{row['milliseconds']['none']:.1f} ms"
        rows.append((network, alone, *shares(row), spread(row["ratio"])))
    return markdown([*columns, "whole step, ratio to Optax"], rows)


def shares(row):
    return [f"{row['share'][name]['median']:.1%}" for name in OPTIMIZERS]


def line(row):
    times = " ".join(f"{ms:8.2f}" for ms in row["milliseconds"].values())
    return f"{row['network']:19} {times}   {', '.join(shares(row))}"


def main(argv=None):
    options = parser("train", __doc__, short="narrow networks, a few rounds, nothing kept")
    short = options.parse_args(argv).short
    if not installed("flax"):
        print("Not measured: Flax is not installed.")
        return
    rounds, scale = (3, 8) if short else (150, 1)
    heading = f"{'':19} {'none ms':>8} {'sgd':>8} {'optax':>8} {'ours':>8}   share: sgd, optax, ours"
    rows = printed(heading, (compare(network, rounds, scale) for network in NETWORKS), line)
    if not short:
        keep("train", {"rounds": rounds, "rows": rows}, "flax")
