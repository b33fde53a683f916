"""The examples, shortened: that they learn, draw, print what they promise, and resume exactly."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("flax", reason="the examples' extra is not installed")

import jax
import orbax.checkpoint as ocp
from shortened import EXAMPLES, assert_drawn, run

STEPS = 160
SHORT = (
    f"--steps={STEPS}",
    "--every=40",
    "--width=32",
    "--batch=16",
    "--window=32",
    "--sample=50",
    "--decay=0.9",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts char_rnn.py as a process of its own. They share what they compile."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start_with(*args):
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / "char_rnn.py"), *map(str, args)],
            env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)} | cache,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start_with


def finish(process, code=0):
    """What the process has printed when it has ended, with exit status `code` and without warnings."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert not re.search(r"\w+Warning:", output), output
    return output


def last_checkpoint(out):
    """Every array of the last checkpoint by its path, and the history but for the time taken."""
    with ocp.CheckpointManager(out / "checkpoints") as manager:
        assert manager.latest_step() == STEPS
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), about=ocp.args.JsonRestore())
        restored = manager.restore(STEPS, args=args)
    arrays = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(restored.state)}
    return arrays, {name: x for name, x in restored.about["history"].items() if name != "seconds"}


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """Folder and output of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, finish(start(*SHORT, "--out", out))


def test_char_rnn_learns_draws_and_writes(uninterrupted):
    out, output = uninterrupted
    found = re.findall(r"(unigram|bigram|network) +(\d+\.\d+) nats per character \((\d+\.\d+) bits\)", output)
    loss = {name: float(nats) for name, nats, _ in found}
    assert loss["bigram"] < loss["unigram"] < 3.5
    assert loss["network"] < loss["unigram"]
    for _, nats, bits in found:
        assert float(bits) == pytest.approx(float(nats) / np.log(2), abs=2e-3)  # both are rounded
    assert "the network goes on" in output
    assert_drawn(out / "char_rnn.png")
    assert_drawn(out / "diagnostics.png", most=0.9)
    assert re.search(r"diagnostics.advise:\n +nothing to mend", output)
    _, history = last_checkpoint(out)
    assert len(history["train"]) == STEPS
    assert [step for step, _ in history["valid"]] == [40, 80, 120, 160]
    assert history["valid"][-1][1] == pytest.approx(loss["network"], abs=1e-3)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_resume_continues_exactly(start, uninterrupted, tmp_path, kind, code):
    """Killed, a run goes on from its last checkpoint; stopped, from where it was: with the same numbers."""
    process = start(*SHORT, "--out", tmp_path)
    while not (tmp_path / "checkpoints" / "40").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(kind)
    stopped = finish(process, code)
    assert kind == signal.SIGKILL or "the same command with --resume continues" in stopped

    output = finish(start(*SHORT, "--out", tmp_path, "--resume"))
    assert 40 <= int(re.search(r"Continuing after step (\d+)", output)[1]) < STEPS
    expected, expected_history = last_checkpoint(uninterrupted[0])
    actual, history = last_checkpoint(tmp_path)
    assert history == expected_history
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resume"], "no checkpoint in"),
        (["--text", "missing.txt"], "Cannot read --text missing.txt"),
        (["--text", "short.txt"], "has 9 characters"),
        (["--learning-rate", "-1"], "not a positive number"),
        (["--decay", "1"], "decay=1.0"),
        (["--compare", "--resume"], "--compare has none"),
    ],
)
def test_char_rnn_says_what_is_wrong(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit) as stopped:
        run("char_rnn", *args, "--out", "out")
    assert stopped.value.code != 0
    assert message in str(stopped.value.code) + capsys.readouterr().err


def test_resume_with_other_settings_is_refused(uninterrupted):
    with pytest.raises(SystemExit, match="the checkpoint's width is 32, this run's is 48"):
        run("char_rnn", *SHORT, "--width=48", "--out", uninterrupted[0], "--resume")


@pytest.mark.slow
def test_compare_tries_every_method(tmp_path):
    """Here on a text of one's own, short and with letters that its training part lacks."""
    (tmp_path / "own.txt").write_text("abcdefgh \n" * 100 + "äöü" * 10, encoding="utf-8")
    small = ("--steps=6", "--every=3", "--width=8", "--batch=4", "--window=16")
    output = run("char_rnn", "--compare", "--text", tmp_path / "own.txt", *small, "--out", tmp_path)
    row = r"^(SGD|momentum 0.9|optax.rmsprop|rmsprop|rmsprop, warm-up) {2,}(\d.*)$"
    rows = dict(re.findall(row, output, re.MULTILINE))
    assert len(rows) == 5
    assert rows["rmsprop"] == rows["optax.rmsprop"]  # step for step the same
    assert rows["rmsprop"] != rows["rmsprop, warm-up"]
    assert_drawn(tmp_path / "compare.png")


def test_noisy_gradients_prints_the_textbook_figures(tmp_path):
    output = run("noisy_gradients", "--out", tmp_path / "noisy.png")
    rows = [line.split() for line in output.splitlines() if re.match(r" *[1-5] ", line)]
    assert [row[3] for row in rows[:3]] == ["0.316", "-0.204", "0.226"]
    assert [row[6] for row in rows[:3]] == ["0.316", "0.229", "0.192"]
    assert_drawn(tmp_path / "noisy.png")


@pytest.mark.slow
def test_troubles_are_found_and_mended(tmp_path):
    output = run("troubles", "--steps=500", "--out", tmp_path / "troubles.png")
    assert re.findall(r"^(\w[\w ]+), steps|^(\w[\w ]+) in .*, steps", output, re.MULTILINE) == [
        ("The loss explodes", ""), ("Unstable start", ""), ("Stale accumulator", "")
    ]  # fmt: skip
    assert output.count("advise now says nothing") == 3
    for before, after in re.findall(r"last 50 steps (\S+) -> (\S+);", output):
        assert float(after) < float(before)
    assert_drawn(tmp_path / "troubles.png")
