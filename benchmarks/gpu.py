"""All that a GPU is needed for, in one command that ends within nine minutes, with its data in one folder.

    make gpu OUT=FOLDER                              with a JAX for CUDA, which it installs if there is none
    python -m benchmarks gpu --out FOLDER            the same with the JAX that is there
    python -m benchmarks gpu --out FOLDER --short    small, on any machine, to see that it works

The parts are the benchmarks step, memory, rows and scale, and the tests of the numbers. Each is a process of
its own, which has the GPU for itself, begins nothing that would not end in its time, and is ended when its
time is over. A part writes its data after every case, so that nothing is lost: NAME_gpu.json is what
`python -m benchmarks NAME` keeps, and which cases were not run, and why. gpu.json says of each part how it
ended, and what the tests came to; log.txt has all that was printed.

What a step is measured beside: the bandwidth of a copy, and of three more kernels, in the same turns
(`bandwidth.py`). Counted in the compiled program: kernels and other operations, copies among them, and
temporary bytes.

The site shows the figures once the folder's json files are in benchmarks/results.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks._frame import markdown, parser

ROOT = Path(__file__).parents[1]
_TREES = ["--trees", "one leaf", "transformer", "200 leaves"]
_TESTS = (
    *("test_rounding", "test_updates", "test_transform", "test_accumulators_codes", "test_accumulators_step"),
    *(
        "test_accumulators_state",
        "test_rows_exact",
        "parity/test_optax",
        "test_optimizer",
        "test_conventions",
    ),
)
# Seconds at most, and what is run by `python -m`, in full and short. The last has what the others leave.
PARTS = {
    "step": (190, ["benchmarks", "step", *_TREES], ["benchmarks", "step", "--no-peers", *_TREES[:2]]),
    "memory": (100, ["benchmarks", "memory"], ["benchmarks", "memory", "--no-peers"]),
    "tests": (120, [f"tests/{name}.py" for name in _TESTS], ["tests/test_schedules.py"]),
    "rows": (90, ["benchmarks", "rows", "--batches", "4096"], ["benchmarks", "rows", "--tables", "1e4"]),
    "scale": (120, ["benchmarks", "scale"], ["benchmarks", "scale"]),
}
_PYTEST = ["pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow"]
_PYTEST += ["-n", "4"] if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8 else []
_ABOUT = """
import json, jax
from benchmarks._frame import environment
print(json.dumps({"backend": jax.default_backend(), **environment()}))
"""
LEAST = 15  # seconds that a part needs to be begun


def about():
    """The backend, the device and the versions, from a process that gives the GPU back."""
    done = subprocess.run(
        [sys.executable, "-c", _ABOUT], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def nvidia_smi():
    """What the driver says of the GPU, or None."""
    fields = (
        "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.mem,power.limit,utilization.gpu"
    )
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None


def run_part(arguments, seconds, write):
    """Runs a process, writes its lines as they come, and ends it with all that it started when time is over.

    Returns how it ended, and its lines.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if arguments[0] == "pytest":
        # Several at once, and matrix products as exact as what they are compared with.
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    late, lines = threading.Event(), []
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:

        def end():
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            for line in process.stdout:
                lines.append(line)
                write(line)
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    code = process.returncode
    return "time is over" if late.is_set() else "done" if code == 0 else f"exit code {code}", lines


def outcomes(lines):
    """How many tests pytest found and how many came to what; which did not pass, and its errors' lines."""
    text = "".join(lines)
    found = re.findall(rf"^(\S+::.*?) ({_OUTCOME})\b", text, re.MULTILINE)
    found += [
        (test, word)
        for word, test in re.findall(rf"^\[gw.*\] ({_OUTCOME}) (\S+::.*?) *$", text, re.MULTILINE)
    ]
    said = (re.search(pattern, text) for pattern in (r"(\d+) selected", r"(?:collected |\[)(\d+) items?"))
    return {
        "collected": next((int(match[1]) for match in said if match), 0),
        **{word.lower(): sum(word == other for _, other in found) for word in _OUTCOME.split("|")},
        "not_passed": [test for test, word in found if word in ("FAILED", "ERROR")],
        "errors": [line.strip() for line in lines if line.startswith("E  ")][:200],
    }


_OUTCOME = "PASSED|FAILED|ERROR|SKIPPED"


def table(data):
    """How each part ended."""
    cells = []
    for name, part in data["parts"].items():
        tests = part.get("tests")
        counts = (
            "" if tests is None else ", ".join(f"{n} {k}" for k, n in tests.items() if isinstance(n, int))
        )
        cells.append((name, part["ended"], f"{part['seconds']:.0f} s", counts))
    return markdown(["part", "ended", "took", "tests"], cells)


def main(argv=None):
    options = parser("gpu", __doc__, short="small, on any machine")
    options.add_argument("--out", type=Path, required=True, help="a folder for all data")
    options.add_argument("--seconds", type=float, default=530, help="in which all of it ends")
    args = options.parse_args(argv)
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended from outside."))  # with the part that runs
    args.out.mkdir(parents=True, exist_ok=True)
    where = about()
    backend = where.pop("backend")
    if backend == "cpu" and not args.short:
        sys.exit("JAX finds no GPU here: `make gpu`, or --short on a CPU.")
    data = {"environment": where, "backend": backend, "nvidia_smi": nvidia_smi(), "parts": {}}
    with (args.out / "log.txt").open("w", buffering=1) as log:

        def write(text):
            sys.stdout.write(text)
            sys.stdout.flush()
            log.write(text)

        write(f"{where}\n{data['nvidia_smi'] or 'no nvidia-smi'}\n")
        for name, (most, full, short) in PARTS.items():
            now = time.monotonic()
            seconds = min(most, args.seconds - (now - begun))
            write(f"== {name}, at {now - begun:.0f} s, {seconds:.0f} s at most\n")
            arguments = short if args.short else full
            if name == "tests":
                arguments = [*_PYTEST, *arguments]
            else:
                arguments = [*arguments, "--out", str(args.out.resolve()), "--seconds", f"{seconds - 5:.0f}"]
                arguments += ["--short"] if args.short else []
            ended, lines = (
                run_part(arguments, seconds, write) if seconds >= LEAST else ("not run: no time left", [])
            )
            part = data["parts"][name] = {"ended": ended, "seconds": time.monotonic() - now}
            if name == "tests":
                part["tests"] = outcomes(lines)
            write(f"== {name}: {ended}, after {part['seconds']:.0f} s\n")
            (args.out / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")
        write(table(data) + "\n")
