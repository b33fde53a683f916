"""What stands in several files about the package as a whole is the same in all of them."""

import re
import tomllib
from pathlib import Path

import pytest

import rmsprop_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI = ROOT / ".github"
RECIPE = (ROOT / "packaging" / "conda" / "recipe.yaml").read_text()


def test_one_version():
    assert PROJECT["dynamic"] == ["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    (released,) = re.findall(r"^date-released: (.*)$", citation, re.MULTILINE)
    for text in (citation, RECIPE):
        assert re.findall(r'^ *version: "?([\d.]+\w*)"?$', text, re.MULTILINE) == [rmsprop_jax.__version__]
    headings = re.findall(r"^## \[(.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == (rmsprop_jax.__version__, released)


def test_one_address():
    urls = PROJECT["urls"].copy()
    base, site = urls["Repository"], urls.pop("Documentation")
    assert all(url.startswith(base) for url in urls.values())
    owner, name = base.split("/")[-2:]
    assert site == f"https://{owner}.github.io/{name}"
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *CI.rglob("*.*"), *(ROOT / "packaging").rglob("*.*")]
    address = rf"github(?:usercontent)?\.com/([\w-]+)/{name}\b|([\w-]+)\.github\.io/{name}\b"
    for path in [*files, ROOT / "benchmarks" / "README.md"]:
        for found in re.finditer(address, path.read_text()):
            assert (found[1] or found[2]) == owner, path


def test_the_oldest_versions_are_those_that_are_tested():
    oldest = dict(re.findall(r"^(\w+)==(.*)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    assert sorted(PROJECT["dependencies"]) == [f"{name}>={oldest[name]}" for name in ("jax", "optax")]
    run = RECIPE.partition("run:")[2].partition("tests:")[0]
    assert dict(re.findall(r"- (jax|optax) >=(.*)", run)) == {name: oldest[name] for name in ("jax", "optax")}


def test_all_extras():
    extras = PROJECT["optional-dependencies"]
    assert extras["all"] == [f"rmsprop_jax[{','.join(sorted(extras.keys() - {'all'}))}]"]


@pytest.mark.skipif(not CI.exists(), reason="an sdist has no workflows")
def test_the_pythons_are_those_that_are_tested():
    prefix = "Programming Language :: Python :: 3."
    minors = [int(c.removeprefix(prefix)) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert PROJECT["requires-python"] == f">=3.{min(minors)}"
    for name, expected in (("ci", minors), ("release", [min(minors), max(minors)])):
        text = (CI / "workflows" / f"{name}.yml").read_text()
        (matrix,) = re.findall(r"^ +python: \[(.*)\]$", text, re.MULTILINE)
        assert matrix == ", ".join(f'"3.{minor}"' for minor in expected)


@pytest.mark.skipif(not CI.exists(), reason="an sdist has no workflows")
def test_workflows_may_read_and_no_more_unless_they_say_so():
    for path in (CI / "workflows").glob("*.yml"):
        text = path.read_text()
        assert re.search(r"^permissions:", text, re.MULTILINE), path
        assert "pull_request_target" not in text, path
        assert text.count("runs-on:") == text.count("timeout-minutes:"), path
