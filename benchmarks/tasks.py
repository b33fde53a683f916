"""Does it train better? Eight tasks with SGD, momentum, Adam, Adafactor, Optax's RMSProp, and this one.

digits: a convolutional network on scikit-learn's 8 x 8 digits. text: a recurrent network (GRU) predicts the
next character of Python's documentation. cancer, diabetes: a network on a table, for classes and for a
number. words: skip-gram vectors. cartpole: an actor-critic. drift: a regression whose optimum walks.
quadratic: two curvatures, noisy gradients.

Every method has 30 trials on each task: ten learning rates, a factor of 2 apart, with each decay of 0.9, 0.99
and 0.999 (Adam: b2), or each momentum of 0.5, 0.9 and 0.99, or Adafactor's exponent of 0.7, 0.8 and 0.9; SGD,
which has nothing else to tune, 30 rates over the same range. The adaptive methods share a range of rates; SGD
and momentum, whose steps are in other units, share another; Adafactor's, which are relative to the
parameters, are 4 times the adaptive ones'. This package's RMSProp comes plain, with its warm-up, and with a
factored accumulator; leaves are factored as in quality.py. The trial that is best by the mean of 3 to 20
seeds is run with five others. A seed draws the data held out, the first weights and the batches, the same for
all methods. The rate falls to 0 by a cosine, except on drift, where it is constant. A warm-up takes
2 / (1 - decay) steps, at most a quarter of the run. All else has its default.

    python -m benchmarks tasks                  all of them, the figures and a picture
    python -m benchmarks tasks --only digits    one, put among what is kept of the others
    python -m benchmarks tasks --short          three of them, one trial each, a few steps
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks._frame import environment, markdown, parser, save, save_picture, stored
from benchmarks._tasks import MAKE
from benchmarks.quality import SMALL, accumulator
from rmsprop_jax import rmsprop, warmup

OPTIMIZERS = {
    "SGD": lambda rate, _: optax.sgd(rate),
    "momentum": lambda rate, momentum: optax.sgd(rate, momentum),
    "Adam": lambda rate, b2: optax.adam(rate, b2=b2),
    "Adafactor": lambda rate, exponent: optax.adafactor(rate, SMALL, exponent),
    "optax.rmsprop": optax.rmsprop,
    "rmsprop": rmsprop,
    "rmsprop, factored": lambda rate, decay: rmsprop(rate, decay, accumulator=accumulator("factored")),
}
WARM = "rmsprop, warm-up"
METHODS = {  # color, line width and opacity: Optax's curve is broad, since this package's lies on it
    "SGD": ("0.5", 1.2, 1.0),
    "momentum": ("tab:purple", 1.2, 1.0),
    "Adam": ("tab:orange", 1.6, 1.0),
    "Adafactor": ("tab:red", 1.2, 1.0),
    "optax.rmsprop": ("tab:cyan", 5.0, 0.5),
    "rmsprop": ("tab:blue", 1.6, 1.0),
    WARM: ("tab:green", 1.6, 1.0),
    "rmsprop, factored": ("black", 1.2, 0.8),
}
PLAIN = {"SGD": (0.0,), "momentum": (0.5, 0.9, 0.99)}
EXPONENTS = (0.7, 0.8, 0.9)
DECAYS = (0.9, 0.99, 0.999)
TRIALS, SPAN = 30, 2**9  # the highest rate is SPAN times the lowest
POINTS = 25  # of each curve


class Plan(NamedTuple):
    measure: str
    steps: int
    adaptive: float = 2e-4  # the lowest of the rates
    plain: float = 1e-2  # the same for SGD and momentum
    cosine: bool = True
    higher: bool = False  # is better
    choosing: int = 3  # seeds
    last: int = 1  # so many of the curve's points are averaged for the score


PLANS = {
    "digits": Plan("cross-entropy", 300, choosing=5),
    "text": Plan("cross-entropy", 300, plain=5e-2),
    "cancer": Plan("cross-entropy", 200, choosing=20),
    "diabetes": Plan("error / variance", 200, adaptive=5e-5, plain=1e-3, choosing=20),
    "words": Plan("loss", 400, plain=1e-1),
    "cartpole": Plan("return", 500, higher=True, choosing=5, last=5),
    "drift": Plan("excess error", 2000, adaptive=1e-3, plain=1e-3, cosine=False, choosing=20, last=15),
    "quadratic": Plan("loss", 500, adaptive=5e-4, plain=2e-4, choosing=20),
}
SHORT = ("cancer", "cartpole", "drift")  # one of each kind


def trainer(task, steps):
    """A function of the optimizer's index, rates [n, steps], knobs [n] and seeds [m]: curves [n, m, POINTS].

    One program has all the optimizers, so that a task is compiled once for each n and m.
    """

    def train(index, rates, knob, seed):
        txs = [make(lambda count: rates[count], knob) for make in OPTIMIZERS.values()]

        def step(carry, key):
            params, states, world = carry
            grads, world = task.grads(params, world, key)

            def update(i):
                updates, state = txs[i].update(grads, states[i], params)
                return updates, (*states[:i], state, *states[i + 1 :])

            updates, states = jax.lax.switch(index, [partial(update, i) for i in range(len(txs))])
            return (optax.apply_updates(params, updates), states, world), None

        def part(carry, keys):
            carry, _ = jax.lax.scan(step, carry, keys)
            params, _, world = carry
            return carry, task.measure(params, world)

        key_start, key = jax.random.split(jax.random.key(seed))
        params, world = task.start(key_start)
        states = tuple(tx.init(params) for tx in txs)
        keys = jax.random.split(key, steps).reshape(POINTS, -1)
        _, curve = jax.lax.scan(part, (params, states, world), keys)
        return curve

    over_seeds = jax.vmap(train, (None, None, None, 0))
    return jax.jit(jax.vmap(over_seeds, (None, 0, 0, None)))


def trials(method, plan):
    """The (rate, knob) of each."""
    lowest, knobs = plan.adaptive, DECAYS
    if method in PLAIN:
        lowest, knobs = plan.plain, PLAIN[method]
    elif method == "Adafactor":
        lowest, knobs = 4 * plan.adaptive, EXPONENTS
    rates = lowest * np.geomspace(1, SPAN, TRIALS // len(knobs))
    return [(float(rate), knob) for knob in knobs for rate in rates]


def schedule(method, plan, knob):
    """The learning rate of each step, relative to its peak."""
    warm = min(round(2 / (1 - knob)), plan.steps // 4) if method == WARM else 0
    after = optax.cosine_decay_schedule(1.0, plan.steps - warm) if plan.cosine else 1.0
    return jax.vmap(warmup(after, steps=warm))(jnp.arange(plan.steps))


def scores(curves, plan):
    """What a run comes to; infinite, or minus infinite, where it diverged."""
    end = np.asarray(curves, float)[..., -plan.last :].mean(axis=-1)
    return np.where(np.isfinite(end), end, -np.inf if plan.higher else np.inf)


def compare(run, plan, method, short):
    """A method's row: its best trial, and how that trains."""
    index = list(OPTIMIZERS).index("rmsprop" if method == WARM else method)
    choosing, reporting = (
        (range(100, 102), range(2)) if short else (range(100, 100 + plan.choosing), range(5))
    )
    tried = trials(method, plan)[: 1 if short else None]
    schedules = {knob: schedule(method, plan, knob) for _, knob in tried}

    def curves(tried, seeds):
        rates, knobs = jnp.array(tried).T
        rates = rates[:, None] * jnp.stack([schedules[knob] for _, knob in tried])
        return np.asarray(run(index, rates, knobs, jnp.array(seeds)))

    by = scores(curves(tried, choosing), plan).mean(axis=1)
    rate, knob = best = tried[by.argmax() if plan.higher else by.argmin()]
    (reported,) = curves([best], reporting)
    rates = [rate for rate, _ in tried]
    return {
        "rate": rate,
        "knob": knob,
        "edge": rate in (min(rates), max(rates)),
        "tried": plainly(by),
        "scores": plainly(scores(reported, plan)),
        "mean": plainly(reported.mean(axis=0)),
        "low": plainly(reported.min(axis=0)),
        "high": plainly(reported.max(axis=0)),
    }


def plainly(values):
    """For JSON, which has no infinity."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def table(data):
    """Mean over the seeds, and their standard deviation; bold the best, italic as good."""
    rows = []
    for row in data["rows"]:
        scores = {name: np.array(method["scores"], float) for name, method in row["methods"].items()}
        plan = PLANS[row["task"]]
        best = (max if plan.higher else min)(scores.values(), key=np.mean)
        digits = [math.floor(math.log10(x)) for x in (abs(np.mean(best)), np.std(best, ddof=1))]
        digits = max(
            0, 2 - digits[0], -digits[1]
        )  # three of the mean, or as many as the deviation lets count
        cells = []
        for some in scores.values():
            mean, of_best = (f"{np.mean(x):.{digits}f}" for x in (some, best))
            mark = "**" if mean == of_best else "*" if as_good(some, best) else ""
            cells.append(f"{mark}{mean} ({np.std(some, ddof=1):.{digits}f}){mark}")
        rows.append((f"{row['task']}, {plan.measure}", *cells))
    return markdown(["task", *data["rows"][0]["methods"]], rows)


def as_good(some, best):
    """Whether the seeds' differences from the best could be chance: paired t-test, 5%, five seeds."""
    difference = some - best
    return abs(difference.mean()) <= 2.776 * difference.std(ddof=1) / math.sqrt(len(difference))


def draw(rows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(2, 4)
    for axes, row in zip(panels.flat, rows, strict=False):
        plan = PLANS[row["task"]]
        steps = np.linspace(0, plan.steps, POINTS + 1)[1:]
        curves = {
            name: [np.array(method[key], float) for key in ("mean", "low", "high")]
            for name, method in row["methods"].items()
        }
        for name, (mean, low, high) in curves.items():
            color, width, alpha = METHODS[name]
            axes.plot(steps, mean, color=color, lw=width, alpha=alpha, label=name)
            axes.fill_between(steps, low, high, color=color, alpha=0.08, lw=0)
        axes.set(title=f"{row['task']}: {plan.measure}", xlim=(0, plan.steps))
        if not plan.higher:  # without what explodes at first
            top = 1.2 * np.median([mean[0] for mean, _, _ in curves.values()])
            bottom = 0.95 * min(np.nanmin(low) for _, low, _ in curves.values())
            axes.set(ylim=(bottom, top), yscale="log" if top > 10 * bottom else "linear")
            axes.yaxis.set_major_formatter("{x:g}")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), frameon=False)
    return figure


def main(argv=None):
    options = parser("tasks", __doc__, short="three tasks, a few steps, nothing kept")
    options.add_argument("--only", choices=PLANS, nargs="+", help="put among what is kept")
    args = options.parse_args(argv)
    where = environment("scikit-learn")
    print(f"{'':10}{'':17}{'mean':>9} {'(std)':9}{'rate':>9}{'knob':>7}")
    names = args.only or (SHORT if args.short else PLANS)
    for name in tqdm(names, desc="tasks", leave=False, disable=None):
        plan = PLANS[name]._replace(steps=POINTS) if args.short else PLANS[name]
        task = MAKE[name]()
        run = trainer(task, plan.steps)
        methods = {}
        for method in tqdm(METHODS, desc=name, leave=False, disable=None):
            methods[method] = row = compare(run, plan, method, args.short)
            mean, std = np.mean(row["scores"]), np.std(row["scores"], ddof=1)
            edge = "  at the end of the rates" if row["edge"] and not args.short else ""
            tqdm.write(
                f"{name:10}{method:17}{mean:9.4g} ({std:.2g})".ljust(46)
                + f"{row['rate']:9.3g}{row['knob']:7}{edge}"
            )
        if not args.short:
            rows = with_kept({"task": name, "methods": methods}, where)
            save("tasks", {"environment": where, "points": POINTS, "rows": rows})
            save_picture("tasks", draw(rows))


def with_kept(row, where):
    """The row and those of the other tasks that are kept from the same environment, of the same methods."""
    data = stored("tasks")
    kept = data["rows"] if data is not None and data["environment"] == where else []
    rows = {some["task"]: some for some in (*kept, row) if some["methods"].keys() == row["methods"].keys()}
    return [rows[name] for name in PLANS if name in rows]
