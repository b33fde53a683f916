"""Why does it not train, and what do I change?

Three runs of a small convolutional network on scikit-learn's digits, each broken on purpose:

    python examples/troubles.py            about a minute on two cores

- a learning rate that is too large for normalised steps: the loss explodes;
- a first update that is ten times the learning rate, as the accumulator starts from zero: an unstable start;
- one bad batch, which an accumulator with a long memory does not forget: training stalls.

`diagnostics.watch` measures every fifth update, `diagnostics.advise` names each trouble and says what to try,
and the run that follows the advice is drawn beside the broken one, with the figure that told.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _options import parser_for
from _pictures import save_figure
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

from rmsprop_jax import diagnostics, rmsprop, warmup


class Setting(NamedTuple):
    learning_rate: float
    decay: float
    warm_up: bool = False
    bad_batch: int = -1  # the step whose loss is 10,000 times too large


class Trouble(NamedTuple):
    broken: Setting
    mended: Setting
    change: str
    figure: str  # of the measurements, which tells


TROUBLES = {
    "the loss explodes": Trouble(
        Setting(0.3, 0.9), Setting(0.005, 0.9), "learning rate 0.3 -> 0.005", "update_ratio"
    ),
    "unstable start": Trouble(
        Setting(0.03, 0.99), Setting(0.03, 0.99, warm_up=True), "warmup(0.03, decay=0.99)", "update_ratio"
    ),
    "stale accumulator": Trouble(
        Setting(2e-4, 0.999, bad_batch=5),
        Setting(2e-4, 0.9, bad_batch=5),
        "decay 0.999 -> 0.9",
        "staleness",
    ),
}


def network(key):
    def normal(key, *shape):
        return jax.random.normal(key, shape) * np.sqrt(2 / np.prod(shape[:-1]))

    keys = jax.random.split(key, 3)
    return {"conv_1": normal(keys[0], 3, 3, 1, 16), "conv_2": normal(keys[1], 3, 3, 16, 32),
            "bias": jnp.zeros(32), "head": normal(keys[2], 128, 10)}  # fmt: skip


def loss_of(params, images, labels):
    def conv(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)

    x = jax.nn.relu(conv(images, params["conv_1"]))
    x = jax.nn.relu(conv(x, params["conv_2"]) + params["bias"])
    logits = x.reshape(len(x), -1) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, static_argnames=("setting", "steps"), donate_argnames=("params", "state"))
def train(params, state, images, labels, start, setting, steps):
    def step(carry, t):
        params, state = carry
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), t), (64,), 0, len(images))
        factor = jnp.where(t == setting.bad_batch, 1e4, 1.0)
        loss, grads = jax.value_and_grad(loss_of)(params, images[rows], labels[rows])
        updates, state = optimizer(setting).update(optax.tree.scale(factor, grads), state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), start + jnp.arange(steps))
    return params, state, losses


def optimizer(setting):
    rate = setting.learning_rate
    tx = rmsprop(warmup(rate, setting.decay) if setting.warm_up else rate, setting.decay)
    return diagnostics.watch(tx, every=5)


def run(setting, steps, data, bar, chunk=50):
    """Losses, and the history of what the optimizer did."""
    params = network(jax.random.key(0))
    state, losses = optimizer(setting).init(params), []
    for start in range(0, steps, chunk):
        params, state, some = train(params, state, *data, start, setting, min(chunk, steps - start))
        losses.extend(some.tolist())
        bar.set_postfix(loss=f"{losses[-1]:.3g}", refresh=False)
        bar.update(len(some))
    return np.array(losses), diagnostics.history(state)


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
        top.legend(frameon=False)
        bottom.set(yscale="log", xlabel="step", ylabel=f"{titles[trouble.figure]}, each layer")
    save_figure(figure, path)


def main(argv=None):
    parser = parser_for(__doc__, "troubles.png")
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    args = parser.parse_args(argv)
    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32), jnp.asarray(labels)
    runs = {}
    with tqdm(total=2 * len(TROUBLES) * args.steps, unit="step", dynamic_ncols=True) as bar:
        for name, trouble in TROUBLES.items():
            bar.set_description(name)
            runs[name] = (trouble, *(run(setting, args.steps, data, bar) for setting in trouble[:2]))
    for name, (trouble, (losses, history), (mended, after)) in runs.items():
        print(f"\n{name}: {trouble.broken}\n")
        print(*diagnostics.advise(history, losses), sep="\n")
        left = diagnostics.advise(after, mended) or "nothing"
        print(f"\n{trouble.change}: mean loss of the last 50 steps ", end="")
        print(f"{losses[-50:].mean():.3g} -> {mended[-50:].mean():.3g}; advise now says {left}.")
    draw(args.out, runs)
    print(f"\nThe picture is {args.out}")


if __name__ == "__main__":
    main()
