"""Checkpoints of examples/_sharded_checkpoints.py with damage of many kinds: it is noticed, or harmless.

Run by tests/distributed/test_multi_process.py: in a process of its own, since Orbax leaves coroutines behind
when it cannot read. By hand: PYTHONPATH=examples:. python tests/distributed/damaged_checkpoints.py FOLDER
"""

import contextlib
import io
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def tree(step):
    w = jnp.arange(4096.0).reshape(64, 64) + step
    return {"w": w, "small": jnp.full((3,), step, jnp.bfloat16), "codes": jnp.arange(100, dtype=jnp.uint8)}


def damage_every_file(folder):
    """Every file of a checkpoint in turn: cut short, missing, or with a bit that has changed."""
    import _sharded_checkpoints as checkpoints  # here, as pytest looks for doctests in this file

    good, damaged = folder / "good", folder / "damaged"
    with checkpoints.open_manager(good) as manager:
        for step in (1, 2):
            checkpoints.save(manager, step, tree(step), {"step": step})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree(0))
    rng = random.Random(0)
    refused = set()
    for path in [path for path in sorted((good / "2").rglob("*")) if path.is_file()]:
        for kind in ("flipped", "flipped", "cut", "missing"):
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(good, damaged)
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            if kind == "cut":
                del content[rng.randrange(len(content)) :]
            file = damaged / path.relative_to(good)
            file.unlink() if kind == "missing" else file.write_bytes(content)
            with contextlib.redirect_stderr(io.StringIO()) as said:
                step, state, about = checkpoints.restore(damaged, like, check=lambda about: None)
            assert about["step"] == step
            jax.tree.map(np.testing.assert_array_equal, state, tree(step))
            is_named = f"Checkpoint {damaged / '2'} is refused: " in said.getvalue()
            assert is_named == (step == 1)
            refused |= {kind} if is_named else set()
            print(said.getvalue(), end="")
    assert refused == {"flipped", "cut", "missing"}


def flip_a_bit(folder, step, part):
    """In one part of a checkpoint: so that Orbax restores other numbers than before, and says nothing."""
    from killed_runs import saved

    good, _ = saved(folder, step)
    files = [path for path in (folder / "checkpoints" / str(step) / part).rglob("*") if path.is_file()]
    rng = random.Random(0)
    for path in rng.choices(files, k=200):
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1
        path.write_bytes(damaged)
        with contextlib.suppress(Exception):
            found, _ = saved(folder, step)
            if any(not np.array_equal(found[name], array) for name, array in good.items()):
                return
        path.write_bytes(content)
    sys.exit("Orbax has noticed each of 200 bits.")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        damage_every_file(Path(sys.argv[1]))
    else:
        flip_a_bit(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
