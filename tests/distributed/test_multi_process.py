"""examples/multi_process.py with real processes: that it learns, ends cleanly, and loses nothing."""

import os
import re
import shutil
import signal
import string
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
from shortened import assert_drawn

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "multi_process.py"
STEPS, EVERY = 18, 6
SHORT = (
    f"--steps={STEPS}",
    f"--every={EVERY}",
    "--width=32",
    "--batch=16",
    "--window=16",
    "--decay=0.9",
    "--learning-rate=0.02",
)
# 95 characters: the arrays' parts are too large for the index, where Orbax would notice a bit that flips.
TEXT = string.printable[:95] + "to be or not to be, that is the question; " * 600
ONE_BY_TWO = ("--processes=1", "--devices=2")
TWO_BY_FOUR = ("--processes=2", "--devices=4")


@pytest.fixture(autouse=True, scope="module")
def _importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE.parent)
        yield


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLE.parent}",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def start(environment, tmp_path_factory):
    """Starts the example on a text of its own, short, to validate on it in no time."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)

    def start_with(*args):
        command = [sys.executable, str(EXAMPLE), *SHORT, "--text", str(text), *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    return start_with


@pytest.fixture(scope="module")
def program(environment):
    """Runs a program of this folder, and returns what it prints."""

    def run(name, *args):
        command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, args)]
        result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=900)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


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
    assert f"this network  {history['valid'][-1][1]:.3f}" in output
    assert history["valid"][-1][1] < history["train"][0] - 0.5
    assert len(re.match(r"Processes (.*)\.", output)[1].split()) == 2
    assert "Gloo" not in output

    total = int(re.search(r"state has ([\d,]+) bytes", output)[1].replace(",", ""))
    held = [line.split(": ")[1].split(", ") for line in output.splitlines() if "    process " in line]
    whole = 4 * (2 + len(set(TEXT)))  # two counts, and the head's bias, which eight devices cannot share out
    assert len(set(TEXT)) % 8
    assert held == [[f"{whole + (total - whole) // 8:,}"] * 4] * 2
    assert_drawn(out / "multi_process.png")


@pytest.mark.slow
def test_on_other_devices_it_starts_from_the_same_bits_and_goes_on(start, undisturbed, tmp_path):
    """From two processes of four devices to one of two, and from there to two of four."""
    there, back = copy_of(undisturbed, tmp_path), tmp_path / "back"
    finish(start(*ONE_BY_TWO, "--out", back))
    expected, expected_history = saved(undisturbed[0], STEPS)
    for out, devices in ((there, ONE_BY_TWO), (back, TWO_BY_FOUR)):
        shutil.rmtree(out / "checkpoints" / str(STEPS))
        output, errors = finish(start(*devices, "--resume", "--out", out))
        # Not refused: the fingerprints that the other devices took of whole arrays are those of these.
        assert f"Continuing after step {STEPS - EVERY}." in output
        assert "refused" not in errors
        actual, history = saved(out, STEPS)
        # Gradients are summed up in another order, 1e-7 of them, in 18 steps of 0.02: 4e-7 of the largest
        # number in an array is measured.
        np.testing.assert_allclose(history["train"], expected_history["train"], rtol=1e-5)
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(actual[name], array, 0, 1e-5 * np.abs(array).max(), err_msg=name)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(start, program, undisturbed, tmp_path):
    """A byte in the part that the second process wrote; then in the other checkpoint too."""
    out = copy_of(undisturbed, tmp_path)
    newest, before = (out / "checkpoints" / str(step) for step in (STEPS, STEPS - EVERY))
    program("damaged_checkpoints.py", out, STEPS, "state/ocdbt.process_1/d")
    output, errors = finish(start(*TWO_BY_FOUR, "--resume", "--out", out))
    assert re.search(rf"Checkpoint {newest} is refused: .* has changed since it was saved", errors)
    assert f"Continuing after step {STEPS - EVERY}." in output
    assert_equal_runs(saved(out, STEPS), saved(undisturbed[0], STEPS))
    assert newest.with_suffix(".refused").is_dir()

    for path in (newest, before):
        shutil.rmtree(path / "state" / "d")
    _, errors = finish(start("--processes=1", "--resume", "--out", out), code=2)
    for path in (newest, before):
        assert f"Checkpoint {path} is refused" in errors
    assert f"no checkpoint in {out / 'checkpoints'} can be used" in errors


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
        assert "Process 1 of 2 was killed by SIGKILL; the others have been ended." in errors
    elif case == "the launcher is killed":
        process.kill()
        process.communicate(timeout=60)
    else:
        process.send_signal(signal.SIGTERM)
        output, _ = finish(process, code=128 + signal.SIGTERM)
        done = re.search(r"Stopped after step ([\d,]+), and saved", output)[1].replace(",", "")
        assert (tmp_path / "checkpoints" / done).is_dir()
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


def test_it_says_what_is_wrong(start, tmp_path):
    _, errors = finish(start("--processes=1", "--batch=6", "--out", tmp_path), code=2)
    assert errors.strip() == "--batch 6 cannot be shared out evenly among 4 devices."


@pytest.mark.slow
def test_damage_of_any_kind_is_noticed_or_harmless(program, tmp_path):
    output = program("damaged_checkpoints.py", tmp_path)
    assert "['w'] has changed since it was saved" in output  # which Orbax has not noticed


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(program, tmp_path):
    assert "22 kills" in program("killed_runs.py", tmp_path)


def test_arrays_may_be_donated_once_save_has_returned(tmp_path):
    """Steps that take over the arrays' memory while they are being written."""
    checkpoints = pytest.importorskip("_sharded_checkpoints")
    shape = (1 << 20,)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(shape)
    with checkpoints.open_manager(tmp_path) as manager:
        for i in range(6):
            checkpoints.save(manager, i, {"x": x}, {})
            for k in range(3):
                before, x = x, step(x)
                assert before.is_deleted() or k == 0  # JAX donates no memory that NumPy has its eyes on
            x.block_until_ready()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"x": jax.ShapeDtypeStruct(shape, x.dtype, sharding=device)}
    i, state, _ = checkpoints.restore(tmp_path, like, check=lambda about: None)
    assert i == 5
    assert (np.asarray(state["x"]) == 15).all()
