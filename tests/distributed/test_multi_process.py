"""examples/multi_process.py with real processes: that it learns, ends cleanly, and loses nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax", reason="the examples' extra is not installed")

import jax
import jax.numpy as jnp
from killed_runs import assert_equal_runs, saved
from shortened import AS_USERS, EXAMPLES, ROOT, assert_drawn, copied, example

STEPS, EVERY = 18, 6
SHORT = (f"--steps={STEPS}", f"--every={EVERY}")
ONE_BY_TWO = ("--processes=1", "--devices=2")
TWO_BY_FOUR = ("--processes=2", "--devices=4")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    own = {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | AS_USERS | own


@pytest.fixture(scope="module")
def start(environment, tmp_path_factory):
    """Starts the example, copied with the file that it tells to copy."""
    program = copied("multi_process", tmp_path_factory.mktemp("copied"))

    def start_with(*args):
        command = [sys.executable, program.name, *SHORT, *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=program.parent, env=environment, text=True, **pipes)

    return start_with


def finish(process, code=0):
    """What the example has printed, on stdout and on stderr, when it has ended with that exit status."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, output + errors
    assert not re.search(r"\w+Warning:", errors), errors
    return output, errors


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return out, finish(start(*TWO_BY_FOUR, "--out", out))[0]


def copy_of(undisturbed, tmp_path):
    return shutil.copytree(undisturbed[0], tmp_path / "run")


@pytest.mark.slow
def test_it_learns_draws_and_prints(undisturbed):
    out, output = undisturbed
    _, history = saved(out, STEPS)
    assert len(history["train"]) == STEPS
    assert [step for step, _ in history["valid"]] == [6, 12, 18]
    assert f"unseen text: {history['valid'][-1][1]:.3f}" in output
    assert history["valid"][-1][1] < history["train"][0] - 0.5
    assert len(re.match(r"Processes (.*)\.", output)[1].split()) == 2
    assert "Gloo" not in output

    total = int(re.search(r"state has ([\d,]+) bytes", output)[1].replace(",", ""))
    lines = [line.split(": ")[1].split(", ") for line in output.splitlines() if "    process " in line]
    held = np.array([[int(size.replace(",", "")) for size in line] for line in lines])
    assert held.shape == (2, 4)
    assert np.all(held == held[0, 0])
    assert total / 8 <= held[0, 0] < total / 7  # but for counts, which eight devices cannot share out
    assert_drawn(out / "multi_process.png")


@pytest.mark.slow
def test_on_other_devices_it_starts_from_the_same_bits_and_goes_on(start, undisturbed, tmp_path):
    """From two processes of four devices to one of two, and from there to two of four."""
    there, back = copy_of(undisturbed, tmp_path), tmp_path / "back"
    finish(start(*ONE_BY_TWO, "--out", back))
    expected, expected_history = saved(undisturbed[0], STEPS)
    for out, devices in ((there, ONE_BY_TWO), (back, TWO_BY_FOUR)):
        shutil.rmtree(out / "checkpoints" / str(STEPS))
        output, _ = finish(start(*devices, "--resume", "--out", out))
        assert f"Continuing after step {STEPS - EVERY}." in output
        actual, history = saved(out, STEPS)
        # Gradients are summed up in another order, 1e-7 of them, in 18 steps of 0.002 at most.
        np.testing.assert_allclose(history["train"], expected_history["train"], rtol=1e-5)
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(actual[name], array, 0, 1e-5 * np.abs(array).max(), err_msg=name)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(start, undisturbed, tmp_path):
    """A bit in the largest part that the second process wrote; then in the other checkpoint too."""
    out = copy_of(undisturbed, tmp_path)
    newest, before = (out / "checkpoints" / str(step) for step in (STEPS, STEPS - EVERY))
    parts = (newest / "state" / "ocdbt.process_1" / "d").iterdir()
    flip_a_bit(max(parts, key=lambda path: path.stat().st_size), -1)
    output, errors = finish(start(*TWO_BY_FOUR, "--resume", "--out", out))
    assert f"Checkpoint {newest} is refused: it is incomplete, or has changed." in errors
    assert f"Continuing after step {STEPS - EVERY}." in output
    assert_equal_runs(saved(out, STEPS), saved(undisturbed[0], STEPS))
    assert newest.with_suffix(".refused").is_dir()

    for path in (newest, before):
        shutil.rmtree(path / "state" / "d")
    _, errors = finish(start("--processes=1", "--resume", "--out", out), code=2)
    for path in (newest, before):
        assert f"Checkpoint {path} is refused" in errors
    assert f"no checkpoint in {out / 'checkpoints'} can be used" in errors


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damage_of_any_kind_is_refused(tmp_path, capsys):
    """Every file of a checkpoint in turn: cut short, missing, or with a bit that has changed."""
    multi_process = example("multi_process")

    def tree(step):
        return {"w": jnp.full((64, 64), step, jnp.float32), "codes": jnp.full(3, step, jnp.uint8)}

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree(0))
    with multi_process.manager(tmp_path / "good") as checkpoints:
        for step in (1, 2):
            multi_process.save(checkpoints, step, tree(step), {"step": step})

    def restored(damage):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "damaged")
        damage()
        state, about = multi_process.restore(tmp_path / "damaged", like)
        jax.tree.map(np.testing.assert_array_equal, state, tree(about["step"]))
        assert ("2 is refused: " in capsys.readouterr().err) == (about["step"] == 1)
        return about["step"]

    assert restored(lambda: None) == 2
    newest = tmp_path / "damaged" / "checkpoints" / "2"
    for path in [path for path in (tmp_path / "good" / "checkpoints" / "2").rglob("*") if path.is_file()]:
        file = newest / path.relative_to(tmp_path / "good" / "checkpoints" / "2")
        assert restored(file.unlink) == 1
        if path.stat().st_size:
            assert restored(lambda file=file: os.truncate(file, file.stat().st_size - 1)) == 1
            assert restored(lambda file=file: flip_a_bit(file, 0)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one is killed", "the launcher is stopped", "the launcher is killed"])
def test_they_end_together(start, tmp_path, case):
    process = start(*TWO_BY_FOUR, "--steps=100000", "--every=2", "--out", tmp_path)
    printed = process.stdout.readline()
    pids = [int(pid) for pid in re.findall(r"\d+", printed)]
    while not (tmp_path / "checkpoints" / "2").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    if case == "one is killed":
        os.kill(pids[1], signal.SIGKILL)
        _, errors = finish(process, code=1)
        assert "Process 1 of 2 has ended with -9; so have the others." in errors
    elif case == "the launcher is killed":
        process.kill()
        process.communicate(timeout=60)
    else:
        process.send_signal(signal.SIGTERM)
        output, _ = finish(process, code=128 + signal.SIGTERM)
        done = re.search(r"Stopped after step ([\d,]+), and saved", output)[1].replace(",", "")
        assert (tmp_path / "checkpoints" / done / "sha256").is_file()
    end = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_it_says_what_is_wrong(start, undisturbed, tmp_path):
    _, errors = finish(start("--processes=1", "--devices=3", "--out", tmp_path), code=2)
    assert errors.strip() == "A batch of 64 cannot be shared out evenly among 3 devices."
    _, errors = finish(start("--processes=1", "--every=5", "--resume", "--out", undisturbed[0]), code=2)
    assert errors.strip() == f"--resume: the checkpoint's run has --every {EVERY}."


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(environment, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(tmp_path)]
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLES}"}
    result = subprocess.run(command, env=environment | path, text=True, capture_output=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) kills", result.stdout)[1]) >= 22
