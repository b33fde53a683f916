"""Diagnostics where JAX and Optax look inside: None, no arrays, strict promotion, export, Optax's trees."""

import itertools
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick
from jax import export

import rmsprop_jax
from rmsprop_jax import Settings, diagnostics, rmsprop
from rmsprop_jax.diagnostics._figures import FIGURES

SHAPES = {"kernel": (6, 4), "gain": ()}
FORMS = {
    "plain": {},
    "centered": {"centered": True, "momentum": 0.9},
    "outside": {"eps_in_sqrt": False, "bias_correction": True},
    "uint8": {"accumulator": "uint8"},
}


def random(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    tree = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    if np.issubdtype(dtype, np.complexfloating):
        tree = {name: x + 1j * rng.normal(size=x.shape) for name, x in tree.items()}
    return tree if dtype is np.float64 else {name: jnp.asarray(x, dtype) for name, x in tree.items()}


def watched(tx, grads, params, steps=3, **options):
    """The last updates, and the history, of some steps of the same gradients."""
    tx = diagnostics.watch(tx, every=1, capacity=4, **options)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
    return updates, diagnostics.history(state)


# Leaves that are None, and leaves that are no arrays -------------------------------------------------------


def test_a_layer_without_a_gradient_is_left_out():
    """By itself and with all of its subtree; the others are measured as if it were not there."""
    params = {"body": {"a": jnp.ones(4), "b": jnp.ones(4)}, "head": jnp.arange(1.0, 5.0)}
    tx = rmsprop(0.1)
    for body in (None, {"a": None, "b": None}):
        grads = {"body": body, "head": params["head"]}
        updates, history = watched(tx, grads, params)
        assert updates["body"] == body
        assert list(history.gradient_rms) == ["head"]
        alone = watched(tx, {"head": params["head"]}, {"head": params["head"]})[1]
        chex.assert_trees_all_equal(history, alone)
        state = tx.update(grads, tx.init(params), params)[1]
        measured = diagnostics.measure(grads, state, updates, params, tx=tx)
        assert list(measured.gradient_rms) == ["head"]
        assert diagnostics.advise([measured] * 10) == []


def test_a_layer_that_thaws_is_measured_from_then_on():
    params = {"body": jnp.ones(4), "head": jnp.ones(4)}
    tx = diagnostics.watch(rmsprop(0.1), every=1)
    state = tx.init(params)
    for t in range(20):
        grads = {"body": None if t < 10 else params["body"], "head": params["head"]}
        _, state = tx.update(grads, state, params)
    history = diagnostics.history(state)
    np.testing.assert_array_equal(np.isnan(history.gradient_rms["body"]), np.arange(20) < 10)
    np.testing.assert_allclose(history.learning_rate["body"][10:], 0.1, rtol=1e-5)
    assert diagnostics.advise(history, np.geomspace(1, 0.01, 20)) == []


def test_the_whole_model_as_params():
    """Activation functions and names among the parameters, which have no gradient."""
    grads = {"w": jnp.ones(4), "act": None, "name": None}
    tx = diagnostics.watch(rmsprop(0.1))
    _, state = tx.update(grads, tx.init(grads), {"w": jnp.ones(4), "act": jax.nn.relu, "name": "relu"})
    assert list(diagnostics.history(state).gradient_rms) == ["w"]


def test_no_layer_at_all():
    tx = diagnostics.watch(rmsprop(0.1))
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    history = diagnostics.history(state)
    np.testing.assert_array_equal(history.step, [1])
    assert diagnostics.advise(history, [1.0]) == []
    assert diagnostics.latest(state) == {"step": 1.0}


# Dtypes ----------------------------------------------------------------------------------------------------


QUICK = [("plain", np.float64, True), ("uint8", jnp.bfloat16, False), ("centered", jnp.complex64, False)]
KINDS = [*itertools.product(FORMS, [jnp.float32, jnp.bfloat16, jnp.complex64, np.float64], [False, True])]


@pytest.mark.parametrize(("form", "dtype", "wide"), quick(KINDS, QUICK))
def test_strict_promotion(form, dtype, wide, request, strict):
    """np.float64 stands for NumPy's arrays; `wide` is JAX with 64 bits."""
    if wide:
        request.getfixturevalue("x64")
    params, grads = random(0, dtype), random(1, dtype)
    tx = rmsprop(optax.constant_schedule(0.01), 0.99, **FORMS[form])
    updates, history = watched(tx, grads, params)
    expected = np.sqrt(np.mean(np.square(np.abs(np.asarray(grads["kernel"], np.complex128)))))
    np.testing.assert_allclose(history.gradient_rms["kernel"], expected, rtol=1e-5)
    if form == "plain":
        rtol = 5e-3 if dtype == jnp.bfloat16 else 1e-5  # of updates in 8 bits
        np.testing.assert_allclose(history.learning_rate["kernel"], 0.01, rtol=rtol)
    measured = jax.eval_shape(partial(diagnostics.measure, tx=tx), grads, tx.init(params), updates, params)
    assert measured.table.dtype == jnp.float32


@pytest.mark.parametrize("centered", quick([False, True], [True]))
def test_optax_under_strict_promotion(centered, strict):
    grads = random(1)
    _, history = watched(optax.rmsprop(0.01, centered=centered), grads, random(0), settings=Settings(0.9))
    np.testing.assert_allclose(history.gradient_rms["gain"], abs(grads["gain"]), rtol=1e-5)


# Export, and Optax's trees ---------------------------------------------------------------------------------


def three_steps(tx):
    def run(params, grads):
        def step(state, _):
            return tx.update(grads, state, params)[::-1]

        state, updates = jax.lax.scan(step, tx.init(params), length=3)
        return updates, state

    return run


SAMPLED = ("learning_rate", "effective_rate", "effective_rate_spread", "eps_share", "stuck_share")


@pytest.mark.slow  # tests/test_export.py has a quick one
@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        ("plain", {"w": "b, 20", "c": "b"}),
        ("centered", {"w": "8, b, 2*c", "c": ""}),
        ("uint8", {"w": "b", "c": "3"}),
    ],
)
def test_export_with_symbolic_shapes(form, shapes, strict):
    """The figures are those of concrete shapes; of large layers other elements are sampled."""
    run = three_steps(diagnostics.watch(rmsprop(0.01, **FORMS[form]), every=1, capacity=4))
    rmsprop_jax.export.register_optax_states()
    scope = export.SymbolicScope()
    symbolic = {name: export.symbolic_shape(shape, scope=scope) for name, shape in shapes.items()}
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in symbolic.items()}
    exported = export.export(jax.jit(run))(structs, structs)
    if find_spec("flatbuffers"):
        exported = export.deserialize(exported.serialize())
    for sizes in ({"b": 1, "c": 3}, {"b": 400, "c": 2}):
        rng = np.random.default_rng(0)
        params, grads = (
            {
                name: jnp.asarray(rng.normal(size=[eval(d, sizes) for d in shape.split(",") if d]), "float32")
                for name, shape in shapes.items()
            }
            for _ in range(2)
        )
        (updates, state), (same, expected) = exported.call(params, grads), jax.jit(run)(params, grads)
        # XLA fuses other operations, in which float32's rounding differs.
        chex.assert_trees_all_close(updates, same, rtol=1e-5)
        history, expected = diagnostics.history(state), diagnostics.history(expected)
        for figure, name in itertools.product(FIGURES, shapes):
            # Of a large layer it is of some 2,000 other elements: each median is off by a twentieth.
            sampled = params[name].size > 4096 and figure in SAMPLED
            how = {"rtol": 0.1, "atol": 0.01} if sampled else {"rtol": 1e-4}
            actual, wanted = getattr(history, figure)[name], getattr(expected, figure)[name]
            np.testing.assert_allclose(actual, wanted, err_msg=figure, **how)


@pytest.mark.parametrize(
    "tx",
    [
        diagnostics.watch(rmsprop(0.1, centered=True)),
        diagnostics.watch(optax.rmsprop(0.1), settings=Settings(0.9)),
        optax.chain(optax.clip(1.0), diagnostics.watch(rmsprop(0.1, momentum=0.9), every=3)),
        optax.masked(diagnostics.watch(rmsprop(0.1)), {"w": True, "c": False}),
    ],
)
def test_map_params(tx):
    params = {"w": jnp.ones((3, 2)), "c": jnp.ones(2)}
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    nu = optax.tree.get(state, "nu")["w"]
    np.testing.assert_array_equal(optax.tree.get(mapped, "nu")["w"], nu + 1)
    np.testing.assert_array_equal(optax.tree.get(mapped, "every"), optax.tree.get(state, "every"))
    if "masked" not in repr(tx):
        specs = optax.tree.map_params(
            tx, lambda _, spec: spec, state, {"w": "W", "c": "C"}, transform_non_params=lambda _: None
        )
        assert optax.tree.get(specs, "nu")["w"] == "W"


def test_a_derivative_through_watched_updates_is_that_of_the_updates():
    def trained(rate, wrap):
        tx = wrap(rmsprop(rate))
        params = {"w": jnp.arange(1.0, 5.0)}
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(p) for p in params.values())

    plain, seen = (
        jax.jit(jax.grad(lambda rate, wrap=wrap: trained(rate, wrap)))(0.1)
        for wrap in (lambda tx: tx, diagnostics.watch)
    )
    np.testing.assert_allclose(seen, plain, rtol=1e-5)


@pytest.mark.slow
def test_on_eight_simulated_devices():
    """tests/distributed/watch_on_meshes.py, in a process of its own for its devices."""
    program = Path(__file__).parent / "distributed" / "watch_on_meshes.py"
    command = (sys.executable, "-m", "pytest", "-q")
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(program)],
        text=True,
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-8000:]
