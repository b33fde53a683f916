"""Which learning rate, and which decay?

Eight of each make 64 pairs, and all are trained at once: `optax.inject_hyperparams` puts both numbers into
the optimizer's state, and `jax.vmap` trains 64 networks, each with a state of its own, on the same batches in
one compiled program. They learn to guess the next character of Python's documentation from the 16 before it:

    python sweep.py            two minutes on two cores

The picture is a map of the losses at the end, on text that no network has seen.
"""

import argparse
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from rmsprop_jax import rmsprop

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 0.016, 0.032, 0.064]
DECAYS = [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.997, 0.999]
CONTEXT, WIDTH, HIDDEN, BATCH = 16, 16, 128, 64


def logits(params, context):  # int [batch, CONTEXT]
    x = params["embed"][context].reshape(len(context), -1)
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["out"]


def loss_fn(params, windows):  # int [batch, CONTEXT + 1]
    out = logits(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(out, windows[:, -1]).mean()


def optimizer(steps):
    """The learning rate and the decay stand in its state; a factor falls from 1 to 0 for all."""
    rms = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(learning_rate=1e-3, decay=0.9)
    return optax.chain(rms, optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps)))


def start(tx, params, learning_rate, decay):
    return params, optax.tree.set(tx.init(params), learning_rate=learning_rate, decay=decay)


def train(tx, text, carry, steps):
    """These steps of one run, and its losses."""

    def step(carry, t):
        params, state = carry
        first = jax.random.randint(jax.random.key(t), (BATCH, 1), 0, len(text) - CONTEXT)
        loss, grads = jax.value_and_grad(loss_fn)(params, text[first + jnp.arange(CONTEXT + 1)])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, carry, steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep.png"), help="the picture")
    args = parser.parse_args()

    text = "".join(topics[name] for name in sorted(topics))
    alphabet, text = np.unique(np.array([*text]), return_inverse=True)
    text, unseen = jnp.split(jnp.asarray(text, jnp.int32), [len(text) * 9 // 10])
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": jax.random.normal(keys[0], (len(alphabet), WIDTH)),
        "hidden": jax.random.normal(keys[1], (CONTEXT * WIDTH, HIDDEN)) * (2 / (CONTEXT * WIDTH)) ** 0.5,
        "bias": jnp.zeros(HIDDEN),
        "out": jax.random.normal(keys[2], (HIDDEN, len(alphabet))) * HIDDEN**-0.5,
    }

    tx = optimizer(args.steps)
    rates, decays = (jnp.asarray(x, jnp.float32).ravel() for x in np.meshgrid(RATES, DECAYS))
    carry = jax.vmap(partial(start, tx, params))(rates, decays)
    part = jax.jit(jax.vmap(partial(train, tx, text), in_axes=(0, None)), donate_argnums=0)
    with tqdm(total=args.steps, unit="step", desc=f"{len(rates)} runs") as bar:
        for steps in np.array_split(np.arange(args.steps), 50):
            carry, losses = part(carry, steps)
            bar.set_postfix(best=f"{losses.mean(axis=1).min():.3f}", refresh=False)
            bar.update(len(steps))

    windows = unseen[jnp.arange(CONTEXT, len(unseen), 8)[:, None] + jnp.arange(-CONTEXT, 1)]
    loss = np.asarray(jax.jit(jax.vmap(loss_fn, in_axes=(0, None)))(carry[0], windows))
    loss = loss.reshape(len(DECAYS), len(RATES))
    print("Loss on unseen text, nats per character. The best learning rate of each decay:")
    for decay, row in zip(DECAYS, loss, strict=True):
        print(f"    decay {decay:<6g} learning rate {RATES[np.nanargmin(row)]:<6g} loss {np.nanmin(row):.3f}")
    draw(args.out, loss)
    print(f"The picture is {args.out}")


@matplotlib.rc_context({"xtick.bottom": False, "ytick.left": False})
def draw(path, loss):
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots()
    best = np.nanmin(loss)
    image = axes.imshow(loss, cmap="viridis_r", vmin=best, vmax=best + 1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(loss):
        is_best = value == np.nanmin(loss[row])
        weight, color = "bold" if is_best else "normal", "white" if value > best + 0.5 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, weight=weight)
    axes.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
    axes.set_yticks(range(len(DECAYS)), [f"{decay:g}" for decay in DECAYS])
    axes.set(xlabel="learning rate, at first", ylabel="decay")
    axes.set_title("Loss at the end of 64 runs, trained at once; bold: the best of its decay")
    figure.colorbar(image, label="nats per character", extend="max")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
