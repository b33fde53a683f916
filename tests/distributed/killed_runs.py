"""Runs of examples/multi_process.py, killed at random moments and resumed until they have finished.

Each must end with the bits of a run that nothing disturbs. Run by tests/distributed/test_multi_process.py,
and by hand: PYTHONPATH=examples:. python tests/distributed/killed_runs.py FOLDER

The processes are forked from one that has imported what they need, and this program stands in for the
launcher: after one of two is killed, it kills the other a little later.
"""

import collections
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np

KILLS = 22
STEPS, EVERY = 16, 2
SMALL = [f"--steps={STEPS}", f"--every={EVERY}", "--devices=2"]
forked = multiprocessing.get_context("forkserver")


def worker(index, count, address, *argv):
    """One of `count` processes."""
    import multi_process  # here, as pytest looks for doctests in this file without the examples' folder

    multi_process.main([*argv, "--join", address, str(count), str(index), str(os.getppid())])


class Run:
    """A run in `folder` with some number of processes, from its start to its end or until it is killed."""

    def __init__(self, folder, count):
        from _processes import free_address

        argv = [*SMALL, "--out", str(folder), *["--resume"] * bool(steps_of(folder))]
        self.folder, address = folder, free_address()
        self.processes = [
            forked.Process(target=worker, args=(index, count, address, *argv)) for index in range(count)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, step, seconds=120):
        """Until a checkpoint of this step or a later one has been begun, or the run has ended."""
        end = time.monotonic() + seconds
        while all(process.is_alive() for process in self.processes):
            if max(steps_of(self.folder, begun=True), default=0) >= step:
                break
            assert time.monotonic() < end, "It takes too long."
            time.sleep(0.001)

    def kill(self, victims, others_after):
        """Whether the victims were killed, rather than had come to their end."""
        assert all(process.exitcode in (None, 0) for process in self.processes), "It has failed by itself."
        for process in victims:
            process.kill()
        time.sleep(others_after)
        for process in self.processes:
            process.kill()
            process.join()
        return all(process.exitcode == -9 for process in victims)

    def finish(self):
        for process in self.processes:
            process.join(120)
            assert process.exitcode == 0, f"The run has failed: {process.exitcode}."


def steps_of(folder, begun=False):
    """Steps of the checkpoints in a run's folder that a run goes on from, or of all that have been begun."""
    paths = [*(folder / "checkpoints").glob("*")]
    if not begun:  # its checksum comes last, when Orbax has given a checkpoint its name
        return [int(path.name) for path in paths if path.name.isdigit() and (path / "sha256").exists()]
    pattern = r"(\d+)(\.orbax-checkpoint-tmp.*)?"
    return [int(found[1]) for path in paths if (found := re.fullmatch(pattern, path.name))]


def saved(folder, step):
    """Every array of a checkpoint by its path, and the history of the losses."""
    import orbax.checkpoint as ocp

    path = folder.absolute() / "checkpoints" / str(step)
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path / "state")
        metadata = getattr(metadata, "item_metadata", metadata)  # older Orbax has the tree itself
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        state = checkpointer.restore(path / "state", args=args)
    arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return arrays, json.loads((path / "about" / "metadata").read_text())


def assert_equal_runs(actual, expected):
    (arrays, history), (expected_arrays, expected_history) = actual, expected
    assert history == expected_history
    assert arrays.keys() == expected_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array.view(np.uint32), expected_arrays[name].view(np.uint32), name)


def enough(seen):
    """On a machine that is busy more of the kills fall into a start, and it takes more of them."""
    return seen["kills"] >= KILLS and seen["in the midst of training"] >= KILLS // 2


def main(folder):
    rng = random.Random(0)
    undisturbed, time_to_start = {}, {}
    for count in (1, 2):
        reference = folder / f"undisturbed-{count}"
        before = time.monotonic()
        run = Run(reference, count)
        run.wait_for(EVERY)
        time_to_start[count] = time.monotonic() - before
        run.finish()
        undisturbed[count] = saved(reference, STEPS)

    seen = collections.Counter()
    for number in itertools.count():  # of runs, each killed and resumed until it comes to its end
        if enough(seen):
            break
        count, disturbed = 1 + number % 2, folder / f"killed-{number}"
        while STEPS not in steps_of(disturbed):
            run = Run(disturbed, count)
            if enough(seen):
                run.finish()
                break
            start = max(steps_of(disturbed), default=0)
            if rng.random() < 0.15:
                time.sleep(rng.uniform(0, time_to_start[count]))  # while it starts
            else:  # when a checkpoint is begun or a little later: while it is written, or before the next
                run.wait_for(min(start + EVERY * rng.randint(1, 3), STEPS))
                time.sleep(rng.uniform(0, 0.3))
            one = count > 1 and seen["of one of 2"] <= seen["of all of 2"]
            victims = [rng.choice(run.processes)] if one else run.processes
            if not run.kill(victims, others_after=rng.uniform(0, 0.3) if one else 0):
                continue  # it had ended
            begun = steps_of(disturbed, begun=True)
            seen["kills"] += 1
            seen[f"of {'one' if one else 'all'} of {count}"] += 1
            seen["in the midst of training"] += start < max(begun, default=0) and STEPS not in begun
            seen["while saving"] += set(begun) != set(steps_of(disturbed))
        assert_equal_runs(saved(disturbed, STEPS), undisturbed[count])
        seen["runs, each with the bits of an undisturbed one"] += 1
    for name, times in seen.items():
        print(f"{times:3} {name}")
    assert min(seen["of one of 2"], seen["of all of 2"], seen["of all of 1"]) >= 3
    assert seen["while saving"] >= 3


if __name__ == "__main__":
    forked.set_forkserver_preload(["multi_process"])
    main(Path(sys.argv[1]))
