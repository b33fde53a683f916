"""What is the optimizer's share of a whole training step, forward, backward and update, in Flax?

The recurrent network of `examples/char_rnn.py` and a small transformer, on windows of 64 characters. The
share is what a step takes beyond one that stops at the gradients, of the whole step; steps take turns. SGD is
the floor: it reads gradients and parameters and writes parameters.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from benchmarks.side_by_side import alternate, environment, installed, milliseconds, ratio, save

ALPHABET, WINDOW = 100, 64
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(1e-3),
    "optax": lambda: optax.rmsprop(1e-3),
    "ours": lambda: rmsprop_jax.rmsprop(1e-3),
}


def recurrent(scale):
    from flax import nnx

    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from char_rnn import CharRNN

    model = CharRNN(ALPHABET, 256 // scale, nnx.Rngs(0))
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


class Step:
    """A compiled training step with its own donated buffers; without an optimizer, of gradients."""

    def __init__(self, tx, loss, params, tokens):
        def step(kept, tokens):
            params, state = kept if tx is not None else (kept[0], None)
            value, grads = jax.value_and_grad(loss)(params, tokens)
            if tx is None:
                return (params, grads), value
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        # Without an optimizer the gradients of the step before are what the new ones are written into.
        params = jax.tree.map(jnp.copy, params)
        self.kept = params, jax.tree.map(jnp.zeros_like, params) if tx is None else tx.init(params)
        jitted = jax.jit(step, donate_argnums=0, keep_unused=True)
        self.tokens, self.compiled = tokens, jitted.lower(self.kept, tokens).compile()

    def __call__(self):
        self.kept, value = self.compiled(self.kept, self.tokens)
        return self.kept, value


def compare(network, rounds, scale):
    from flax import nnx

    make, batch = NETWORKS[network]
    model, logits = make(scale)
    definition, params, others = nnx.split(model, nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(0), (batch, WINDOW + 1), 0, ALPHABET)

    def loss(params, tokens):
        found = logits(nnx.merge(definition, params, others), tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:]).mean()

    sides = {"none": Step(None, loss, params, tokens)}
    sides |= {name: Step(make(), loss, params, tokens) for name, make in OPTIMIZERS.items()}
    seconds = alternate(sides, rounds)
    leaves = jax.tree.leaves(params)
    beyond = {
        name: [1 - without / step for step, without in zip(seconds[name], seconds["none"], strict=True)]
        for name in OPTIMIZERS
    }
    return {
        "network": network,
        "parameters": sum(leaf.size for leaf in leaves),
        "leaves": len(leaves),
        "milliseconds": {name: milliseconds(times) for name, times in seconds.items()},
        "share": {name: ratio(some, [1.0] * len(some)) for name, some in beyond.items()},
        "ratio": ratio(seconds["ours"], seconds["optax"]),
    }


def table(data):
    lines = [
        "| network | gradients alone | share of SGD | of `optax.rmsprop` | of `rmsprop` "
        "| whole step, ratio to Optax |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        shares = [f"{row['share'][name]['median']:.1%}" for name in OPTIMIZERS]
        r = row["ratio"]
        lines.append(
            f"| {row['network']}, {row['parameters'] / 1e6:.2f} million "
            f"| {row['milliseconds']['none']:.1f} ms | "
            + " | ".join(shares)
            + f" | {r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f}) |"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="narrow networks, a few rounds, nothing kept")
    short = parser.parse_args(argv).short
    if "flax" not in installed("flax"):
        print("Not measured: Flax is not installed.")
        return
    rounds, scale = (3, 8) if short else (150, 1)
    rows = []
    print(f"{'':19} {'none ms':>8} {'sgd':>8} {'optax':>8} {'ours':>8}   share: sgd, optax, ours")
    for network in NETWORKS:
        row = compare(network, rounds, scale)
        rows.append(row)
        shares = ", ".join(f"{row['share'][name]['median']:.1%}" for name in OPTIMIZERS)
        times = " ".join(f"{ms:8.2f}" for ms in row["milliseconds"].values())
        print(f"{network:19} {times}   {shares}", flush=True)
    if not short:
        print(save("train", {"environment": environment("flax"), "rounds": rounds, "rows": rows}))
