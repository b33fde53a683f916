"""How many small changes to the package its tests notice: one place is changed at a time, its tests are run.

cosmic-ray finds the places and makes the changes: a `+` into a `-`, a `<` into a `<=`, an 8 into a 9, a
condition into its negation, a decorator or a loop removed. Each is made in a copy of the repository, where
the quick tests that belong to the file are run until one fails. For each place one change is drawn, by the
seed. Left out is what nothing depends on: annotations, and the wording of errors.

`benchmarks/results/mutants.json` has for each file how many changes were tried and noticed, and every change
that was not, with the reason why it changes nothing or, where nobody has found one, null.
"""

import argparse
import ast
import collections
import contextlib
import difflib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

import optax  # noqa: F401  # and JAX, imported once for all tests
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
GOAL = 0.95
SECONDS = 600  # for the tests of one change, then they count as failed: a loop may not end

# The tests of each file, the most telling ones first.
TESTS = {
    "_division": "transform derivatives rounding factored composition",
    "_parts": "optimizer drop_in every_factory rows_refusals composition derivatives compiled",
    "_rule": "transform derivatives accumulators_step compiled composition diagnostics_settings",
    "accumulators/__init__": "accumulators_state adding factored_state",
    "accumulators/_base": "accumulators_step transform adding accumulators_state derivatives compiled",
    "accumulators/_codes": "accumulators_codes accumulators_step derivatives accumulators_state",
    "accumulators/_factored": "factored factored_state accumulators_state",
    "diagnostics/_figures": "diagnostics_measure diagnostics_watch diagnostics_inside_jax",
    "diagnostics/_measure": "diagnostics_measure diagnostics_settings diagnostics_inside_jax",
    "diagnostics/_run": "diagnostics_figures diagnostics_advise diagnostics_settings diagnostics_watch",
    "diagnostics/_troubles": "diagnostics_figures diagnostics_advise",
    "diagnostics/_watch": "diagnostics_watch diagnostics_inside_jax diagnostics_settings",
    "interop/_arrays": "interop interop_states interop_files interop_dialects",
    "interop/_carry": "interop interop_partial interop_groups interop_states interop_optax",
    "interop/_checkpoints": "interop_groups interop_dialects interop interop_files",
    "interop/_files": "interop_files interop_dialects",
    "interop/_keras": "interop interop_dialects interop_partial interop_files",
    "interop/_match": "interop interop_partial interop_groups interop_dialects",
    "interop/_moments": "interop_states interop_groups interop_optax interop",
    "interop/_names": "interop interop_partial interop_groups",
    "interop/_optax": "interop_optax interop_states interop_partial",
    "interop/_resume": "interop_groups interop_partial interop_dialects interop",
    "interop/_torch": "interop interop_groups interop_partial interop_states",
    "interop/_upgrade": "upgrade",
    "interop/_variables": "interop_dialects interop_files interop",
    "optimizer": "optimizer accumulators_state drop_in every_factory",
    "rounding": "rounding accumulators_codes updates optimizer derivatives",
    "rows/_gradient": "rows_gradients updates rows_exact rows_refusals rows_inside_optax rows_compiled "
    "export sharding",
    "rows/_lookup": "rows_gradients rows_refusals rows_compiled rows_recipes",
    "rows/_touched": "rows_exact rows_lazy rows_refusals rows_inside_optax rows_compiled "
    "every_factory export",
    "rows/_values": "rows_inside_optax",
    "schedules": "schedules",
    "sharding": "sharding",
    "transform": "transform_refusals transform accumulators_state drop_in every_factory composition "
    "factored_state sharding",
    "updates": "updates rows_gradients rows_exact compiled",
}


def mutants(name, seed):
    """One change for each place of a file, in random order: what it is, and the changed file."""
    from cosmic_ray.commands import init
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator
    from cosmic_ray.work_db import use_db

    path = ROOT / "rmsprop_jax" / f"{name}.py"
    source = path.read_text()
    left_out = list(_left_out(ast.parse(source)))
    places = collections.defaultdict(list)
    with use_db(":memory:") as found:
        init([path], found, {})
        every = [change for item in found.work_items for change in item.mutations]
    for change in every:
        if _alike(change) and not any(start <= change.start_pos < end for start, end in left_out):
            places[change.start_pos, change.operator_name.split("_")[0]].append(change)
    rng = random.Random(f"{seed} {name}")
    changes = [rng.choice(places[place]) for place in sorted(places)]
    for change in rng.sample(changes, len(changes)):
        operator = get_operator(change.operator_name)(**change.operator_args)
        changed = mutate_code(source, operator, change.occurrence)
        with contextlib.suppress(SyntaxError):  # the ** of a call is no power
            compile(changed, path, "exec")
            yield _described(change, name, source, changed), changed


def _described(change, name, source, changed):
    lines = [*difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0)][3:]
    lines = [line for line in lines if line[1:].strip()]
    before, after = ("\n".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return {"file": name, "where": change.definition_name or "the module", "before": before, "after": after}


# What replaces an operator is one of its kind: others raise TypeError, which every test would notice.
KINDS = [
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
    {"USub", "UAdd"},
    {"Delete", "Not"},
]


def _alike(change):
    _, *operators = change.operator_name.split("_")
    return len(operators) < 2 or any(set(operators) <= kind for kind in KINDS)


def _left_out(tree):
    """From where to where annotations, errors and the `strict` of zip stand."""
    for node in ast.walk(tree):
        fields = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.Raise | ast.JoinedStr) or getattr(node, "arg", None) == "strict":
            fields.append(node)
        for x in filter(None, fields):
            yield (x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)


def first_failure(names, folder):
    """What fails first of the tests of these files in a copy of the repository; None if all pass."""
    tests = dict.fromkeys(test for name in names for test in TESTS[name].split())
    files = [*(f"rmsprop_jax/{name}.py" for name in names), *(f"tests/test_{test}.py" for test in tests)]
    log = folder / "log.txt"
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, files, log))
    process.start()
    process.join(SECONDS * len(names))
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "takes too long"
    failed = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return None if process.exitcode == 0 else [*failed, f"pytest ends with {process.exitcode}"][0]


def _pytest(folder, files, log):
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:0] = [str(folder)]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Failed ones first: a test that noticed an earlier change of a file notices a later one.
    options = ["-q", "-x", "--ff", "--tb=no", "--unoptimized", "-m", "not slow"]
    os._exit(pytest.main([*options, *files]))


def _noticed(change, changed, folders):
    """The change with what noticed it, None if nothing did, in one of the copies."""
    folder = folders.get()
    path = folder / "rmsprop_jax" / f"{change['file']}.py"
    source, begun = path.read_text(), time.monotonic()
    try:
        path.write_text(changed)
        noticed_by = first_failure([change["file"]], folder)
    finally:
        path.write_text(source)
        # Python takes a compiled file for that of a source of the same size and second.
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
        folders.put(folder)
    return {**change, "noticed_by": noticed_by, "seconds": round(time.monotonic() - begun)}


def _copy(folder):
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")[:-1]:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


KEY = ("file", "where", "before", "after")


def _key(change):
    return tuple(change[name] for name in KEY)


def summary(done, kept):
    """What is kept: for each file how many were tried and noticed; what was not, with the reasons known."""
    files = {}
    for change in done:
        row = files.setdefault(change["file"], {"tried": 0, "noticed": 0, "seconds": 0})
        row["tried"] += 1
        row["noticed"] += change["noticed_by"] is not None
        row["seconds"] += change["seconds"]
    known = {_key(change): change for change in kept.get("unnoticed", ())}
    for change in done:
        change = {name: change[name] for name in (*KEY, "noticed_by")}
        noticed, before = change.pop("noticed_by"), known.pop(_key(change), {})
        if noticed is None:
            known[_key(change)] = {**change, "changes_nothing_because": before.get("changes_nothing_because")}
    files = dict(sorted({**kept.get("files", {}), **files}.items()))
    return {"files": files, "unnoticed": sorted(known.values(), key=_key)}


def score(kept):
    """The share of the tried that were noticed or change nothing."""
    tried, noticed = (sum(row[name] for row in kept["files"].values()) for name in ("tried", "noticed"))
    open_ = sum(change["changes_nothing_because"] is None for change in kept["unnoticed"])
    print(f"{noticed} of {tried} changes noticed; of {len(kept['unnoticed'])} others {open_} are unexplained")
    return 1 - open_ / tried


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks mutants", description=__doc__)
    parser.add_argument("files", nargs="*", default=[*TESTS], help=f"of {', '.join(TESTS)}")
    parser.add_argument("--each", type=int, default=10**6, help="at most so many changes of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="changes that are tried at the same time")
    parser.add_argument("--seconds", type=float, default=10**6, help="begin nothing after so many")
    parser.add_argument(
        "--log", type=Path, default=ROOT / "runs" / "mutants.jsonl", help="what is not tried again"
    )
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.seconds

    options.log = options.log.absolute()  # the tests run in other folders
    options.log.parent.mkdir(parents=True, exist_ok=True)
    options.log.touch()
    tried_before = map(json.loads, options.log.read_text().splitlines())
    done = {_key(change): change for change in tried_before if change["noticed_by"] is not None}
    copies = [options.log.parent / f"copy{i}" for i in range(options.jobs)]
    folders = Queue()
    for copy in copies:
        _copy(copy)
        folders.put(copy)
    of_files = [list(itertools.islice(mutants(name, options.seed), options.each)) for name in options.files]
    if not done and (failure := first_failure(options.files, copies[0])) is not None:
        sys.exit(f"Without any change: {failure}")
    # First one change of each file, then another of each.
    todo = [
        x for of_place in itertools.zip_longest(*of_files) for x in of_place if x and _key(x[0]) not in done
    ]

    def tried(change, changed):
        return None if time.monotonic() > ends else _noticed(change, changed, folders)

    with ThreadPoolExecutor(options.jobs) as pool, options.log.open("a") as log:
        for future in as_completed([pool.submit(tried, *x) for x in todo]):
            if (change := future.result()) is not None:
                print(f"{change['file']}: {change['before']}  ->  {change['after']}")
                print(f"    {change['seconds']} s, {change['noticed_by'] or 'NOT NOTICED'}", flush=True)
                done[_key(change)] = change
                log.write(json.dumps(change) + "\n")
                log.flush()
    kept = summary(done.values(), json.loads(RESULTS.read_text()) if RESULTS.exists() else {})
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(score(kept) < GOAL)
