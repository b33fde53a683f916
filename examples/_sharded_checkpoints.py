"""The checkpoints of multi_process.py: written by all processes in the background, checked when read.

Orbax writes each checkpoint under another name and renames it when all processes have written their part of
it. So a run that is killed leaves whole checkpoints behind, and the one it was at as rubbish that the next
run clears away. When `save` has returned, the arrays may be donated, whatever is still to be written.

Orbax does not notice when a bit of an array changes on the disk. So a number for every array, made of all
its bits and where they stand, is stored beside them and compared when they are back. It is a sum of integers:
the same on any mesh.
"""

import hashlib
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rmsprop_jax import rounding


@jax.jit
def fingerprints(tree):
    """uint32 [leaves]: the sum over each leaf of a hash of (bits, index), for types of up to 32 bits."""

    def fingerprint(leaf, x):
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        return jnp.sum(rounding.mixed(bits ^ rounding.thresholds(x.shape, leaf, 0)), dtype=jnp.uint32)

    return jnp.stack([fingerprint(*pair) for pair in enumerate(jax.tree.leaves(tree))])


def digest(about):
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def open_manager(directory):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory, options=options)


def save(manager, step, state, about):
    """Starts to save the arrays of `state`, and `about`, which JSON must be able to hold."""
    about = about | {"fingerprints": np.asarray(fingerprints(state)).tolist()}
    about = json.loads(json.dumps(about))  # a copy: lists may grow while this one is being written
    about["digest"] = digest(about)
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
    manager.save(step, args=args, force=True)


def restore(directory, like, check):
    """Step, state and `about` of the newest checkpoint in `directory` that is whole; None without one.

    Those that are not are named, and moved out of the way. `like` is a tree of `jax.ShapeDtypeStruct` with
    the shardings to restore to, on whatever mesh. `check(about)` is called before arrays are read.
    """
    if not directory.is_dir():
        return None
    # Each process reads for itself, without waiting for the others: where one fails, they fail together.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"process{me}")
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
    refused = []
    with ocp.CheckpointManager(directory, options=options) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            state, about, problem = read(manager, step, like, check)
            failed = np.ravel(multihost_utils.process_allgather(np.array([problem is not None])))
            if not failed.any():
                problem = difference(state, about)  # the same in every process
                if problem is None:
                    break
            if me == failed.argmax():
                print(f"Checkpoint {directory / str(step)} is refused: {problem}", file=sys.stderr)
            refused.append(directory / str(step))
        else:
            return None
    if me == 0:  # out of the way of the run that goes on, for you to look at
        for path in refused:
            shutil.rmtree(path.with_suffix(".refused"), ignore_errors=True)
            path.rename(path.with_suffix(".refused"))
    multihost_utils.sync_global_devices("refused checkpoints are out of the way")
    return step, state, about


def read(manager, step, like, check):
    """State, `about`, and what is wrong with them: None, as far as one process can tell."""
    try:
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        if digest({name: value for name, value in about.items() if name != "digest"}) != about["digest"]:
            return None, None, "its settings or its history have changed since they were saved"
        check(about)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return manager.restore(step, args=args).state, about, None
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        return None, None, f"{type(error).__name__}: {message:.300}"


def difference(state, about):
    """Names the first array that is not what was saved; None when all are."""
    same = np.asarray(fingerprints(state)) == np.array(about["fingerprints"], np.uint32)
    for (path, _), equal in zip(jax.tree_util.tree_leaves_with_path(state), same, strict=True):
        if not equal:
            return f"{jax.tree_util.keystr(path)} has changed since it was saved"
    return None
