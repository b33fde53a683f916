"""Step by step against `optax.rmsprop`, and Optax's own tests with this package in its place."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import quick

import rmsprop_jax

STEPS = 100
# Rounding: some units of the last place (6e-8, 1e-16) per update, summed over 100 steps.
RTOL = {"float32": 5e-6, "float64": 1e-14}
SCHEDULES = {
    "constant": 1e-2,
    "schedule": optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, 100),
}


def gradients(dtype, steps=STEPS):
    """Gradients over eight decades, with exact zeros: they depend on the step, not on the parameters."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        scale = 10.0 ** rng.uniform(-4, 4, size=(3, 5))
        sparse = rng.normal(size=7) * (rng.random(7) < 0.2)
        yield {
            "dense": np.asarray(rng.normal(size=(3, 5)) * scale, dtype),
            "nested": (np.asarray(sparse, dtype), np.asarray(np.sin(step), dtype)),
        }


def trajectory(tx, dtype, jit):
    """Updates and parameters, [step, ...]: of one compiled scan, or of calls that are not compiled."""
    grads = jax.tree.map(lambda *some: np.stack(some), *gradients(dtype))

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (updates, params)

    params = jax.tree.map(lambda g: np.zeros_like(g[0]), grads)
    if jit:
        run = jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)[1])
        return run(params, grads)
    carry, path = (params, tx.init(params)), []
    for t in range(STEPS):
        carry, found = step(carry, jax.tree.map(lambda g, t=t: g[t], grads))
        path.append(found)
    return jax.tree.map(lambda *some: np.stack(some), *path)


def assert_same(actual, expected, rtol):
    """Equal to `rtol` of the largest update, or parameter, so far: steps of both signs cancel."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    for (path, theirs), ours in leaves:
        assert ours.dtype == theirs.dtype
        a, b = np.asarray(ours).reshape(STEPS, -1), np.asarray(theirs).reshape(STEPS, -1)
        largest = np.maximum.accumulate(np.abs(b).max(axis=1, keepdims=True))
        far = np.abs(a - b) > rtol * (np.abs(b) + largest)
        assert np.all(np.isfinite(a)), path
        assert not far.any(), (path, np.argwhere(far)[0])


# Everything with everything in float64, which shows most; a third of it, with each pair, is quick.
MOMENTUM = [(None, False), (0.9, False), (0.9, True)]
EVERY = [*itertools.product([True, False], [0.0, 1.0], SCHEDULES, MOMENTUM, ["float64"], [True])]
# In float32, and without jit, where it is the same rule compiled by itself, each value once.
SOME = [
    (True, 0.0, "constant", MOMENTUM[2]),
    (False, 1.0, "schedule", MOMENTUM[1]),
    (True, 1.0, "schedule", MOMENTUM[0]),
]
OTHERS = [(*case, "float32", jit) for case in SOME for jit in (True, False)]


def is_quick(eps_in_sqrt, scale, schedule, momentum, *_):
    return (eps_in_sqrt + scale + (schedule == "constant") + MOMENTUM.index(momentum)) % 3 == 0


@pytest.mark.parametrize(
    ("eps_in_sqrt", "initial_scale", "schedule", "momentum", "dtype", "jit"),
    quick([*EVERY, *OTHERS], [*filter(lambda case: is_quick(*case), EVERY), *OTHERS]),
)
def test_the_trajectory_is_that_of_optax(eps_in_sqrt, initial_scale, schedule, momentum, dtype, jit, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    arguments = (SCHEDULES[schedule], 0.95, 1e-8, initial_scale, eps_in_sqrt, False, *momentum)
    ours, theirs = rmsprop_jax.rmsprop(*arguments), optax.rmsprop(*arguments)
    assert_same(trajectory(ours, dtype, jit), trajectory(theirs, dtype, jit), RTOL[dtype])


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_bias_correction_is_that_of_adam_without_momentum(decay):
    ours = rmsprop_jax.rmsprop(1e-2, decay, eps_in_sqrt=False, bias_correction=True)
    adam = optax.adam(1e-2, b1=0.0, b2=decay)
    assert_same(trajectory(ours, "float32", True), trajectory(adam, "float32", True), 1e-6)


def test_rmsprop_takes_positional_arguments_in_the_order_of_optax():
    import inspect

    ours = list(inspect.signature(rmsprop_jax.rmsprop).parameters.values())
    theirs = list(inspect.signature(optax.rmsprop).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.slow
def test_the_tests_of_optax_pass_with_this_package_in_its_place():
    program = Path(__file__).parent / "optax_own_tests.py"
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 50, run.stdout  # 63 with Optax 0.2.8
