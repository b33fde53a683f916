"""jax.export: a step is lowered for every platform, written and read again, and has the same bits on CPU."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Float16Root, assert_trees_close, quick
from jax import export

from rmsprop_jax import accumulators, apply_updates, diagnostics, rmsprop, rows, scale_by_rms
from rmsprop_jax.export import register_optax_states

pytestmark = pytest.mark.usefixtures("optax_states")


@pytest.fixture(scope="module")
def optax_states():
    register_optax_states()
    register_optax_states()  # once more changes nothing


P = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.5])}


EXPORTED = {
    **{
        str(a): rmsprop(0.1, momentum=0.9, accumulator=a)
        for a in (*accumulators.NAMED, accumulators.Uint8(-40))
    },
    "everything": rmsprop(
        optax.linear_schedule(0.1, 0.01, 5), centered=True, weight_decay=0.1, bias_correction=True
    ),
    "watched": diagnostics.watch(rmsprop(0.1, momentum=0.9)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.1)),
    "injected": optax.inject_hyperparams(rmsprop)(0.1),
    "masked": optax.masked(rmsprop(0.1), {"w": True, "b": False}),
    "partition": optax.partition({"a": rmsprop(0.1), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}),
    "MultiSteps": optax.MultiSteps(rmsprop(0.1), 2).gradient_transformation(),
}


def exported_and_called(tx, params, grads):
    """The step, lowered for four kinds of devices, written and read again, gives the same bits on CPU."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    arguments = params, tx.init(params), grads
    platforms = ("cpu", "cuda", "rocm", "tpu")
    written = export.export(jax.jit(step), platforms=platforms)(*arguments).serialize()
    assert_trees_close(export.deserialize(written).call(*arguments), jax.jit(step)(*arguments), rtol=0)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_step_is_exported_for_every_platform(name):
    exported_and_called(EXPORTED[name], P, P)


@pytest.mark.parametrize("tx", [rows.exact(rmsprop(0.1)), rows.lazy(rmsprop(0.1, momentum=0.9))])
def test_a_step_on_rows_is_exported_for_every_platform(tx):
    gradient = rows.RowGradient(jnp.array([1, 3, 1]), jnp.ones((3, 2)), 7)
    exported_and_called(tx, jnp.ones((7, 2)), gradient)


PROCESS = """
import jax, jax.numpy as jnp, optax
{before}
import rmsprop_jax
from rmsprop_jax import export
tx = rmsprop_jax.rmsprop(0.1)
state = tx.init(jnp.ones(2))
{after}
export.register_optax_states()
{last}
jax.export.export(jax.jit(tx.update))(jnp.ones(2), state).serialize()
"""
REGISTER = "jax.export.register_namedtuple_serialization(optax.EmptyState, serialized_name='mine')"
REFUSED = f"""
try:
    {REGISTER}
except ValueError:
    pass
else:
    raise AssertionError("the call did not register it")
"""


def test_somebody_else_s_registration_stands_before_and_after_the_import_and_init():
    """In processes of their own: JAX takes one registration of a class."""
    cases = [{"before": REGISTER}, {"after": REGISTER}, {"last": REFUSED}]
    programs = [PROCESS.format(**{"before": "", "after": "", "last": "", **case}) for case in cases]
    running = [
        subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
        for program in programs
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.parametrize("accumulator", [Float16Root(), accumulators.Factored(64)], ids=str)
def test_an_accumulator_of_one_s_own_is_exported(accumulator):
    exported_and_called(scale_by_rms(accumulator=accumulator), P, P)


# Sizes that are left open.

TABLES = {
    "exact": rows.exact(rmsprop(0.1)),
    "lazy": rows.lazy(rmsprop(0.1, momentum=0.9, accumulator="uint8")),
    "clipped": optax.chain(rows.values_only(optax.clip_by_global_norm(1.0)), rows.exact(rmsprop(0.1))),
}


@pytest.mark.parametrize(
    ("name", "open_table"),
    quick(
        [(name, is_open) for name in TABLES for is_open in (False, True)],
        [("lazy", True), ("clipped", False)],
    ),
)
def test_any_number_of_rows_and_of_ids(name, open_table):
    """The exported step takes as many as there are; repeated ids and those out of range too."""
    tx = TABLES[name]

    def step(table, state, ids):
        _, (grads, _) = rows.value_and_grad(lambda found, _: jnp.sum(found**2))(table, ids, None)
        updates, state = tx.update(grads, state, table)
        return apply_updates(table, updates), state

    num_rows, num_ids = export.symbolic_shape("n, b")
    shape = jax.ShapeDtypeStruct((num_rows if open_table else 50, 4), jnp.float32)
    ids = jax.ShapeDtypeStruct((num_ids,), jnp.int32)
    exported = export.export(jax.jit(step))(shape, jax.eval_shape(tx.init, shape), ids)
    exported = export.deserialize(exported.serialize())
    table = jnp.arange(200.0).reshape(50, 4)
    for ids in ([3, 1, 3, 3, -2, 60, 1], [7]):
        arguments = table, tx.init(table), jnp.array(ids)
        assert_trees_close(exported.call(*arguments), jax.jit(step)(*arguments), rtol=1e-6)


@pytest.mark.parametrize(
    "watched", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "watched"]
)
def test_any_size_of_the_parameters(watched):
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return apply_updates(params, updates), state

    (size,) = export.symbolic_shape("n")
    shape = {"w": jax.ShapeDtypeStruct((size, 3), jnp.float32)}
    for options in ({"momentum": 0.9, "centered": True}, {"accumulator": "uint8"}):
        tx = rmsprop(0.1, **options)
        tx = diagnostics.watch(tx) if watched else tx
        exported = export.export(jax.jit(step))(shape, jax.eval_shape(tx.init, shape))
        for n in (1, 5000):
            params = {"w": jnp.arange(3.0 * n).reshape(n, 3)}
            state = jax.jit(tx.init)(params)
            found = exported.call(params, state)
            assert_trees_close(found[0], jax.jit(step)(params, state)[0], rtol=1e-6)
            assert np.all(np.isfinite(found[0]["w"]))
