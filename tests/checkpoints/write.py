"""Writes the states that a released version saves, and what that version goes on to compute from them.

    PYTHONPATH=ITS_FOLDER python tests/checkpoints/write.py tests/checkpoints/VERSION

Run it once for each release; it works under every version as it is. `tests/test_upgrade.py` reads the files
and takes the optimizers from here. Each file holds the states of all optimizers, `truth.npz` their next
updates and parameters.
"""

import functools
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmsprop_jax
from rmsprop_jax import apply_updates, diagnostics, rmsprop, rows

FIRST = rmsprop_jax.__version__ == "0.1.0"  # which has other names
STEPS = 3  # before the state is saved, and as many after it


@functools.cache
def optimizers():
    """The optimizers whose states are saved, by name, in the version that is imported."""
    if FIRST:
        from rmsprop_jax import storage as accumulators
    else:
        from rmsprop_jax import accumulators
    uint8 = accumulators.Uint8(-40)
    labels = {"dense": {"kernel": "codes", "bias": "momentum"}}
    groups = {"codes": rmsprop(0.01, accumulator=uint8), "momentum": rmsprop(0.1, momentum=0.9)}
    watched = rmsprop(0.01, momentum=0.9, accumulator="uint8")
    every = {
        "plain": rmsprop(0.01),
        "momentum": rmsprop(rmsprop_jax.warmup(0.01), momentum=0.9, weight_decay=0.01),
        "centered": rmsprop(0.01, centered=True, momentum=0.9, nesterov=True),
        "bfloat16": rmsprop(0.01, accumulator="bfloat16"),
        "uint8": rmsprop(0.01, accumulator="uint8"),
        "uint8_40": rmsprop(0.01, accumulator=uint8, bias_correction=True),
        "momentum_dtype": rmsprop(0.01, momentum=0.9, momentum_dtype="bfloat16"),
        "inject_hyperparams": optax.inject_hyperparams(rmsprop)(0.01, momentum=0.9, accumulator="uint8"),
        "multi_steps": optax.MultiSteps(optax.chain(optax.clip(2.0), rmsprop(0.01, accumulator=uint8)), 2),
        "partition": optax.partition(groups, labels),
        "watch": diagnostics.watch(watched, 2, capacity=4, **({"decay": 0.9} if FIRST else {})),
        "rows": rows.rmsprop(0.01) if FIRST else rows.exact(rmsprop(0.01)),
    }
    if not FIRST:
        every["factored"] = rmsprop(0.01, accumulator="factored")
        every["factored_4"] = rmsprop(0.01, accumulator=accumulators.Factored(4), momentum=0.9)
        every["watch_factored"] = diagnostics.watch(every["factored_4"], 2, capacity=4)
    return every


def params_of(name):
    """The parameters that an optimizer of that name is run on."""
    if name == "rows":
        return jnp.ones((9, 3))
    kernel = (128, 130) if name == "factored" else (8, 6)  # from 128 on "factored" takes means
    return {"dense": {"kernel": jnp.ones(kernel), "bias": jnp.zeros(kernel[1])}}


def gradients_of(name, step):
    """The gradients of a step: sixteenths of whole numbers, the same on every machine."""
    random = np.random.RandomState(step)
    if name == "rows":
        ids = jnp.asarray(random.randint(0, 9, 4), jnp.int32)
        return rows.RowGradient(ids, _sixteenths(random, (4, 3)), 9)
    return jax.tree.map(lambda p: _sixteenths(random, p.shape), params_of(name))


def _sixteenths(random, shape):
    return jnp.asarray(random.randint(-64, 65, shape) / 16, jnp.float32)


@functools.cache
def step_of(name):
    @jax.jit
    def step(params, state, grads):
        updates, state = optimizers()[name].update(grads, state, params)
        return apply_updates(params, updates), state, updates

    return step


def steps(name, state, first):
    """`STEPS` steps from a state: the last state, and the updates and parameters for `truth.npz`."""
    params, seen = params_of(name), []
    for number in range(first, first + STEPS):
        params, state, updates = step_of(name)(params, state, gradients_of(name, number))
        seen += jax.tree.leaves((updates, params))
    some = [np.ravel(x)[:: max(1, x.size // 64)] for x in seen]  # a part of large arrays
    return state, np.concatenate(some).astype(np.float32)


def main(folder):
    import orbax.checkpoint as ocp
    from flax import serialization

    folder.mkdir(parents=True)
    states, truth = {}, {}
    for name, tx in optimizers().items():
        states[name], _ = steps(name, tx.init(params_of(name)), 0)
        _, truth[name] = steps(name, states[name], STEPS)
    (folder / "states.pickle").write_bytes(pickle.dumps(states))
    (folder / "states.msgpack").write_bytes(serialization.to_bytes(states))
    with tempfile.TemporaryDirectory() as temporary, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(temporary) / "orbax", states)
        checkpointer.wait_until_finished()
        shutil.make_archive(str(folder / "orbax"), "zip", Path(temporary) / "orbax")
    np.savez_compressed(folder / "truth.npz", **truth)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
