"""Why does it not train, and what do I change?

`diagnostics.watch` around the optimizer measures every fifth update, and `diagnostics.advise` names what goes
wrong and says what to try. Three runs of a small convolutional network on scikit-learn's digits, each broken
on purpose:

    python troubles.py            about a minute on two cores

- a learning rate that is too large for normalised steps: the loss explodes;
- a first update that is ten times the learning rate, as the accumulator starts from zero: an unstable start;
- one bad batch, which an accumulator with a long memory does not forget: training stalls.

The run that follows the advice is drawn beside the broken one, with the figure that shows the trouble.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

from rmsprop_jax import diagnostics, rmsprop, warmup


class Trouble(NamedTuple):
    broken: optax.GradientTransformation
    mended: optax.GradientTransformation
    change: str
    figure: str  # the measurement that shows it
    bad_batch: int = -1  # the step whose gradients are 10,000 times too large


TROUBLES = {
    "the loss explodes": Trouble(
        rmsprop(0.3), rmsprop(0.005), change="learning rate 0.3 -> 0.005", figure="update_ratio"
    ),
    "unstable start": Trouble(
        rmsprop(0.015, decay=0.99),
        rmsprop(warmup(0.015, decay=0.99), decay=0.99),
        change="warmup(0.015, decay=0.99)",
        figure="update_ratio",
    ),
    "stale accumulator": Trouble(
        rmsprop(2e-4, decay=0.999),
        rmsprop(2e-4, decay=0.9),
        change="decay 0.999 -> 0.9",
        figure="staleness",
        bad_batch=5,
    ),
}


def run(tx, bad_batch, steps, data, bar, chunk=50):
    """Losses, and the history of what the optimizer did."""
    images, labels = data
    tx = diagnostics.watch(tx, every=5)

    def step(carry, t):
        params, state = carry
        batch = jax.random.randint(jax.random.fold_in(jax.random.key(1), t), (64,), 0, len(images))
        loss, grads = jax.value_and_grad(loss_fn)(params, images[batch], labels[batch])
        grads = optax.tree.scale(jnp.where(t == bad_batch, 1e4, 1.0), grads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    part = jax.jit(partial(jax.lax.scan, step), donate_argnums=0)
    params, losses = network(jax.random.key(0)), []
    carry = params, tx.init(params)
    for start in range(0, steps, chunk):
        carry, some = part(carry, jnp.arange(start, min(start + chunk, steps)))
        losses.extend(some.tolist())
        bar.set_postfix(loss=f"{losses[-1]:.3g}", refresh=False)
        bar.update(len(some))
    return np.array(losses), diagnostics.history(carry[1])


def network(key):
    def normal(key, *shape):
        return jax.random.normal(key, shape) * np.sqrt(2 / np.prod(shape[:-1]))

    keys = jax.random.split(key, 3)
    return {"conv_1": normal(keys[0], 3, 3, 1, 16), "conv_2": normal(keys[1], 3, 3, 16, 32),
            "bias": jnp.zeros(32), "head": normal(keys[2], 128, 10)}  # fmt: skip


def loss_fn(params, images, labels):
    def conv(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)

    x = jax.nn.relu(conv(images, params["conv_1"]))
    x = jax.nn.relu(conv(x, params["conv_2"]) + params["bias"])
    logits = x.reshape(len(x), -1) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_of_last_50(losses):
    return losses[-50:].mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/troubles.png"), help="the picture")
    args = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32), jnp.asarray(labels)
    runs = {}
    with tqdm(total=2 * len(TROUBLES) * args.steps, unit="step", dynamic_ncols=True) as bar:
        for name, trouble in TROUBLES.items():
            bar.set_description(name)
            both = [run(tx, trouble.bad_batch, args.steps, data, bar) for tx in trouble[:2]]
            runs[name] = trouble, *both
    for name, (trouble, (losses, history), (mended, after)) in runs.items():
        print(f"\n{name}\n")
        print(*diagnostics.advise(history, losses), sep="\n")
        left = diagnostics.advise(after, mended) or "nothing"
        highest, last = (f"{of(losses):.3g} -> {of(mended):.3g}" for of in (np.max, mean_of_last_50))
        print(f"\n{trouble.change}: highest loss {highest}, mean of the last 50 {last}; ", end="")
        print(f"advise now says {left}.")
    draw(args.out, runs)
    print(f"\nThe picture is {args.out}")


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, runs):
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    columns = figure.subplots(2, len(runs), sharex=True).T
    titles = {"update_ratio": "update / parameter", "staleness": "accumulator / gradient"}
    for (name, (trouble, *both)), (top, bottom) in zip(runs.items(), columns, strict=True):
        labels, colors = ("broken", trouble.change), ("tab:red", "tab:blue")
        for (losses, history), label, color in zip(both, labels, colors, strict=True):
            top.plot(np.arange(1, len(losses) + 1), losses, color=color, lw=1, label=label)
            layers = np.array(list(getattr(history, trouble.figure).values()))
            layers = np.where(np.isfinite(layers) & (layers > 0), layers, np.nan)
            bottom.plot(history.step, layers.T, color=color, lw=1, alpha=0.7)
        top.set(yscale="log", title=name[0].upper() + name[1:], ylabel="loss")
        top.legend()
        bottom.set(yscale="log", xlabel="step", ylabel=f"{titles[trouble.figure]}, each layer")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
