"""Could `nu` be stored in half a byte? In simulation: what 16 codes hold of it, and whether networks train.

A code is 0, or one of 15 numbers a factor apart, rounded up with a probability that is unbiased in nu, in its
root or in its logarithm. "4": a factor of 4, from 2^-32 to 2^-4, the same for all elements, so an rms from
1.5e-5 to 0.25. "row": the largest number is that of each row (the last axis), a power of the factor, so that
the others stay what they are when it changes: a factor of 2 reaches down to 1/128 of the row's largest rms.
What is below the smallest number is stored as that one.

Held: stored rms / exact rms, and the size of a step beside that of exact accumulators, mean and standard
deviation over elements and time. Gradients are normal; their scales lie within a factor of 4, over 6 orders
of magnitude within each row, and over 6 orders from row to row. A drop: how many steps it takes until the rms
is within a factor of 2 of gradients that became 100 times as small, as a multiple of the exact one's.

Trained: quality.py's tasks, rates and seeds, with `rmsprop`'s rule; the losses of float32 are its results.
Since steps of "4" are larger in the mean, float32 is trained with a learning rate 1.15 times as high, too.

    python -m benchmarks uint4                  goes on with what is stored of the same environment
    python -m benchmarks uint4 --seconds 500    begins nothing new after that time
    python -m benchmarks uint4 --short          one decay, a few steps, one task
"""

import math
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import quality
from benchmarks._frame import environment, markdown, parser, save, stored
from benchmarks.tasks import as_good
from rmsprop_jax import accumulators, rounding


class Codes(NamedTuple):
    octaves: float  # between two numbers
    unbiased: str  # "nu", "root", "log", or "step": between log and nu, so that steps are right in the mean
    top: float | None = -4  # log2 of the largest number; None: one for each row

    def store(self, nu, threshold):
        """The numbers that the codes stand for."""
        octaves = self.octaves
        low = jnp.floor(jnp.log2(jnp.maximum(nu, 1e-37)) / octaves)
        part = self.part(jnp.maximum(nu, 1e-37) / jnp.exp2(low * octaves))
        up = (threshold >> 8).astype(jnp.float32) * 2.0**-24 < part
        return jnp.where(
            nu == 0, 0, jnp.exp2(octaves * jnp.clip(low + up, self.largest(nu) - 14, self.largest(nu)))
        )

    def part(self, x):
        """The probability of rounding up a number x times the one below."""
        if self.unbiased == "log":
            return jnp.log2(x) / self.octaves
        if self.unbiased == "step":
            return sum(share * self._replace(unbiased=what).part(x) for what, share in _STEP.items())
        power = {"nu": 1, "root": 0.5}[self.unbiased]
        return (x**power - 1) / (2 ** (self.octaves * power) - 1)

    def largest(self, nu):
        if self.top is not None:
            return self.top / self.octaves
        row = nu.max(axis=-1, keepdims=True) if nu.ndim else nu
        return jnp.ceil(jnp.log2(jnp.maximum(row, 1e-30)) / self.octaves)


_STEP = {"log": 0.88, "nu": 0.12}  # for numbers a factor of 2 apart


class Uint8(NamedTuple):
    def store(self, nu, threshold):
        return accumulators.Uint8().decode(accumulators.Uint8().encode(nu, threshold))


VARIANTS = {
    "uint8": Uint8(),
    "4, nu": Codes(2, "nu"),
    "4, root": Codes(2, "root"),
    "4, log": Codes(2, "log"),
    "row, 4, root": Codes(2, "root", None),
    "row, 2, nu": Codes(1, "nu", None),
    "row, 2, log": Codes(1, "log", None),
    "row, 2, step": Codes(1, "step", None),
}
TRAINED = ("row, 2, step", "row, 2, log", "4, root")
FASTER = "float32, rate * 1.15"
DECAYS = quality.DECAYS


def averaged(nu, g, decay, codes, thresholds):
    """As in the package's rule: what is stored, and what the update is divided by."""
    now = (1 - decay) * jnp.square(g)
    nu = codes.store(decay * nu + now, thresholds)
    return nu, jnp.maximum(nu, now)


@partial(jax.jit, static_argnames=("codes", "steps", "last"))
def simulated(before, after, decay, codes, steps, last):
    """Gradients' scale is `before` for ten steps, then `after`: statistics of the last steps, rms of all."""

    def step(carry, t):
        nu, exact, sums = carry
        g = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), before.shape)
        g *= jnp.where(t < 10, before, after)
        nu, used = averaged(nu, g, decay, codes, rounding.thresholds(nu.shape, 0, t))
        exact = decay * exact + (1 - decay) * jnp.square(g)
        ratios = jnp.sqrt(nu / exact), jnp.sqrt(exact / used)
        moments = jnp.stack([x**power for x in ratios for power in (1, 2)])
        sums += jnp.where(t >= steps - last, moments, 0) / last
        return (nu, exact, sums), jnp.stack([jnp.median(jnp.sqrt(x) / after) for x in (nu, exact)])

    start = jnp.square(before)
    first = codes.store(start, rounding.thresholds(start.shape, 1, 0))
    carry, medians = jax.lax.scan(step, (first, start, jnp.zeros((4, *start.shape))), jnp.arange(steps))
    return carry[2].mean(axis=(1, 2)), medians


def held(codes, decay, short):
    rng, shape = np.random.default_rng(0), (4 if short else 16, 64)
    scales = {
        "alike": 2.0 ** rng.uniform(-8, -6, shape),
        "mixed": 10.0 ** rng.uniform(-6, 0, shape) / 16,
        "mixed by rows": 10.0 ** rng.uniform(-6, 0, (shape[0], 1)) / 16 * np.ones(shape),
    }
    horizon, row = round(1 / (1 - decay)), {}
    for name, scale in scales.items():
        scale = jnp.asarray(scale, jnp.float32)
        (rms, rms_sq, step, step_sq), _ = simulated(scale, scale, decay, codes, 12 * horizon, 6 * horizon)
        deviations = [math.sqrt(max(0.0, float(sq - x * x))) for x, sq in ((rms, rms_sq), (step, step_sq))]
        row[name] = {"rms": [float(rms), deviations[0]], "step": [float(step), deviations[1]]}
    scale = jnp.full(shape, 2.0**-7)
    _, medians = simulated(scale, scale / 100, decay, codes, 14 * horizon, 1)
    reached = np.asarray(medians)[11:] < 2
    steps = [int(x.argmax()) if x.any() else math.inf for x in reached.T]
    return {**row, "drop": steps[0] / steps[1] if math.isfinite(steps[0]) else None}


def rmsprop(codes, rate, decay):
    """`rmsprop_jax.rmsprop(rate, decay, bias_correction=True)` with such an accumulator."""

    def init(params):
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None):
        count, nu = state[0] + 1, jax.tree.leaves(state[1])
        leaves, treedef = jax.tree.flatten(grads)
        both = [
            averaged(old, g, decay, codes, rounding.thresholds(g.shape, leaf, count))
            for leaf, (old, g) in enumerate(zip(nu, leaves, strict=True))
        ]
        corrected = [used / (1 - decay**count) for _, used in both]
        updates = [g * jax.lax.rsqrt(x + 1e-8) for g, x in zip(leaves, corrected, strict=True)]
        return treedef.unflatten(updates), (count, treedef.unflatten([x for x, _ in both]))

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(rate))


def trained(task, decay, name, short):
    make, rate, steps, batch = quality.TASKS[task]
    optimizer = partial(rmsprop, VARIANTS[name]) if name != FASTER else quality.ours("float32")
    rate *= 1.15 if name == FASTER else 1
    setting, seeds = (optimizer, jnp.float32, False), 2 if short else 5
    return quality.final_losses(make(), rate, 10 if short else steps, batch, decay, setting, seeds)


def loss(row, name):
    """Mean and deviation, in italics where the seeds do not tell them from float32's."""
    if name not in row:
        return "-"
    alike = name != "float32" and as_good(np.array(row[name]), np.array(row["float32"]))
    return f"*{quality.mean_and_deviation(row[name])}*" if alike else quality.mean_and_deviation(row[name])


def table(data):
    """What is held by those that are trained, and how networks train."""
    kinds = ("alike", "mixed", "mixed by rows")
    columns = [f"{what}, {kind}" for kind in kinds for what in ("rms", "step")]
    held = []
    for decay, name in ((decay, name) for decay in DECAYS for name in ("uint8", *TRAINED)):
        if row := data["held"].get(f"{decay}; {name}"):
            cells = ("{:.2f} ({:.2f})".format(*row[kind][what]) for kind in kinds for what in ("rms", "step"))
            drop = "never" if row["drop"] is None else f"{row['drop']:.2f}"
            held.append((f"{decay}", name, *cells, drop))
    names = ("float32", *TRAINED, FASTER)
    losses = [
        (*key.split("; "), *(loss(row, name) for name in names)) for key, row in data["trained"].items()
    ]
    return "\n\n".join(
        [
            markdown(["decay", "codes", *columns, "drop"], held),
            markdown(["task", "decay", *names], losses),
        ]
    )


def main(argv=None):
    options = parser("uint4", __doc__, short="one decay, a few steps, one task, nothing kept")
    options.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after that time")
    args = options.parse_args(argv)
    ends, where = time.monotonic() + args.seconds, environment("scikit-learn")
    data = None if args.short else stored("uint4")
    if data is None or data["environment"] != where:
        data = {"environment": where, "held": {}, "trained": {}}
    tasks, decays = (("digits",), DECAYS[:1]) if args.short else (quality.TASKS, DECAYS)
    work = [(task, decay, name) for name in (*TRAINED, FASTER) for decay in decays for task in tasks]
    for row in stored("quality")["rows"]:
        data["trained"].setdefault(f"{row['task']}; {row['decay']}", {})["float32"] = row["losses"]["float32"]
    for decay, name in ((decay, name) for decay in decays for name in VARIANTS):
        if (key := f"{decay}; {name}") not in data["held"] and time.monotonic() < ends:
            data["held"][key] = row = held(VARIANTS[name], decay, args.short)
            print(
                f"{key:20}",
                *(f"{kind}: {row[kind]['step'][0]:.2f} " for kind in row if kind != "drop"),
                flush=True,
            )
    for task, decay, name in work:
        row = data["trained"].setdefault(f"{task}; {decay}", {})
        if name not in row and time.monotonic() < ends:
            row[name] = trained(task, decay, name, args.short)
            print(f"{task} {decay} {name:12} {quality.mean_and_deviation(row[name])}", flush=True)
            if not args.short:
                save("uint4", data)
    print(table(data))
    if not args.short:
        print(save("uint4", data))
