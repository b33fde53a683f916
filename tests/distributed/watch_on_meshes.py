"""Diagnostics on meshes of simulated devices: run by tests/test_diagnostics_inside_jax.py."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import LAYOUTS, mesh_of, placed

from rmsprop_jax import Settings, diagnostics, rmsprop

FORMS = {
    "plain": {"momentum": 0.9},
    "centered": {"centered": True},
    "uint8": {"accumulator": "uint8"},
}
TX = {
    **{name: rmsprop(0.01, 0.99, **options) for name, options in FORMS.items()},
    "optax": optax.rmsprop(0.01, 0.99),
}
EVERYWHERE = PartitionSpec()
rng = np.random.default_rng(0)
PARAMS, GRADS = (
    {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    for shapes in [{"kernel": (16, 24), "bias": (24,)}] * 2
)
REPLICATED = {"kernel": EVERYWHERE, "bias": EVERYWHERE}


def watch(form, capacity=4):
    settings = Settings(0.99) if form == "optax" else None
    return diagnostics.watch(TX[form], every=2, capacity=capacity, settings=settings)


def step(tx, params, state, grads):
    grads = jax.tree.map(jnp.add, grads, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(tx, params, state, grads):
    """Nine steps of one program."""

    def body(carry, _):
        return step(tx, *carry, grads), None

    return jax.lax.scan(body, (params, state), length=9)[0]


def run_alone(form, params=PARAMS, grads=GRADS):
    tx = watch(form)
    return jax.jit(partial(run, tx))(params, tx.init(params), grads)


def assert_same(actual, expected):
    """Figures of sums over other parts, in float32; all elements are sampled."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Auto, marks=pytest.mark.slow, id="auto"),
        pytest.param(AxisType.Explicit, id="explicit"),
    ],
)
EVERY_LAYOUT = pytest.mark.parametrize(
    ("form", "layout", "kind"),
    [
        ("plain", "both", AxisType.Explicit),
        ("centered", "replicated", AxisType.Explicit),
        ("optax", "fully sharded", AxisType.Explicit),
        ("centered", "tensor-parallel", AxisType.Explicit),
        pytest.param("plain", "both", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("optax", "tensor-parallel", AxisType.Auto, marks=pytest.mark.slow),
    ],
)


@EVERY_LAYOUT
def test_the_history_is_the_same_on_a_mesh(form, layout, kind):
    """Of steps that are jitted while the mesh is set, that are when it is not, and that are not at all."""
    expected = diagnostics.history(run_alone(form)[1])
    mesh = mesh_of(8, kind)
    start, grads = (placed(tree, mesh, LAYOUTS[layout]) for tree in (PARAMS, GRADS))
    tx = watch(form)
    with jax.set_mesh(mesh):
        _, state = jax.jit(partial(run, tx))(start, jax.jit(tx.init)(start), grads)
    assert_same(diagnostics.history(state), expected)
    if form == "plain":
        _, state = jax.jit(partial(run, tx))(start, jax.jit(tx.init)(start), grads)
        assert_same(diagnostics.history(state), expected)
        params, state = start, tx.init(start)
        for _ in range(9):
            params, state = step(tx, params, state, grads)
        assert_same(diagnostics.history(state), expected)


def test_measure_on_an_explicit_mesh():
    mesh = mesh_of(8, AxisType.Explicit)
    params = placed(PARAMS, mesh, LAYOUTS["both"])
    for jit in (jax.jit, lambda f: f):

        @jit
        def measured(params, tx=TX["centered"]):
            updates, state = tx.update(params, tx.init(params), params)
            return diagnostics.measure(params, state, updates, params, tx=tx)

        assert_same(jax.device_get(measured(params)), jax.device_get(measured(PARAMS)))


@EVERY_LAYOUT
def test_shard_map_with_the_state_made_outside(form, layout, kind):
    """One history for all devices: that of whole layers."""
    expected = run_alone(form)
    tx, mesh = watch(form), mesh_of(8, kind)
    spec = REPLICATED | {"kernel": LAYOUTS[layout]}
    state = tx.init(PARAMS)
    of_state = optax.tree.map_params(
        tx, lambda _, spec: spec, state, spec, transform_non_params=lambda _: EVERYWHERE
    )

    def put(tree, specs):
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    steps = jax.shard_map(
        partial(run, tx),
        mesh=mesh,
        in_specs=(spec, of_state, spec),
        out_specs=(spec, of_state),
        check_vma=True,
    )
    params, state = jax.jit(steps)(put(PARAMS, spec), put(state, of_state), put(GRADS, spec))
    assert_same(diagnostics.history(state), diagnostics.history(expected[1]))
    assert_same(jax.device_get(params), jax.device_get(expected[0]))


@KINDS
@pytest.mark.parametrize("form", TX)
def test_shard_map_with_the_state_made_inside(form, kind):
    """Each device has the history of its part; the axis along which nothing differs has one."""
    tx, mesh = watch(form), mesh_of(8, kind)
    spec = REPLICATED | {"kernel": LAYOUTS["fully sharded"]}

    def tables(params, grads):
        _, state = run(tx, params, tx.init(params), grads)
        return state.table[None], state.steps, state.stored

    tables = jax.shard_map(
        tables,
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=(PartitionSpec("data"), EVERYWHERE, EVERYWHERE),
        check_vma=True,
    )
    arguments = (placed(tree, mesh, spec["kernel"]) for tree in (PARAMS, GRADS))
    table, steps, stored = jax.device_get(jax.jit(tables)(*arguments))
    for device in range(4):
        params, grads = (
            {**tree, "kernel": tree["kernel"][4 * device : 4 * device + 4]} for tree in (PARAMS, GRADS)
        )
        expected = run_alone(form, params, grads)[1]
        assert_same(table[device], expected.table)
        np.testing.assert_array_equal(steps, expected.steps)
        assert stored == expected.stored


def test_shard_map_without_the_check():
    """Then nothing tells what differs: each device measures its part, and what is replicated is the same."""
    tx, mesh = watch("plain"), mesh_of(8)
    state = tx.init(PARAMS)
    of_state = jax.tree.map(lambda _: EVERYWHERE, state)
    steps = jax.shard_map(
        partial(run, tx),
        mesh=mesh,
        in_specs=(REPLICATED, of_state, REPLICATED),
        out_specs=(REPLICATED, of_state),
        check_vma=False,
    )
    _, state = jax.jit(steps)(PARAMS, state, GRADS)
    assert_same(diagnostics.history(state), diagnostics.history(run_alone("plain")[1]))
