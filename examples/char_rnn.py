"""How do I train a recurrent network with it?

A GRU in Flax NNX learns to write Python's documentation, or a text of your own, character by character:

    python char_rnn.py                      about three minutes on two cores
    python char_rnn.py --text my_book.txt

Gradients are clipped, and the learning rate warms up over the memory of the accumulator, then falls along a
cosine. The picture sets the loss beside two references from the same text: the cross-entropy of guessing
each character from its frequency (unigram), and from its frequency after the one before it (bigram). A
second picture shows what the optimizer did to each layer; `diagnostics.advise` says what it sees in it.
"""

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import trange

from rmsprop_jax import diagnostics, rmsprop, warmup

LEARNING_RATE, DECAY, BATCH, WINDOW = 5e-3, 0.99, 32, 64
EVERY = 100  # steps between two validations


class CharRNN(nnx.Module):
    def __init__(self, alphabet_size, width, rngs):
        self.width = width
        self.embed = nnx.Embed(alphabet_size, width, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(width, width, rngs=rngs), return_carry=True, rngs=False)
        self.head = nnx.Linear(width, alphabet_size, rngs=rngs)

    def __call__(self, tokens, carry=None):
        """Logits of the character after each of `tokens`, int [batch, time], and the state to go on from."""
        if carry is None:
            carry = jnp.zeros((tokens.shape[0], self.width))
        carry, outputs = self.rnn(self.embed(tokens), initial_carry=carry)
        return self.head(outputs), carry


def optimizer_for(model, steps):
    """The optimizer, and the learning rate as a function of the step."""
    learning_rate = warmup(optax.cosine_decay_schedule(LEARNING_RATE, steps), decay=DECAY)
    rms = diagnostics.watch(rmsprop(learning_rate, decay=DECAY), every=10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), rms)
    return nnx.Optimizer(model, tx, wrt=nnx.Param), learning_rate


def cross_entropy(model, tokens):
    logits, _ = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, tokens):
    loss, grads = nnx.value_and_grad(cross_entropy)(model, tokens)
    optimizer.update(model, grads)
    return loss


# The job ----------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="file to learn from; by default Python's documentation")
    parser.add_argument("--steps", type=int, default=2500, help="updates")
    parser.add_argument("--width", type=int, default=256, help="of the embedding and of the GRU")
    parser.add_argument("--out", type=Path, default=Path("runs/char_rnn"), help="folder for the pictures")
    args = parser.parse_args()

    alphabet, train, valid = read_text(args.text)
    rows = min(64, max(1, len(valid) // 256))  # to validate on side by side
    valid_rows = valid[: len(valid) // rows * rows].reshape(rows, -1)
    validation_loss = nnx.jit(cross_entropy)

    model = CharRNN(len(alphabet), args.width, nnx.Rngs(0))
    optimizer, learning_rate = optimizer_for(model, args.steps)
    rates = np.asarray(jax.jit(learning_rate)(jnp.arange(args.steps)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{len(train):,} characters to learn from, {len(valid):,} to validate on, ", end="")
    print(f"{len(alphabet)} different ones; {parameters:,} parameters.", flush=True)

    rng, losses, valid_losses = np.random.default_rng(0), [], {}
    progress = trange(1, args.steps + 1, unit="step", smoothing=0.05, dynamic_ncols=True)
    for step in progress:
        starts = rng.integers(len(train) - WINDOW, size=(BATCH, 1))
        losses.append(float(train_step(model, optimizer, train[starts + np.arange(WINDOW + 1)])))
        if step % EVERY == 0 or step == args.steps:
            valid_losses[step] = float(validation_loss(model, valid_rows))
        latest = f"{list(valid_losses.values())[-1]:.3f}" if valid_losses else "-"
        rate = f"{rates[step - 1]:.1e}"
        progress.set_postfix(loss=f"{losses[-1]:.3f}", valid=latest, lr=rate, refresh=False)

    prompt = valid[:WINDOW]
    written = sample(model, prompt, length=800, temperature=0.7, key=jax.random.key(0))
    print(f"\nGiven {''.join(alphabet[prompt])!r},\nthe network goes on:\n")
    print("\n".join(f"    {line}" for line in "".join(alphabet[written]).split("\n")))
    losses_of = {**references(train, valid, len(alphabet)), "this network": valid_losses[args.steps]}
    print("\nCross-entropy of the validation text, lower is better:")
    for name, value in losses_of.items():
        print(f"    {name:13} {value:.3f} nats per character ({value / math.log(2):.3f} bits)")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "char_rnn.png", losses, valid_losses, losses_of, rates)
    measured = diagnostics.history(optimizer.opt_state)
    diagnostics.plot(measured, args.out / "diagnostics.png")
    findings = diagnostics.advise(measured, losses) or ["nothing to mend."]
    print("\nWhat the optimizer did, by diagnostics.advise:", *findings, sep="\n    ")
    print(f"\nThe pictures are {args.out / 'char_rnn.png'} and {args.out / 'diagnostics.png'}")


def read_text(path):
    """The alphabet, and indices into it: nine tenths of the text to learn from, the last to validate on."""
    if path is not None:
        text = path.read_text(encoding="utf-8")
    else:
        text = "".join(topics[name] for name in sorted(topics))
    alphabet, tokens = np.unique(np.array([*text]), return_inverse=True)
    return alphabet, *np.split(tokens.astype(np.int32), [len(tokens) * 9 // 10])


def references(train, valid, size):
    """Cross-entropies of guessing by frequencies in the training text, one count added for each character."""
    unigram = np.bincount(train, minlength=size) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((size, size))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    bigram = (pairs + unigram) / (pairs.sum(axis=1, keepdims=True) + 1)
    guessed = {"unigram": unigram[valid[1:]], "bigram": bigram[valid[:-1], valid[1:]]}
    return {name: float(-np.log(p).mean()) for name, p in guessed.items()}


def sample(model, prompt, length, temperature, key):
    """Continues the tokens of `prompt` by `length` more, each drawn from the network's distribution."""

    @nnx.jit
    def following(model, tokens, carry, key):
        logits, carry = model(tokens, carry)
        return jax.random.categorical(key, logits[:, -1:] / temperature), carry

    tokens, carry, written = jnp.asarray(prompt)[None], jnp.zeros((1, model.width)), []
    for step in range(length):
        tokens, carry = following(model, tokens, carry, jax.random.fold_in(key, step))
        written.append(int(tokens[0, 0]))
    return written


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, losses, valid_losses, losses_of, rates):
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    steps = np.arange(1, len(losses) + 1)
    means = [np.mean(part) for part in np.array_split(losses, len(valid_losses))]
    middles = [np.mean(part) for part in np.array_split(steps, len(valid_losses))]
    left.plot(steps, losses, color="tab:blue", alpha=0.2, lw=0.7)
    left.plot(middles, means, color="tab:blue", label="training")
    label = f"validation, at last {losses_of['this network']:.3f}"
    left.plot(*zip(*valid_losses.items(), strict=True), color="tab:orange", label=label)
    for name in ("unigram", "bigram"):
        left.axhline(losses_of[name], color="0.4", ls="--", lw=1)
        left.text(len(losses), losses_of[name] + 0.03, f"{name} {losses_of[name]:.3f}", ha="right")
    left.set(xlabel="step", ylabel="cross-entropy (nats per character)", title="Loss")
    left.legend()
    right.plot(steps, rates, color="tab:green")
    right.set(xlabel="step", title="Learning rate: warm-up, then cosine", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
