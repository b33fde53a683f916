"""How do I train a recurrent network with it?

A character-level GRU learns to write Python's documentation, or a text of your own:

    python examples/char_rnn.py                      about three minutes on two cores
    python examples/char_rnn.py --resume             after Ctrl-C: continues where it stopped, exactly
    python examples/char_rnn.py --text my_book.txt
    python examples/char_rnn.py --compare            SGD, momentum and RMSProp side by side

The optimizer is the chain in `optimizer_for`: clipping, then RMSProp, whose learning rate warms up over the
memory of its accumulator and falls along a cosine. The picture sets the loss beside two references from the
same text: the cross-entropy of guessing each character from its frequency (unigram), and from its frequency
after the character before it (bigram). Both are counted on the training text, as the network is trained. A
second picture shows what the optimizer did to each layer; `diagnostics.advise` says what it sees in it.
"""

import json
import math
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _checkpoints import open_checkpoints, restore, save, settings_of, signals_collected
from _options import at_least, decay, parser_for_text, positive
from _pictures import draw_comparison, draw_run, final
from _text import read_text
from flax import nnx
from tqdm import tqdm

from rmsprop_jax import diagnostics, rmsprop, warmup

# The network and its training -------------------------------------------------------------------------


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


def optimizer_for(args, model):
    """The optimizer, and its learning rate at every step."""
    schedule = warmup(optax.cosine_decay_schedule(args.learning_rate, args.steps), decay=args.decay)
    rms = diagnostics.watch(rmsprop(schedule, decay=args.decay), every=10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), rms)
    return nnx.Optimizer(model, tx, wrt=nnx.Param), np.asarray(jax.jit(schedule)(jnp.arange(args.steps)))


def cross_entropy(model, tokens):
    logits, _ = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit(static_argnames=("batch", "window"), donate_argnames=("model", "optimizer"))
def train_step(model, optimizer, text, key, step, batch, window):
    """One update on `batch` windows of the text. Which ones is a function of (key, step) and nothing else."""
    starts = jax.random.randint(jax.random.fold_in(key, step), (batch, 1), 0, len(text) - window)
    tokens = text[starts + jnp.arange(window + 1)]
    loss, gradients = nnx.value_and_grad(cross_entropy)(model, tokens)
    optimizer.update(model, gradients)
    return loss


validation_loss = nnx.jit(cross_entropy)


def in_rows(tokens, most=64):
    """The tokens as rows, at most `most` and each at least 256 long, to evaluate side by side."""
    rows = min(most, max(1, len(tokens) // 256))
    return jnp.asarray(tokens[: len(tokens) // rows * rows].reshape(rows, -1))


@nnx.jit
def next_token(model, tokens, carry, key, temperature):
    logits, carry = model(tokens, carry)
    return jax.random.categorical(key, logits[:, -1:] / temperature), carry


def sample(model, prompt, length, temperature, key):
    """Continues the tokens of `prompt` by `length` more, each drawn from the network's distribution."""
    tokens, carry = jnp.asarray(prompt)[None], jnp.zeros((1, model.width))
    written = []
    for step in range(length):
        tokens, carry = next_token(model, tokens, carry, jax.random.fold_in(key, step), temperature)
        written.append(int(tokens[0, 0]))
    return written


# The main job -----------------------------------------------------------------------------------------


def train(args):
    text = read_text(args.text, args.window)
    model = CharRNN(len(text.alphabet), args.width, nnx.Rngs(args.seed))
    optimizer, rates = optimizer_for(args, model)
    key = jax.random.key(args.seed)
    train_text, valid_rows = jnp.asarray(text.train), in_rows(text.valid)

    settings = settings_of(args, text)
    manager, start = open_checkpoints(args.out / "checkpoints", args.resume)
    history = {"train": [], "valid": [], "seconds": 0.0}
    if args.resume:
        state, history = restore(manager, start, nnx.state((model, optimizer)), settings)
        nnx.update((model, optimizer), state)
        print(f"Continuing after step {start:,}.")

    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{len(text.train):,} characters to learn from, {len(text.valid):,} to validate on, ", end="")
    print(f"{len(text.alphabet)} different ones; {parameters:,} parameters.", flush=True)

    before, begun = history["seconds"], time.perf_counter()
    with (
        signals_collected(signal.SIGINT, signal.SIGTERM) as received,
        tqdm(total=args.steps, initial=start, unit="step", smoothing=0.05, dynamic_ncols=True) as bar,
    ):
        for step in range(start, args.steps):
            loss = train_step(model, optimizer, train_text, key, step, args.batch, args.window).item()
            if not math.isfinite(loss):
                sys.exit(f"The loss is {loss} at step {step + 1}. Lower --learning-rate.")
            history["train"].append(loss)
            done, stop = step + 1, list(received)
            last = done == args.steps
            if done % args.every == 0 or last:
                history["valid"].append([done, validation_loss(model, valid_rows).item()])
            history["seconds"] = before + time.perf_counter() - begun
            if done % args.every == 0 or last or stop:
                save(manager, done, nnx.state((model, optimizer)), settings, history)
            valid = f"{history['valid'][-1][1]:.3f}" if history["valid"] else "-"
            bar.set_postfix(loss=f"{loss:.3f}", valid=valid, lr=f"{rates[step]:.1e}", refresh=False)
            bar.update()
            if stop and not last:
                bar.close()
                print(f"Stopped after step {done:,}, and saved: the same command with --resume continues.")
                sys.exit(128 + stop[0])

    loss = history["valid"][-1][1]
    picture = args.out / "char_rnn.png"
    draw_run(picture, text, history, rates)
    prompt = text.valid[: args.window]
    written = sample(model, prompt, args.sample, args.temperature, jax.random.fold_in(key, args.steps))
    prompt, written = ("".join(text.alphabet[i] for i in tokens) for tokens in (prompt, written))
    print(f"\nGiven {prompt!r},\nthe network goes on (temperature {args.temperature:g}):\n")
    print("\n".join(f"    {line}" for line in written.split("\n")))
    print("\nCross-entropy of the validation text, lower is better:")
    for name, value in (("unigram", text.unigram), ("bigram", text.bigram), ("this network", loss)):
        print(f"    {name:13} {value:.3f} nats per character ({value / math.log(2):.3f} bits)")
    measured = diagnostics.history(optimizer.opt_state)
    diagnostics.plot(measured, args.out / "diagnostics.png")
    findings = diagnostics.advise(measured, history["train"])
    print("\nWhat the optimizer did, by diagnostics.advise:", *findings or ["nothing to mend."], sep="\n    ")
    print(
        f"\n{args.steps:,} steps in {history['seconds']:.0f} s; the pictures are {picture}, diagnostics.png"
    )


# The comparison ---------------------------------------------------------------------------------------


def methods(args):
    """Per method the optimizer as a function of its peak learning rate, and the rates to try."""

    def cosine(rate):
        return optax.cosine_decay_schedule(rate, args.steps)

    rms_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    return {
        "SGD": (lambda rate: optax.sgd(cosine(rate)), (1.0, 3.0, 10.0, 30.0)),
        "momentum 0.9": (lambda rate: optax.sgd(cosine(rate), momentum=0.9), (0.3, 1.0, 3.0, 10.0)),
        "optax.rmsprop": (lambda rate: optax.rmsprop(cosine(rate), args.decay), rms_rates),
        "rmsprop": (lambda rate: rmsprop(cosine(rate), args.decay), rms_rates),
        "rmsprop, warm-up": (lambda rate: rmsprop(warmup(cosine(rate), args.decay), args.decay), rms_rates),
    }


def compare(args):
    """Every method with each of its learning rates, from the same parameters and on the same batches."""
    text = read_text(args.text, args.window)
    train_text, valid_rows = jnp.asarray(text.train), in_rows(text.valid)
    key = jax.random.key(args.seed)
    table = methods(args)
    results = {name: {} for name in table}  # method -> rate -> (training losses, [(step, validation loss)])
    total = sum(len(rates) for _, rates in table.values()) * args.steps
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for name, (method, rates) in table.items():
            # The rate is a number in the state, so that a method is compiled once for all of its rates.
            method = optax.inject_hyperparams(method)(rate=rates[0])
            tx = optax.chain(optax.clip_by_global_norm(1.0), method)
            for rate in rates:
                bar.set_description(f"{name}, {rate:g}")
                model = CharRNN(len(text.alphabet), args.width, nnx.Rngs(args.seed))
                optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
                optimizer.opt_state[1].hyperparams["rate"][...] = rate
                losses, valid = results[name][rate] = [], []
                for step in range(args.steps):
                    loss = train_step(model, optimizer, train_text, key, step, args.batch, args.window).item()
                    losses.append(loss)
                    if (step + 1) % args.every == 0 or step + 1 == args.steps:
                        valid.append((step + 1, validation_loss(model, valid_rows).item()))
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()

    best = {name: min(runs, key=lambda rate: final(runs[rate])) for name, runs in results.items()}
    print(f"\n{args.steps} steps each, nats per character. The rate with the lowest validation loss, and the")
    print(f"losses with it (training: mean of {args.every} steps). Of the same validation text: ", end="")
    print(f"unigram {text.unigram:.3f}, bigram {text.bigram:.3f}.\n")
    print(f"{'':17} {'rate':>5}  training  validation   validation with every rate")
    for name, runs in results.items():
        training, validation = np.mean(runs[best[name]][0][-args.every :]), final(runs[best[name]])
        print(f"{name:17} {best[name]:5g}  {training:8.3f}  {validation:10.3f}   ", end="")
        print("  ".join(f"{rate:g}: {final(run):.2f}" for rate, run in runs.items()))
    draw_comparison(args.out / "compare.png", text, results, best)
    record = {name: {str(rate): run for rate, run in runs.items()} for name, runs in results.items()}
    (args.out / "compare.json").write_text(json.dumps(record))
    print(f"\nThe picture is {args.out / 'compare.png'}, every loss is in {args.out / 'compare.json'}")


def main(argv=None):
    parser = parser_for_text(__doc__, "char_rnn", "folder for checkpoints and pictures", width=256)
    add = parser.add_argument
    add(
        "--compare",
        action="store_true",
        help="five optimizers, four learning rates each: six to eight minutes",
    )
    add("--steps", type=at_least(1), help="updates; None: 2500, or 250 each with --compare")
    add("--every", type=at_least(1), help="steps between checkpoints; None: 100, or 25 with --compare")
    add("--decay", type=decay, help="of the accumulator, in [0, 1); None: 0.99, or 0.95 with --compare")
    add("--batch", type=at_least(1), default=32, help="windows per update")
    add("--sample", type=at_least(1), default=800, help="characters to write at the end")
    add("--temperature", type=positive, default=0.7, help="of what is written: lower is safer")
    add("--seed", type=int, default=0, help="of the parameters, the batches and the sample")
    args = parser.parse_args(argv)
    if args.compare and args.resume:
        parser.error("--resume continues a training run; --compare has none to continue.")
    args.steps = args.steps or (250 if args.compare else 2500)
    if args.decay is None:  # the memory of 0.99, and its warm-up of 200 steps, is long for a comparison
        args.decay = 0.95 if args.compare else 0.99
    args.every = args.every or (25 if args.compare else 100)
    args.out.mkdir(parents=True, exist_ok=True)
    (compare if args.compare else train)(args)


if __name__ == "__main__":
    main()
