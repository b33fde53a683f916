"""What does a step cost without `jax.jit`? Update and apply, leaf after leaf, from Python.

Leaves of 64, so that the time is that of Python and dispatch: 10 and 200 of them. Each side adds its updates
with its own package's `apply_updates`; "update" is without it. PyTorch, which always runs so, in a process of
its own.

Where `optax.rmsprop` dispatches one operation at a time, `rmsprop` has one jitted function per leaf for the
rule, one for the momentum and one for the addition; the multiplication by the learning rate is Optax's.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from benchmarks.side_by_side import alternate, environment, installed, milliseconds, ratio, save
from benchmarks.torch_side import TorchProcess

FORMS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered, momentum": {"centered": True, "momentum": 0.9},
}
PACKAGES = {"optax": optax, "ours": rmsprop_jax}


class Eager:
    """A step that keeps its parameters and state."""

    def __init__(self, package, options, params):
        self.tx, self.add = package.rmsprop(1e-3, **options), package.apply_updates
        self.params, self.state = params, self.tx.init(params)
        self.grads = jax.tree.map(lambda p: 0.3 * p, params)

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
    lines = [
        "| leaves | form | Optax | rmsprop_jax | times faster, middle half | update alone "
        "| PyTorch, foreach |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        ms, r = row["milliseconds"], row["faster"]
        torch = f"{ms['torch foreach']:.2f} ms" if "torch foreach" in ms else "not measured"
        lines.append(
            f"| {row['leaves']} | {row['form']} | {ms['optax']:.2f} ms | {ms['ours']:.2f} ms "
            f"| {r['median']:.1f} ({r['low']:.1f} to {r['high']:.1f}) | {row['update_faster']['median']:.1f} "
            f"| {torch} |"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks eager", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="10 leaves, a few rounds, nothing kept")
    short = parser.parse_args(argv).short
    rounds = 20 if short else 200
    rows = []
    print(f"{'':26} {'optax ms':>9} {'ours ms':>9}   times faster: step, update")
    with TorchProcess() as torch:
        for leaves in (10,) if short else (10, 200):
            for form in FORMS:
                row = compare(form, leaves, torch, rounds)
                rows.append(row)
                ms = row["milliseconds"]
                print(
                    f"{leaves:6} {form:19} {ms['optax']:9.3f} {ms['ours']:9.3f}   "
                    f"{row['faster']['median']:.2f}, {row['update_faster']['median']:.2f}",
                    flush=True,
                )
    if not short:
        print(
            save("eager", {"environment": environment(*installed("torch")), "rounds": rounds, "rows": rows})
        )
