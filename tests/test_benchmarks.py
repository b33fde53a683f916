"""The benchmarks run in their short form, print what they measured, and keep nothing."""

import importlib
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import _frame, _run, bandwidth, gpu, minatar, side_by_side, step, tables, torch_side

# The quick ones: `python -m benchmarks` runs all, in four minutes.
SHORT = {  # a benchmark, and how the lines that it is to print begin
    "eager": r" +10 (plain|momentum|centered, momentum) ",
    "scale": r"\| [\d,]+ \| ",
    "trace": r" +20 (plain|momentum|centered, momentum) ",
}
ROWS = {"eager": 3, "scale": 8, "trace": 3}


def kept():
    return {path: path.stat().st_mtime_ns for path in _frame.RESULTS.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_short_run_prints_every_row_and_keeps_nothing(name, capsys):
    before = kept()
    importlib.import_module(f"benchmarks.{name}").main(["--short"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if re.match(SHORT[name], line)]
    assert len(rows) == ROWS[name], "\n".join(lines)
    assert all(re.search(r"\d", row) and "nan" not in row for row in rows)
    assert kept() == before


@pytest.mark.parametrize("name", ["eager", "scale", "step", "trace", "train"])
def test_tables_have_a_cell_for_every_column(name):
    data = json.loads((_frame.RESULTS / f"{name}.json").read_text())
    for block in re.split(r"\n(?!\|)", importlib.import_module(f"benchmarks.{name}").table(data)):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, lines


def test_a_gpu_that_was_not_there_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in ("step_gpu", "gpu"):
        assert tables.filled(f"<!-- table {name} -->") == "Not measured."
    with pytest.raises(FileNotFoundError):
        tables.filled("<!-- table step -->")


def test_the_tests_for_a_gpu_are_there():
    _, full, short = gpu.PARTS["tests"]
    assert all((gpu.ROOT / name).is_file() for name in (*full, *short))


@pytest.mark.slow
def test_all_that_a_gpu_is_needed_for_runs_in_short(tmp_path):
    before = kept()
    command = [sys.executable, "-m", "benchmarks", "gpu", "--short", "--out", tmp_path]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=500)
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["ended"] for name, part in data["parts"].items()} == dict.fromkeys(
        gpu.PARTS, "done"
    ), done
    tests = data["parts"]["tests"]["tests"]
    assert tests["passed"] == tests["collected"] > 5
    for name in ("memory", "rows", "scale", "step"):
        part = json.loads((tmp_path / f"{name}.json").read_text())
        assert part["not_run"] == {}, name
        assert "jax" in part["environment"], name
        importlib.import_module(f"benchmarks.{name}").table(part)
    assert (tmp_path / "log.txt").read_text() in done.stdout
    assert kept() == before


def test_a_run_begins_only_what_would_end_in_time_and_says_what_it_left_out(monkeypatch, tmp_path):
    now = 0.0
    monkeypatch.setattr(_run.time, "monotonic", lambda: now)

    def takes(seconds):
        nonlocal now
        now += seconds
        return seconds

    def fails():
        raise MemoryError("so many bytes")

    options = _run.parser("x", "", "").parse_args(["--out", str(tmp_path), "--seconds", "10"])
    run = _run.Run("x", options)
    cases = {"first": lambda: takes(3), "large": fails, "second": lambda: takes(5), "third": lambda: takes(1)}
    for row in run.measured(cases):
        data = json.loads((tmp_path / _frame.result("x").name).read_text())
        assert data["rows"][-1] == row  # written before the next case begins
        if row == 3:
            assert data["not_run"] == dict.fromkeys(("large", "second", "third"), "not reached")
    data = json.loads((tmp_path / _frame.result("x").name).read_text())
    assert data["rows"] == [3, 5]
    assert data["not_run"] == {"large": "MemoryError: so many bytes", "third": "no time left"}


def test_a_part_is_ended_with_all_that_it_started_when_its_time_is_over(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text(
        "import subprocess, sys\nprint('begun', flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    lines = []
    ended, _ = gpu.run_part(["endless"], 2, lines.append)  # it would hang here if the other process lived on
    assert ended == "time is over"
    assert lines == ["begun\n"]


@pytest.mark.parametrize(
    "lines",
    [
        "collected 9 items / 3 selected\nt.py::a[x - y] PASSED [ 33%]\nt.py::b FAILED [ 66%]\nE   so\n",
        "4 workers [3 items]\n[gw0] [ 33%] PASSED t.py::a[x - y] \n[gw1] [ 66%] FAILED t.py::b \nE   so\n",
    ],
    ids=["one process", "several"],
)
def test_outcomes_of_tests_are_read_also_where_they_were_ended(lines):
    assert gpu.outcomes(lines.splitlines(keepends=True)) == {
        "collected": 3,
        "passed": 1,
        "failed": 1,
        "error": 0,
        "skipped": 0,
        "not_passed": ["t.py::b"],
        "errors": ["E   so"],
    }


def test_sides_take_turns_and_a_side_may_measure_itself():
    calls = []

    def ours():
        calls.append("ours")
        return jnp.zeros(2)

    def elsewhere():
        calls.append("elsewhere")
        return 0.5

    rounds = 20
    seconds = side_by_side.alternate({"ours": ours, "elsewhere": elsewhere}, rounds, repeat=2)
    turns = [tuple(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    there = ("ours", "ours", "elsewhere", "elsewhere")
    assert set(turns) == {there, there[::-1]}  # either may be the first of a round
    assert len(turns) == rounds + 1  # the first round does not count
    assert seconds["elsewhere"] == [0.5] * rounds
    assert len(seconds["ours"]) == rounds
    assert all(0 < s < math.inf for s in seconds["ours"])


def test_what_is_built_twice_is_built_there_and_back_and_counts_as_one():
    order = []
    sides = side_by_side.built_twice({name: lambda name=name: order.append(name) or name for name in "ab"})
    assert order == ["a", "b", "b", "a"]
    seconds = {name: [float(i), 1.0] for i, name in enumerate(sides)} | {"alone": [7.0, 8.0]}
    assert side_by_side.pooled(seconds) == {"a": [1.5, 1.0], "b": [1.5, 1.0], "alone": [7.0, 8.0]}


@pytest.mark.parametrize("name", bandwidth.KERNELS)
def test_a_stream_counts_the_bytes_of_its_arrays_and_runs_in_place(name):
    side = bandwidth.Stream(name, 1000)
    first = side.arrays[0]
    out = side()
    assert out.shape == (1000,)
    assert first.is_deleted()  # the result has its buffer
    operands = len(side.arrays) + ("in place" in name)
    assert side.bytes == 4000 * operands


@pytest.mark.parametrize(("form", "per_parameter"), [*zip(step.FORMS, (20, 28, 28, 36), strict=True)])
def test_a_step_moves_its_arrays_once(form, per_parameter):
    params = [jnp.zeros(10), jnp.zeros((3, 5))]
    state = optax.rmsprop(1e-3, **step.FORMS[form]).init(params)
    read_and_written = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    assert step.moved_bytes(params, step.FORMS[form]) == 2 * read_and_written + 4 * 25 == per_parameter * 25


def test_without_pytorch_its_steps_are_absent(monkeypatch):
    monkeypatch.setattr(torch_side.importlib.util, "find_spec", lambda name: None)
    with torch_side.TorchProcess() as torch:
        assert torch.step("torch foreach", [(3,)], {}, "cpu") is None
        torch.clear()


@pytest.mark.slow
def test_pytorch_in_its_process_measures_itself_and_says_what_it_cannot(capsys):
    pytest.importorskip("torch")
    with torch_side.TorchProcess() as torch:
        step = torch.step("torch foreach", [(3,), (2, 2)], {"momentum": 0.9, "centered": True}, "cpu")
        assert 0 < step() < 10
        assert torch.step("torch single", [(3,)], {"momentum": -1.0}, "cpu") is None
    assert "torch single is not measured: Invalid momentum value" in capsys.readouterr().out


def test_minatar_goes_on_and_shows_what_there_is(tmp_path):
    """What is finished is not run again, what is not goes on, and what has not been run says so."""
    job = minatar.Job("breakout", minatar.AUTHORS, -9, 200_000, 2)
    assert minatar.summary(job, tmp_path) is None
    command = minatar.command(job, tmp_path)
    assert command[command.index("--step-size") + 1] == "0.001953125"
    assert "--resume" not in command
    # Two seeds, an episode every 500 frames: of return 1, then 3, in all; and of 2 more.
    episodes = [[(500 * i, float(1 + 2 * (i > 100) + of)) for i in range(1, 201)] for of in (0, 2)]
    done = {"frames": 100_000, "seeds": 2, "seconds": 50.0, "episodes": episodes}
    (tmp_path / "returns.json").write_text(json.dumps(done))
    assert "--resume" in minatar.command(job, tmp_path)
    assert minatar.command(job._replace(frames=100_000), tmp_path) is None
    row = minatar.summary(job, tmp_path)
    assert row["curves"] == [[1.0, 1.0, 2.0, 3.0], [3.0, 3.0, 4.0, 5.0]]  # of the last 100 episodes
    assert row["frames_per_second"] == 4000
    assert minatar.of_seeds(row, 100_000) == "4.0 (3.0 to 5.0)"
    assert minatar.of_seeds(row, 150_000) == "not run"
    assert not minatar.finished(job, [row])
    assert minatar.finished(job._replace(frames=100_000), [row])
    assert not minatar.finished(job._replace(log2_step_size=-8), [row])
    other = row | {"log2_step_size": -8}
    folders = {job: tmp_path, job._replace(log2_step_size=-8): tmp_path / "none"}
    assert minatar.together(folders, [other]) == [row, other]
    longer, fewer = row | {"frames": 200_000}, row | {"seeds": 1}
    assert minatar.together({job: tmp_path}, [longer]) == [longer]  # until this run has come as far
    assert minatar.together({job: tmp_path}, [fewer]) == [row]
    data = {"rows": [row, other]}
    assert "| breakout | 2^-9 | 100,000 | 4.5 | 4.0 (3.0 to 5.0) | 2 |" in minatar.table(data)
    assert "2^-8" not in minatar.table(data)
    assert "| 2^-9 | 10.3 | 4.0 (3.0 to 5.0) | 2 |" in minatar.sensitivity(data)
    assert "| `conventions.torch` | 2^-8 | 4.0 (3.0 to 5.0) | not run | not run | 2 |" in minatar.optimizers(
        data
    )
