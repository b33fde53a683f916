"""The table of tests for small changes to the core, and what is kept of how many they notice."""

import json

import pytest

from benchmarks import mutants


def test_every_file_of_the_core_has_tests_that_notice_its_changes():
    package, tests = mutants.ROOT / "rmsprop_jax", mutants.ROOT / "tests"
    core = {path.relative_to(package).with_suffix("").as_posix() for path in package.glob("[ar]*/_[a-z]*.py")}
    assert core <= set(mutants.TESTS)
    assert all((package / f"{name}.py").is_file() for name in mutants.TESTS)
    assert all((tests / f"test_{test}.py").is_file() for x in mutants.TESTS.values() for test in x.split())
    kept = json.loads(mutants.RESULTS.read_text())
    assert set(kept["files"]) == set(mutants.TESTS)
    assert mutants.score(kept) >= mutants.GOAL


def test_a_change_that_is_noticed_again_leaves_the_list_and_the_others_keep_their_reasons():
    def change(after, **more):
        return {"file": "rounding", "where": "mixed", "before": "x + 1", "after": after, **more}

    row = {"tried": 1, "noticed": 1, "seconds": 1}
    kept = {
        "files": {"updates": row},
        "unnoticed": [change(after, changes_nothing_because=after) for after in ("x", "1", "2")],
    }
    done = [
        change("x", noticed_by="a test", seconds=1),
        change("1", noticed_by=None, seconds=2),
        change("new", noticed_by=None, seconds=3),
    ]
    new = mutants.summary(done, kept)
    assert new["files"] == {"rounding": {"tried": 3, "noticed": 1, "seconds": 6}, "updates": row}
    reasons = {x["after"]: x["changes_nothing_because"] for x in new["unnoticed"]}
    assert reasons == {"1": "1", "2": "2", "new": None}
    assert mutants.score(new) == pytest.approx(3 / 4)
