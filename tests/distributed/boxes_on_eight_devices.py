"""Shardings by the names on Flax's boxes, and by specs, on simulated devices: test_sharding.py runs them.

A mean has size 1 on the axis that it is a mean over, which no mesh axis can split.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import assert_trees_close
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from rmsprop_jax import accumulators, rmsprop
from rmsprop_jax.sharding import state_sharding

nn = pytest.importorskip("flax.linen", reason="the examples' extra is not installed")
nnx = pytest.importorskip("flax.nnx")

FACTORED = accumulators.Factored(2)
MEANS = {"row_mean": ("data", None), "column_mean": (None, "model")}
each_accumulator = pytest.mark.parametrize(
    "accumulator", ["float32", "bfloat16", "uint8", accumulators.Uint8(-40), FACTORED], ids=str
)


def full(sharding):
    return (*sharding.spec, None, None)[:2]


@each_accumulator
@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_the_boxes_of_linen(accumulator, box):
    model = nn.Dense(8, kernel_init=box(nn.initializers.ones, ("data", "model")))
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(float(p.size))).reshape(p.shape), params)
    tx = rmsprop(0.1, momentum=0.9, accumulator=accumulator)
    shardings = nn.get_sharding(jax.eval_shape(tx.init, params), mesh_of(8))
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    if accumulator == FACTORED:
        means = nn.meta.unbox(state[0].nu["factored(2)"])
        assert {part: full(tree["kernel"].sharding) for part, tree in means.items()} == MEANS
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    plain_grads, plain = nn.meta.unbox((grads, params))
    expected, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(plain_grads, plain)
    assert_trees_close(nn.meta.unbox(updates), expected, rtol=1e-6)
    jax.jit(rmsprop(0.1, momentum=0.9).update)(grads, accumulators.convert(after, "float32"), params)


@each_accumulator
def test_the_metadata_of_nnx(accumulator):
    mesh = mesh_of(8)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.ones, ("data", "model"))
        model = nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, rmsprop(0.1, momentum=0.9, accumulator=accumulator), wrt=nnx.Param)
        state = nnx.state(optimizer)
        jax.lax.with_sharding_constraint(state, nnx.get_named_sharding(state, mesh))
        if accumulator == FACTORED:
            means = nnx.state(optimizer)["opt_state"][0]["nu"]["factored(2)"]
            for part, spec in MEANS.items():
                assert full(means[part]["kernel"].get_value().sharding) == spec
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))


@each_accumulator
def test_specs_that_follow_the_parameters(accumulator):
    """`optax.tree.map_params` hands one to each array; `state_sharding` splits no axis of size 1."""
    params, specs = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}, {"w": P("data", "model"), "b": P("model")}
    mesh, tx = mesh_of(8), rmsprop(0.1, accumulator=accumulator)
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P())
    leaves, treedef = jax.tree.flatten(marked, is_leaf=lambda x: isinstance(x, P))
    assert treedef == jax.tree.structure(state)
    assert set(leaves) == {*specs.values(), P()}
    params = {name: jax.device_put(p, NamedSharding(mesh, specs[name])) for name, p in params.items()}
    state = jax.jit(tx.init, out_shardings=state_sharding(tx, params, mesh, "data"))(params)
    jax.jit(tx.update)(params, state)
