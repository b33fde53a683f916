"""The README is short, and says what the site says: its tables, links and pictures are of the repository."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def rows(text):
    """The lines of tables, without the headings."""
    return re.findall(r"^\| .*\|$(?!\n\|---)", text, re.MULTILINE)


def test_the_readme_is_of_one_screen():
    assert len(README.split()) <= 600


@pytest.mark.parametrize("row", rows(README))
def test_what_stands_in_a_table_stands_on_a_page(row):
    assert any(row in rows(tables.filled(page)) for page in PAGES.values())


def test_every_link_is_absolute_and_leads_to_a_file():
    """PyPI shows the README alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        links = importlib.import_module("links")
    raw = links.REPOSITORY.replace("github.com", "raw.githubusercontent.com")
    targets = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", README, re.MULTILINE))
    used = re.findall(r"\]\[([\w-]+)\]", README)
    assert sorted(set(used)) == list(targets)
    for target in [*targets.values(), *re.findall(r"\]\(([^)]*)\)", README)]:
        if target.startswith(links.SITE):
            assert target.removeprefix(links.SITE).strip("/").removesuffix(".html") in {"", *PAGES}
        elif target.startswith((links.REPOSITORY, raw)):
            path = re.sub(r"^/(blob/)?main/", "", target.removeprefix(links.REPOSITORY).removeprefix(raw))
            assert (ROOT / path).is_file(), target
        else:
            assert target == "https://optax.readthedocs.io"


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "<!-- table " in text])
def test_tables_have_their_figures(page):
    """Each with what it was measured on, or what was not."""
    names = re.findall(r"<!-- table [\w ]+ -->", PAGES[page])
    made = tables.filled(PAGES[page])
    assert "<!-- table" not in made
    said = re.compile(r"^[^|\n]+; python |^Not measured\.$", re.MULTILINE)
    assert len(said.findall(made)) - len(said.findall(PAGES[page])) == len(names)
