"""Writes docs/notebooks/*.ipynb, which Colab opens, from the .md beside them: python docs/colab.py

The Markdown files are the sources: the site executes those. The notebooks have no outputs, and a first cell
that installs the package.
"""

import json
import re
from pathlib import Path

NOTEBOOKS = Path(__file__).parent / "notebooks"
INSTALL = "%pip install --quiet rmsprop_jax flax matplotlib scikit-learn"


def notebook(text):
    """The notebook, as the text of its file, for a page in MyST's notation."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    parts = re.split(r"^```\{code-cell\} ipython3\n(.*?)^```\n", text, flags=re.DOTALL | re.MULTILINE)
    cells = [_cell("code", INSTALL)]
    for i, part in enumerate(parts):
        # The site's own links are not of use elsewhere.
        paragraphs = [p for p in part.strip().split("\n\n") if "COLAB" not in p]
        words = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", "\n\n".join(paragraphs))
        if i % 2:
            cells.append(_cell("code", part.rstrip()))
        elif words:
            cells.append(_cell("markdown", words))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cell(kind, text):
    cell = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


if __name__ == "__main__":
    for source in sorted(NOTEBOOKS.glob("*.md")):
        made = notebook(source.read_text(encoding="utf-8"))
        source.with_suffix(".ipynb").write_text(made, encoding="utf-8")
