"""The optimizer on meshes of simulated devices. tests/test_sharding.py runs these tests in a process of its own.

By hand: pytest tests/distributed/on_eight_devices.py
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rmsprop_jax import apply_updates, rmsprop, rows, warmup
from rmsprop_jax.sharding import state_sharding

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_threefry_partitionable", True)

FORMS = {
    "plain": {},
    "outside": {"eps_in_sqrt": False, "bias_correction": True},
    "centered_momentum": {"centered": True, "momentum": 0.9},
    "nesterov_after": {"momentum": 0.9, "nesterov": True, "lr_in_momentum": False, "weight_decay": 0.01},
    "bfloat16": {"accumulator": "bfloat16", "momentum": 0.9, "momentum_dtype": jnp.bfloat16},
    "uint8": {"accumulator": "uint8", "centered": True},
}
SHAPES = {"kernel": (16, 24), "scale": (8,), "odd": (3, 5), "scalar": ()}


def mesh_of(devices, kind=AxisType.Auto):
    """`devices` devices; from four on, half of them along the axis "model"."""
    model = 2 if devices > 2 else 1
    return jax.make_mesh(
        (devices // model, model), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:devices]
    )


LAYOUTS = {  # of the kernel
    "replicated": PartitionSpec(),
    "fully sharded": PartitionSpec("data"),
    "tensor-parallel": PartitionSpec(None, "model"),
    "both": PartitionSpec("data", "model"),
}


def placed(tree, mesh, spec):
    """The tree on the mesh, its kernel as `spec` says and the rest replicated."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, spec if name == "kernel" else PartitionSpec()))
        for name, x in tree.items()
    }


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def random(rng, dtype=jnp.float32):
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def updated(tx, place, state_layout=None, dtype=jnp.float32, steps=12):
    """Parameters and state after some steps; the gradients do not depend on the parameters."""
    rng = np.random.default_rng(0)
    params = place(random(rng, dtype))
    layout = None if state_layout is None else state_layout(params)
    state = jax.jit(tx.init, out_shardings=layout)(params)
    outputs = None if layout is None else (shardings(params), layout)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=outputs)
    def step(params, state, grads, key):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates, key=key), state

    for t in range(steps):
        params, state = step(params, state, place(random(rng, dtype)), jax.random.key(t))
    return params, state


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_same_numbers_on_every_mesh(form, dtype):
    """Bit for bit: the rule is elementwise, and rounds by an element's place in the whole array."""
    tx = rmsprop(warmup(0.01), 0.99, **form)
    expected = jax.device_get(updated(tx, lambda tree: tree, dtype=dtype))
    for devices in (2, 4, 8):
        mesh = mesh_of(devices)
        for name, spec in LAYOUTS.items():
            for zero in (False, True):
                params, state = updated(
                    tx,
                    lambda tree, spec=spec, mesh=mesh: placed(tree, mesh, spec),
                    (lambda params, mesh=mesh: state_sharding(tx, params, mesh, "data")) if zero else None,
                    dtype,
                )
                actual = jax.device_get((params, state))
                jax.tree.map(
                    partial(np.testing.assert_array_equal, err_msg=f"{name} {zero=}"), actual, expected
                )
                whole = NamedSharding(mesh, spec)
                assert params["kernel"].sharding.is_equivalent_to(whole, 2)
                if not zero:
                    assert state[0].nu["kernel"].sharding.is_equivalent_to(whole, 2)
