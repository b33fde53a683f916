"""Compiles a step for GPUs and TPUs that are not there: XLA's compilers for them run on any machine.

They come with `jax-cuda12-plugin`, `jax-cuda12-pjrt` and `libtpu`; `make accelerators` installs these without
their dependencies. `_program.py` counts what the compiled step does.
"""

import contextlib
import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks._program import Program


class GPU(NamedTuple):
    """An NVIDIA GPU, as its data sheet and XLA's own descriptions have it.

    Attributes:
      bandwidth: of the memory, bytes per second.
      capability: compute capability, major and minor.
      cores: streaming multiprocessors.
      threads: that one of them computes in at once, in float32.
      shared: bytes of its shared memory.
      l2: bytes of the cache of all.
      gigahertz: of their clock.
      memory: bytes.
    """

    name: str
    bandwidth: float
    capability: tuple[int, int]
    cores: int
    threads: int
    shared: int
    l2: int
    gigahertz: float
    memory: int

    def topology(self, devices: int):
        shape = f"1x1x{devices}"
        return topologies.get_topology_desc(
            platform="cuda", topology_name=shape, topology=shape, target_config=self._target_config()
        )

    def _target_config(self):
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared - 1024}
  shared_memory_per_core: {self.shared} core_count: {self.cores} fpus_per_core: {self.threads}
  memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.l2} clock_rate_ghz: {self.gigahertz}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.name}"
"""


class TPU(NamedTuple):
    """A TPU.

    Attributes:
      bandwidth: of the memory, bytes per second.
      one: libtpu's name of a topology of one device.
      eight: and of eight.
    """

    name: str
    bandwidth: float
    one: str
    eight: str

    def topology(self, devices: int):
        name = {1: self.one, 8: self.eight}[devices]
        return topologies.get_topology_desc(platform="tpu", topology_name=name)


CHIPS: dict[str, GPU | TPU] = {
    "H100": GPU("NVIDIA H100 80GB HBM3", 3.352e12, (9, 0), 132, 128, 233472, 50 << 20, 1.98, 84942979072),
    "A100": GPU("NVIDIA A100-SXM4-80GB", 2.039e12, (8, 0), 108, 64, 167936, 40 << 20, 1.41, 85100068864),
    "B200": GPU("NVIDIA B200", 7.672e12, (10, 0), 148, 128, 233472, 132644864, 1.965, 191514411008),
    "v5e": TPU("TPU v5e", 0.819e12, "v5e:1x1", "v5e:2x4"),
    "v6e": TPU("TPU v6e", 1.640e12, "v6e:1x1", "v6e:2x4"),
    "v5p": TPU("TPU v5p", 2.765e12, "v5p:1x1x1", "v5p:2x2x2"),
}


def installed() -> bool:
    """Whether the compilers are there."""
    return all(map(importlib.util.find_spec, ("jax_plugins", "jax_plugins.xla_cuda12", "libtpu")))


def devices(chip: str, count: int = 1) -> Mesh:
    """A mesh of `count` of these, 1 or 8, along the axis "data"; "cpu" is this machine's one."""
    # Or JAX would look for devices, libtpu ask a network for them, and a second process wait for the first.
    jax.config.update("jax_platforms", "cpu")
    if chip == "cpu":
        return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    with _quiet():
        topology = CHIPS[chip].topology(count)
        return topologies.make_mesh(topology, (count,), ("data",))


_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


def placed(tree, mesh, *axes):
    """Shapes and dtypes of a tree, each array on the mesh with `PartitionSpec(*axes)`."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compiled(step, *arguments, **options):
    """`step` compiled for where its arguments are placed; `options` are those of `jax.jit`."""
    lowered = jax.jit(step, **options).lower(*arguments)
    with _quiet():
        return lowered.compile()


def counts(done) -> dict:
    """`Program.counts` of a compiled step, and its temporary bytes."""
    temporary = done.memory_analysis().temp_size_in_bytes
    return {**Program(done.as_text()).counts(), "temporary": temporary}


@contextlib.contextmanager
def _quiet():
    """Without what C++ writes to stderr: that no GPU and no TPU is there."""
    with open(os.devnull, "w") as null:
        kept = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
