"""Step by step against `optax.rmsprop`, and Optax's own tests with this package in its place."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax

STEPS = 100
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
            "dense": jnp.asarray(rng.normal(size=(3, 5)) * scale, dtype),
            "nested": (jnp.asarray(sparse, dtype), jnp.asarray(np.sin(step), dtype)),
        }


def trajectory(tx, dtype, jit):
    params = jax.tree.map(jnp.zeros_like, next(gradients(dtype)))
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for grads in gradients(dtype):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield updates, params


def assert_same(actual, expected, rtol):
    """Equal to `rtol` of the largest update, or parameter, so far: steps of both signs cancel."""
    largest = {}
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        leaves = zip(jax.tree_util.tree_leaves_with_path(theirs), jax.tree.leaves(ours), strict=True)
        for (path, b), a in leaves:
            assert a.dtype == b.dtype
            largest[path] = max(largest.get(path, 0.0), float(jnp.max(jnp.abs(b))))
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * largest[path], err_msg=f"{step} {path}")


CASES = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in itertools.product(
        [True, False], [0.0, 1.0], [(None, False), (0.9, False), (0.9, True)], list(SCHEDULES)
    )
]


@pytest.mark.parametrize(("eps_in_sqrt", "initial_scale", "momentum", "schedule"), CASES)
# Rounding: some units of the last place (float32 6e-8, float64 1e-16) per update, summed over 100 steps.
@pytest.mark.parametrize(
    ("dtype", "jit", "rtol"),
    [("float32", True, 5e-6), ("float32", False, 5e-6), ("float64", True, 1e-14), ("float64", False, 1e-14)],
)
def test_the_trajectory_is_that_of_optax(
    eps_in_sqrt, initial_scale, momentum, schedule, dtype, jit, rtol, request
):
    if dtype == "float64":
        request.getfixturevalue("x64")
    arguments = (SCHEDULES[schedule], 0.95, 1e-8, initial_scale, eps_in_sqrt, False, *momentum)
    ours, theirs = rmsprop_jax.rmsprop(*arguments), optax.rmsprop(*arguments)
    assert_same(trajectory(ours, dtype, jit), trajectory(theirs, dtype, jit), rtol)


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
