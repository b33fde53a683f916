"""The accumulators' layout on a device mesh: ZeRO stage 1.

Accumulators follow their parameters: `init` gives them the parameters' shardings, and the update keeps them,
since every rule is elementwise. Means of rows and of columns are sharded as rows and columns are; summed over
shards, they are the same on every mesh to the rounding of their sums. Where parameters are replicated over
data-parallel devices, so then is the state. Stage 1 of ZeRO (Rajbhandari et al., 2020) splits it over them:
of each accumulator a device keeps and updates 1/n, and XLA gathers the new parameters, which every device
would otherwise have computed itself::

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(params, replicated)
    zero1 = state_sharding(tx, params, mesh, "data")
    state = jax.jit(tx.init, out_shardings=zero1)(params)  # not one device ever holds all of it

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(replicated, zero1))
    def step(params, state, batch):  # the batch sharded over 'data'
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

On a mesh with explicit axes the updates come in parts: `jax.sharding.reshard(updates, PartitionSpec())`.

**Flax NNX.** The optimizer calls `init`, so that is what has to know::

    zero1 = state_sharding(tx, nnx.state(model, nnx.Param), mesh, "data")
    tx_zero1 = tx._replace(init=jax.jit(tx.init, out_shardings=zero1))
    optimizer = nnx.Optimizer(model, tx_zero1, wrt=nnx.Param)

**In the host's memory.** Where the backend has pinned host memory, the state can wait there between steps,
and crosses the bus twice in each::

    on_host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), zero1)
    state = jax.jit(tx.init, out_shardings=on_host)(params)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(replicated, on_host))
    def step(params, state, batch):
        state = jax.device_put(state, zero1)
        ...
"""

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rmsprop_jax._tree import Tree, leaf_name

__all__ = ["state_sharding"]


def state_sharding(
    tx: optax.GradientTransformation,
    params: Tree,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    axis: str,
) -> Tree:
    """Shardings that split the optimizer state over `axis`, for ``jax.jit(tx.init, out_shardings=...)``.

    A leaf of the state that belongs to a parameter, by its path and its shape, is sharded as the parameter is
    and then split over `axis`, along the largest dimension that the number of devices divides and that is not
    sharded yet. Where there is none, or the parameter is itself sharded over `axis`, it stays as the
    parameter. So are means over a dimension, along the others. All else, such as counts, is replicated.

    Args:
      tx: the optimizer: this package's, Optax's, or any chain or wrapper of them.
      params: its parameters: arrays, or `jax.ShapeDtypeStruct`, with a `NamedSharding` of `mesh`; those on a
        single device, or without a sharding, count as replicated.
      mesh: the devices.
      axis: the mesh axis to split over, the data-parallel one.

    Returns:
      A tree of `jax.sharding.NamedSharding` with the structure of ``tx.init(params)``.

    Raises:
      ValueError: if `mesh` has no axis of that name, or a parameter is sharded over something else than
        `mesh`, naming the leaf.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, sharding
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 512), jnp.float32)}
      >>> state = sharding.state_sharding(rmsprop(1e-3), params, mesh, "data")
      >>> print(tuple(state[0].nu["kernel"].spec), tuple(state[0].count.spec))
      (None, 'data') ()

    References:
      Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
      <https://arxiv.org/abs/1910.02054>`_, 2020
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"Invalid {axis=}: the mesh has the axes {mesh.axis_names}.")
    known = {
        path: (leaf.shape, _spec(path, leaf, mesh))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def of_array(path, x):
        # A state holds a copy of the parameters' tree, whose paths are then the ends of its own.
        for start in range(len(path) + 1):
            shape, spec = known.get(path[start:], ((), ()))
            # An accumulator may lack its parameter's last dimensions, as one number for each row does, or
            # have size 1 where it is a mean over a dimension.
            sizes = list(zip(x.shape, shape, strict=False))
            if x.ndim <= len(shape) and x.ndim > 0 and all(n in (m, 1) for n, m in sizes):
                spec = tuple(s if n == m else None for s, (n, m) in zip(spec, sizes, strict=False))
                return NamedSharding(mesh, _split(x.shape, spec, mesh, axis))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of_array, jax.eval_shape(tx.init, params))


def _spec(path, param, mesh):
    """How a parameter is sharded: for each dimension None, a mesh axis or a tuple of them."""
    sharding = getattr(param, "sharding", None)
    spec = ()
    if isinstance(sharding, NamedSharding):
        if sharding.mesh.shape != mesh.shape:
            raise ValueError(f"Parameter {leaf_name(path)!r} is on {sharding.mesh}, expected {mesh}.")
        spec = tuple(sharding.spec)
    elif sharding is not None and not sharding.is_fully_replicated:
        raise ValueError(f"Parameter {leaf_name(path)!r} has {sharding}, expected a NamedSharding on {mesh}.")
    return spec + (None,) * (param.ndim - len(spec))


def _split(shape, spec, mesh, axis):
    """`spec` with `axis` at the largest dimension that it divides and that nothing splits yet."""
    devices = mesh.shape[axis]
    used = {name for names in spec for name in (names if isinstance(names, tuple) else (names,))}
    free = [d for d, size in enumerate(shape) if spec[d] is None and size > 0 and size % devices == 0]
    if axis in used or not free:
        return PartitionSpec(*spec)
    largest = max(free, key=lambda d: shape[d])
    return PartitionSpec(*spec[:largest], axis, *spec[largest + 1 :])
