"""What does it do with noisy gradients, and what does `decay` change?

Two parameters: the gradients of A are large and change sign, those of B are small and steady. RMSProp gives
both steps of the same size, and A's steps cancel while B's add up:

    python noisy_gradients.py

prints the first steps of this textbook case and draws three pictures in one file:

- the accumulator with decay 0.9, 0.99 and 0.999 while the gradients' scale jumps up and down again: the
  longer its memory, the smoother the estimate, and the later it notices;
- the step that follows from it, relative to the learning rate;
- RMSProp, momentum and SGD in a narrow valley, where one direction is a hundred times as steep. RMSProp goes
  straight down it. With a constant learning rate it does not settle at the bottom: where gradients vanish,
  their root mean square vanishes too. Schedules that fall, as in char_rnn.py, are for this.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

from rmsprop_jax import rmsprop, scale_by_rms

GRADIENTS = {"A": [10.0, -8.0, 12.0, -9.0, 11.0], "B": [1.0, 1.0, 1.0, 1.0, 1.0]}
DECAYS = {0.9: "tab:blue", 0.99: "tab:orange", 0.999: "tab:green"}
CURVATURE = np.array([1.0, 100.0])
METHODS = {
    "SGD": (optax.sgd, "tab:red"),
    "momentum 0.9": (partial(optax.sgd, momentum=0.9), "tab:purple"),
    "rmsprop": (partial(rmsprop, decay=0.9), "tab:blue"),
}


def textbook_table():
    """The steps for GRADIENTS with learning rate 0.1: what is subtracted from each parameter."""
    tx = rmsprop(learning_rate=0.1, decay=0.9, eps=1e-8)
    params = {name: jnp.zeros(()) for name in GRADIENTS}
    state = tx.init(params)
    print("learning rate 0.1, decay 0.9, eps 1e-8; nu is the accumulator, step = 0.1 g / sqrt(nu + eps)\n")
    print("          A: large, noisy             B: small, steady")
    print(" t       g       nu     step         g       nu     step")
    for t in range(len(GRADIENTS["A"])):
        gradients = {name: jnp.asarray(values[t]) for name, values in GRADIENTS.items()}
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        nu = optax.tree.get(state, "nu")
        cells = [f"{gradients[name]:6.0f} {nu[name]:8.3f} {-updates[name]:8.3f}" for name in GRADIENTS]
        print(f"{t + 1:2}  {'     '.join(cells)}")
    totals = [f"{-params[name]:23.3f} " for name in GRADIENTS]
    print(f"sum {'    '.join(totals)}".rstrip())


def followed(gradients, decay):
    """Root of the accumulator and step / learning rate, each [time], for gradients [time]."""
    tx = scale_by_rms(decay, bias_correction=True)

    def update(state, gradient):
        step, state = tx.update(gradient, state)
        return state, (jnp.sqrt(state.nu / (1 - decay**state.count)), step)

    return jax.lax.scan(update, tx.init(gradients[0]), gradients)[1]


def height(x, y):
    """The valley."""
    return (CURVATURE[0] * x**2 + CURVATURE[1] * y**2) / 2


@partial(jax.jit, static_argnums=0)
def descend(make, rate):
    """The path, [61, 2], of 60 steps through the valley with the optimizer `make(rate)`."""
    tx, start = make(rate), jnp.array([-4.0, 1.0])

    def step(carry, _):
        place, state = carry
        updates, state = tx.update(CURVATURE * place, state, place)
        place = optax.apply_updates(place, updates)
        return (place, state), place

    _, path = jax.lax.scan(step, (start, tx.init(start)), length=60)
    return jnp.concatenate([start[None], path])


def best_descent(make):
    """Of the paths with learning rates from 0.001 to 1 the one that is lowest on average, with its rate."""
    rates = jnp.geomspace(1e-3, 1, 121)
    paths = jax.vmap(partial(descend, make))(rates)
    losses = height(paths[..., 0], paths[..., 1]).mean(axis=1)
    best = jnp.nanargmin(losses)
    return float(rates[best]), np.asarray(paths[best])


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    scales, steps, valley = figure.subplots(1, 3)

    scale = np.where((np.arange(3000) >= 1000) & (np.arange(3000) < 1500), 10.0, 1.0)
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=3000) * scale)
    scales.plot(scale, color="0.2", lw=1, ls="--", label="true scale")
    for decay, color in DECAYS.items():
        root, step = followed(gradients, decay)
        scales.plot(root, color=color, lw=1, label=f"decay {decay}")
        mean = np.sqrt(np.convolve(np.square(step), np.ones(50) / 50, "same"))
        steps.plot(mean, color=color, lw=1, label=f"decay {decay}")
    scales.set(yscale="log", xlabel="step", ylim=(0.3, 30), title="sqrt(nu): the scale of noisy gradients")
    steps.set(yscale="log", xlabel="step", ylim=(0.05, 12), title="Step / learning rate (RMS of 50)")

    x, y = np.meshgrid(np.linspace(-4.4, 1.4, 200), np.linspace(-1.3, 1.3, 200))
    valley.contour(x, y, height(x, y), levels=np.geomspace(0.05, 80, 9), colors="0.8", linewidths=0.8)
    print("\nThe narrow valley, 60 steps with the constant learning rate that makes their mean loss lowest:")
    for name, (make, color) in METHODS.items():
        rate, track = best_descent(make)
        print(f"    {name:13} rate {rate:6.4f}   last loss {height(*track[-1]):8.2e}")
        valley.plot(*track.T, ".-", ms=3, lw=1, color=color, label=f"{name}, {rate:.4f}")
        valley.plot(*track[-1], "o", ms=7, color=color)
    valley.plot(0, 0, "k*", ms=11)
    valley.set(title="A narrow valley: 60 steps, the dot is the last", xlim=(-4.4, 1.4), ylim=(-1.3, 1.3))
    for axes in (scales, steps, valley):
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/noisy_gradients.png"), help="the picture")
    args = parser.parse_args()
    textbook_table()
    draw(args.out)
    print(f"\nThe picture is {args.out}")


if __name__ == "__main__":
    main()
