"""States through the serialisers that people use: the tree's structure tells what an array means.

Each keeps the bits of a state of any accumulator; restored into another accumulator's structure, the state is
refused, by the serialiser or by the first update.
"""

import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EVERY_SMALL, each, each_accumulator

from rmsprop_jax import accumulators, rmsprop

serialization = pytest.importorskip("flax.serialization", reason="the examples' extra is not installed")
nnx = pytest.importorskip("flax.nnx")
orbax = pytest.importorskip("orbax.checkpoint")

EVERY = ["float32", *EVERY_SMALL]
PARAMS = {"w": jnp.ones((3, 4)), "b": [jnp.ones(4, jnp.bfloat16)], "s": jnp.ones(())}


def optimizer(accumulator, **options):
    small = accumulators.resolve(accumulator)
    if small.elementwise:  # "factored" has no centred form
        options = {"centered": True, **options}
    return rmsprop(0.1, momentum=0.9, momentum_dtype="bfloat16", accumulator=accumulator, **options)


def trained(tx):
    state = tx.init(PARAMS)
    for scale in (1.0, 3.0):
        grads = jax.tree.map(lambda p: (scale * jnp.cos(jnp.arange(float(p.size)))).reshape(p.shape), PARAMS)  # noqa: B023
        _, state = tx.update(grads, state, PARAMS)
    return state


def through_npz(state, start, folder):
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    np.savez(folder / "state.npz", **leaves)
    with np.load(folder / "state.npz") as saved:
        # NumPy writes bfloat16 as two bytes without a meaning, which the structure gives back.
        found = [saved[name].view(x.dtype) for name, x in zip(saved, jax.tree.leaves(start), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(start), found)


def standard(state, start, folder):
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.eval_shape(lambda: start))


def pytree(state, start, folder):
    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        arguments = orbax.checkpoint_utils.construct_restore_args(start)
        return checkpointer.restore(folder / "state", item=start, restore_args=arguments)


THROUGH = {
    "pickle": lambda state, start, folder: pickle.loads(pickle.dumps(state)),
    "npz": through_npz,
    "msgpack": lambda state, start, folder: serialization.from_bytes(start, serialization.to_bytes(state)),
    "state dict": lambda state, start, folder: serialization.from_state_dict(
        start, serialization.to_state_dict(state)
    ),
    "rebuilt by position": lambda state, start, folder: (type(state[0])(*state[0]), *state[1:]),
    "rebuilt by name": lambda state, start, folder: (type(state[0])(**state[0]._asdict()), *state[1:]),
    "Orbax standard": standard,
    "Orbax PyTree": pytree,
}


@each_accumulator(EVERY)
@each(through=THROUGH)
def test_the_bits_stay(accumulator, through, tmp_path):
    tx = optimizer(accumulator)
    state = trained(tx)
    restored = through(state, tx.init(PARAMS), tmp_path)
    chex.assert_trees_all_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    tx.update(PARAMS, jax.tree.map(jnp.asarray, restored), PARAMS)


@each(through={name: THROUGH[name] for name in ("msgpack", "state dict", "Orbax standard", "Orbax PyTree")})
def test_restored_into_another_accumulator_it_is_refused(through, tmp_path):
    """By the serialiser, as the trees have other keys, or by the first update."""
    states = {made: trained(optimizer(made, centered=False)) for made in EVERY}
    for i, (made, used) in enumerate(itertools.permutations(EVERY, 2)):
        tx = optimizer(used, centered=False)
        folder = tmp_path / str(i)
        folder.mkdir()
        with pytest.raises((KeyError, TypeError, ValueError)):
            tx.update(PARAMS, through(states[made], tx.init(PARAMS), folder), PARAMS)


def test_restored_in_part(tmp_path):
    """The accumulators alone, as for a new momentum."""
    state = trained(optimizer("uint8"))
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            tmp_path / "state", args=orbax.args.PyTreeSave({"rms": state[0], "rest": state[1:]})
        )
        part = {"rms": state[0]}
        how = orbax.checkpoint_utils.construct_restore_args(part)
        arguments = orbax.args.PyTreeRestore(item=part, restore_args=how, partial_restore=True)
        restored = checkpointer.restore(tmp_path / "state", args=arguments)
    chex.assert_trees_all_equal(restored["rms"], state[0])


class Model(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def optimizer_of_nnx(accumulator):
    return nnx.Optimizer(Model(), rmsprop(0.1, momentum=0.9, accumulator=accumulator), wrt=nnx.Param)


@each_accumulator(EVERY)
def test_a_pure_dict_of_flax_nnx(accumulator):
    model, made = Model(), optimizer_of_nnx(accumulator)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    made.update(model, grads)
    pure = nnx.to_pure_dict(nnx.state(made))
    fresh = optimizer_of_nnx(accumulator)
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(fresh, state)
    assert_same_leaves(nnx.to_pure_dict(nnx.state(fresh)), pure)
    fresh.update(model, grads)
    other = nnx.state(optimizer_of_nnx("uint8" if accumulator != "uint8" else "float32"))
    with pytest.raises((KeyError, ValueError)):
        nnx.replace_by_pure_dict(other, pure)


def assert_same_leaves(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
