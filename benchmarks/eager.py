"""What does a step cost without `jax.jit`? Update and apply, leaf after leaf, from Python.

Leaves of 64, so that the time is that of Python and dispatch: 10 and 200 of them. Each side adds its updates
with its own package's `apply_updates`; "update" is without it. PyTorch, which always runs so, in a process of
its own.

Where `optax.rmsprop` dispatches one operation at a time, `rmsprop` has one jitted function per leaf for the
rule, one for the momentum and one for the addition; the multiplication by the learning rate is Optax's.
"""

import jax
import jax.numpy as jnp

from benchmarks._frame import installed, keep, markdown, parser, printed, spread
from benchmarks._steps import FEW_FORMS, FORMS, PACKAGES, gradients
from benchmarks.side_by_side import alternate, milliseconds, ratio
from benchmarks.torch_side import TorchProcess


class Eager:
    """A step that keeps its parameters and state."""

    def __init__(self, package, options, params):
        self.tx, self.add = package.rmsprop(1e-3, **options), package.apply_updates
        self.params, self.state = params, self.tx.init(params)
        self.grads = gradients(params)

    def update(self):
        updates, self.state = self.tx.update(self.grads, self.state, self.params)
        return updates, self.state

    def __call__(self):
        updates, _ = self.update()
        self.params = self.add(self.params, updates)
        return self.params, self.state


def compare(form, leaves, torch, rounds):
    options, params = FORMS[form], [jnp.full(64, 0.1)] * leaves
    steps = {name: Eager(package, options, params) for name, package in PACKAGES.items()}
    foreach = torch.step("torch foreach", [(64,)] * leaves, options, jax.default_backend())
    updates = {name: step.update for name, step in steps.items()}
    whole = alternate(steps | ({} if foreach is None else {"torch foreach": foreach}), rounds)
    update = alternate(updates, rounds)
    torch.clear()
    return {
        "leaves": leaves,
        "form": form,
        "milliseconds": {name: milliseconds(times) for name, times in whole.items()},
        "update_milliseconds": {name: milliseconds(times) for name, times in update.items()},
        "faster": ratio(whole["optax"], whole["ours"]),
        "update_faster": ratio(update["optax"], update["ours"]),
    }


def table(data):
    columns = ["leaves", "form", "Optax", "rmsprop_jax", "times faster (interquartile range)", "update alone"]
    rows = []
    for row in data["rows"]:
        ms = row["milliseconds"]
        torch = f"{ms['torch foreach']:.2f} ms" if "torch foreach" in ms else "not measured"
        times = f"{ms['optax']:.2f} ms", f"{ms['ours']:.2f} ms", spread(row["faster"], 1)
        rows.append((f"{row['leaves']}", row["form"], *times, f"{row['update_faster']['median']:.1f}", torch))
    return markdown([*columns, "PyTorch, foreach"], rows)


def line(row):
    ms = row["milliseconds"]
    return (
        f"{row['leaves']:6} {row['form']:19} {ms['optax']:9.3f} {ms['ours']:9.3f}   "
        f"{row['faster']['median']:.2f}, {row['update_faster']['median']:.2f}"
    )


def main(argv=None):
    options = parser("eager", __doc__, short="10 leaves, a few rounds, nothing kept")
    short = options.parse_args(argv).short
    rounds, counts = (20, (10,)) if short else (200, (10, 200))
    heading = f"{'':26} {'optax ms':>9} {'ours ms':>9}   times faster: step, update"
    with TorchProcess() as torch:
        cases = (compare(form, leaves, torch, rounds) for leaves in counts for form in FEW_FORMS)
        rows = printed(heading, cases, line)
    if not short:
        keep("eager", {"rounds": rounds, "rows": rows}, *installed("torch"))
