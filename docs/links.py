"""Where the repository is, and pages of other folders with their links made to fit the site."""

import re
import tomllib
from pathlib import Path, PurePosixPath
from posixpath import normpath

ROOT = Path(__file__).parents[1]
_URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
REPOSITORY, SITE = _URLS["Repository"], _URLS["Documentation"]
COLAB = REPOSITORY.removeprefix("https://github.com/")  # as Colab's addresses have it


def page(path):
    """A Markdown file of the repository without its title, for a page in docs/.

    Pictures are found from docs/, links to files lead to the repository, and those within the file stay.
    """
    folder = PurePosixPath(path).parent
    text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"\A# .*\n", "", text)

    def replaced(match):
        mark, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        found = normpath(f"{folder}/{target}")
        return f"{mark}[{words}](" + (f"../{found}" if mark else f"{REPOSITORY}/blob/main/{found}") + ")"

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", replaced, text)
