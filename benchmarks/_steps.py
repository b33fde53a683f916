"""The jitted training step that the benchmarks take, with its own donated buffers."""

import math
import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from benchmarks._program import Program
from benchmarks.side_by_side import built_twice

PACKAGES = {"optax": optax, "ours": rmsprop_jax}
FORMS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "centered, momentum": {"centered": True, "momentum": 0.9},
}
FEW_FORMS = ("plain", "momentum", "centered, momentum")  # without centred alone


class Step:
    """A side for `side_by_side.alternate`: a compiled step that keeps its parameters and state.

    step: (kept, *inputs) -> (kept, what else there is). The inputs are given once, or to every call.
    compile_s: seconds until it is compiled, in `stages` those of tracing, lowering and compiling.
    """

    def __init__(self, step, kept, *inputs):
        self.kept, self.inputs = kept, inputs
        _, self.compiled, self.stages = compiled(step, kept, *inputs)
        self.compile_s = sum(self.stages.values())

    def __call__(self, *inputs):
        self.kept, other = self.compiled(self.kept, *(inputs or self.inputs))
        return self.kept, other

    @property
    def temporary_bytes(self):
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def operations(self):
        return operations(self.compiled.as_text())


def compiled(step, kept, *inputs):
    """The lowered step, the compiled one, and the seconds of each stage."""
    jitted = jax.jit(step, donate_argnums=0, keep_unused=True)
    times = [time.perf_counter()]
    traced = jitted.trace(kept, *inputs)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    done = lowered.compile()
    times.append(time.perf_counter())
    stages = ("trace", "lower", "compile")
    return lowered, done, {name: times[i + 1] - times[i] for i, name in enumerate(stages)}


def update_and_apply(tx, add=optax.apply_updates):
    """The step of an optimizer, from gradients on."""

    def step(kept, grads):
        params, state = kept
        updates, state = tx.update(grads, state, params)
        return (add(params, updates), state), ()

    return step


def update_step(tx, params, state=None):
    """With gradients that stay the same: their values do not matter to the time."""
    kept = jax.tree.map(jnp.copy, params), tx.init(params) if state is None else state
    return Step(update_and_apply(tx), kept, gradients(params))


def gradients(params):
    return jax.tree.map(lambda p: 0.3 * p, params)


def both(params, **options):
    """Optax's RMSProp and this package's, built twice."""
    return built_twice(
        {
            name: partial(update_step, package.rmsprop(1e-3, **options), params)
            for name, package in PACKAGES.items()
        }
    )


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def operations(program):
    """How often each operation is in a compiled program's text, in its entry and in what that calls."""
    return dict(Program(program).kinds())


_FREE = "parameter|constant|tuple|get-tuple-element|bitcast|call|copy-done|async-done"


def kernels(operations):
    """How many of them do work: on a GPU each is a kernel, on a CPU a loop."""
    return sum(count for name, count in operations.items() if not re.fullmatch(_FREE, name))


def on_accelerator() -> bool:
    """Whether steps are queued for a device that works by itself."""
    return jax.default_backend() != "cpu"


def wider():
    """How many times as wide trees are on an accelerator, so that a step takes longer than to queue it: 3, or
    less where its memory is too small for four sides of 20 bytes per parameter and the streams."""
    stats = jax.devices()[0].memory_stats() if on_accelerator() else None
    return min(3, max(1, math.isqrt(int(stats["bytes_limit"] / 128 / 3e7)))) if stats else 1
