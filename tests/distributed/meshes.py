"""Eight simulated devices, meshes of them, and arrays on these."""

from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for the devices

LAYOUTS = {  # of the kernel
    "replicated": PartitionSpec(),
    "fully sharded": PartitionSpec("data"),
    "tensor-parallel": PartitionSpec(None, "model"),
    "both": PartitionSpec("data", "model"),
}


def mesh_of(devices, kind=AxisType.Auto):
    """From four devices on, two of them along the axis "model"."""
    shape = (devices // 2, 2) if devices > 2 else (devices, 1)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:devices])


def data_mesh():
    """All of them along one axis."""
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def placed(tree, mesh, spec):
    """The tree on the mesh, its kernel as `spec` says and the rest replicated."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, spec if name == "kernel" else PartitionSpec()))
        for name, x in tree.items()
    }


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_equal(actual, expected, **how):
    jax.tree.map(partial(np.testing.assert_array_equal, **how), jax.device_get(actual), expected)
