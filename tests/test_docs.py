"""The site's pages: every public name is on one, every block of Python runs, every link leads somewhere.

None of this needs Sphinx; `make docs` builds, and refuses references that lead nowhere.
"""

import doctest
import importlib
import json
import re
import sys
from pathlib import Path

import jax
import pytest

import rmsprop_jax

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
TEXTS = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
MODULES = ["rmsprop_jax", *(f"rmsprop_jax.{name}" for name in rmsprop_jax.__all__ if name.islower())]
MODULES = [name for name in MODULES if name in sys.modules]
BLOCK = re.compile(r"^```(?:python|\{code-cell\} ipython3)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_its_module_s_page(module):
    page = TEXTS[f"api/{module.removeprefix('rmsprop_jax.')}.md"]
    missing = [
        name
        for name in importlib.import_module(module).__all__
        if not re.search(rf"^\.\. (auto)?\w+:: {name}$", page, re.MULTILINE)
        and f"[`{name}`]({name}.md)" not in page  # a module, which has a page of its own
    ]
    assert not missing


def test_every_module_has_a_page():
    for module in MODULES:
        assert f"({module.removeprefix('rmsprop_jax.')}.md)" in TEXTS["api/index.md"]


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```python" in text])
def test_python_is_written_as_a_session(page):
    """With prompts, so that what it prints is checked, and not merely shown."""
    for block in re.findall(r"^```python\n(.*?)^```$", TEXTS[page], re.DOTALL | re.MULTILINE):
        assert block.startswith(">>> ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of frameworks and plots, which tests elsewhere are strict about
@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if BLOCK.search(text)])
def test_every_block_of_python_runs(page):
    pytest.importorskip("flax", reason="the examples' extra is not installed")
    if "import torch" in TEXTS[page]:
        pytest.importorskip("torch", reason="make peers installs it")
    matplotlib = pytest.importorskip("matplotlib", reason="the examples' extra is not installed")
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as users have it
        run(page, names)


def run(page, names):
    for match in BLOCK.finditer(TEXTS[page]):
        block, line = match[1], TEXTS[page].count("\n", 0, match.start()) + 1
        if block.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(block, names, page, page, line)
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
            report = []
            runner.run(test, out=report.append, clear_globs=False)
            assert not report, "".join(report)
            names = test.globs
        else:
            exec(compile("\n" * line + block, DOCS / page, "exec"), names)


@pytest.mark.parametrize("page", TEXTS)
def test_links_within_the_site_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if not re.match(r"[a-z]+:|#|REPOSITORY", target):
            assert ((DOCS / page).parent / target.partition("#")[0]).exists(), target


def test_elsewhere_names_tests_that_there_are():
    text = re.sub(r"\s+", " ", TEXTS["elsewhere.md"])
    named = re.findall(r"\(\[test\]\(REPOSITORY/blob/main/(tests/\S+\.py)\): `(\w+)`\)", text)
    assert len(named) == 6
    for path, name in named:
        assert f"def {name}(" in (DOCS.parent / path).read_text(encoding="utf-8")


def colab():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        return importlib.import_module("colab")


@pytest.mark.parametrize("page", [name for name in TEXTS if name.startswith("notebooks/")])
def test_notebooks_are_made_from_their_sources(page):
    made = (DOCS / page).with_suffix(".ipynb").read_text(encoding="utf-8")
    assert made == colab().notebook(TEXTS[page]), "python docs/colab.py"
    assert json.loads(made)["nbformat"] == 4


def test_llms_txt_lists_every_page():
    listed = set(re.findall(r"\]\((\S+)\.html\)", (DOCS / "llms.txt").read_text(encoding="utf-8")))
    assert listed == {name.removesuffix(".md") for name in TEXTS} - {"index"}
