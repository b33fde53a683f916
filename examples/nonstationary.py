"""Which `decay` follows a moving target: a short memory or a long one?

A hidden level is to be followed through noisy readings, by gradient steps on (estimate - reading)^2 / 2,
one for each reading. The accumulator estimates how large these gradients are; what `decay` changes is how
long it remembers. Three worlds, in which each of 0.9, 0.99 and 0.999 has its own best learning rate:

    python nonstationary.py

- storms: the level wanders, and for 100 readings in 1,000 the noise is 30 times as large. Long after a storm
  a long memory still divides by it, and stands while the level walks away: a short one wins;
- steady: the level wanders, the noise stays as it is. The memory makes no difference;
- rare: the level is 1 for ever, but what is read is 0 and, one time in 50, 50. In between a short memory
  forgets that they are that large, cuts each down to the size of the others, and falls back towards the
  median, 0: a long one wins.

The picture: one of the 64 levels that are followed at once in each world, and the error for every rate.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rmsprop_jax import scale_by_rms

DECAYS = {0.9: "tab:blue", 0.99: "tab:orange", 0.999: "tab:green"}
RATES = np.geomspace(1e-4, 1, 25)
LEVELS = 64  # followed at once, each on its own


@partial(jax.jit, static_argnames="decay")
def follow(readings, decay):
    """Estimates [steps, rates, LEVELS], with every learning rate, from 0."""
    tx = scale_by_rms(decay, bias_correction=True)
    estimate = jnp.zeros((len(RATES), LEVELS))

    def step(carry, reading):
        estimate, state = carry
        update, state = tx.update(estimate - reading, state)
        estimate = estimate - RATES[:, None] * update
        return (estimate, state), estimate

    return jax.lax.scan(step, (estimate, tx.init(estimate)), readings)[1]


def worlds(steps, rng):
    """{name: (hidden level, reading)}, each [steps, LEVELS]."""
    shape = (steps, LEVELS)
    wandering = np.cumsum(rng.normal(size=shape), axis=0) * 0.03
    noise = rng.normal(size=shape) * 0.3
    stormy = np.arange(steps)[:, None] % 1000 >= 900
    rare = 50.0 * (rng.random(shape) < 1 / 50)
    return {
        "storms": (wandering, wandering + noise * np.where(stormy, 30, 1)),
        "steady": (wandering, wandering + noise),
        "rare": (np.ones(shape), rare),
    }


def errors_of(estimates, level):
    """Root mean square error for every rate, once the first quarter has settled."""
    late = len(level) // 4
    return np.sqrt(np.mean((estimates - level[:, None])[late:] ** 2, axis=(0, 2)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="readings of each level")
    parser.add_argument("--out", type=Path, default=Path("runs/nonstationary.png"), help="the picture")
    args = parser.parse_args()

    results = {}
    print("error (rms) with the best learning rate of each\n")
    print(f"{'':8}" + "".join(f"decay {decay:<14}" for decay in DECAYS))
    for name, (level, reading) in worlds(args.steps, np.random.default_rng(0)).items():
        runs = {decay: np.asarray(follow(jnp.asarray(reading, jnp.float32), decay)) for decay in DECAYS}
        runs = {decay: (estimates, errors_of(estimates, level)) for decay, estimates in runs.items()}
        cells = [f"{errors.min():.3f} ({RATES[errors.argmin()]:.3f})" for _, errors in runs.values()]
        print(f"{name:8}" + "".join(f"{cell:20}" for cell in cells).rstrip())
        results[name] = level, reading, runs
    draw(args.out, results)
    print(f"\nThe picture is {args.out}")


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, results):
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    panels = figure.subplots(2, 3).T
    for (above, below), (name, (level, reading, runs)) in zip(panels, results.items(), strict=True):
        begin = len(level) // 2000 * 1000 + 750
        shown = slice(begin, begin + 750)  # in it one storm
        time, place = np.arange(len(level))[shown], level[shown, 0]
        above.plot(time, reading[shown, 0], ".", color="0.7", ms=2, label="readings")
        above.plot(time, place, color="black", lw=2.5, label="level")
        for decay, (estimates, errors) in runs.items():
            best = errors.argmin()
            above.plot(time, estimates[shown, best, 0], color=DECAYS[decay], lw=1.2, label=f"decay {decay}")
            below.loglog(RATES, errors, color=DECAYS[decay])
            below.plot(RATES[best], errors[best], "o", color=DECAYS[decay])
        above.set(xlabel="reading", title=name, ylim=(place.min() - 1.2, place.max() + 1.2))
        below.set(xlabel="learning rate", ylim=(0.08, 2.5), yticks=(0.1, 0.2, 0.5, 1, 2))
        below.set_yticklabels(["0.1", "0.2", "0.5", "1", "2"])
    panels[0, 0].set(ylabel="one level, with the best rates")
    panels[0, 1].set(ylabel=f"error (rms) of {LEVELS} levels")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
