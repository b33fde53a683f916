"""The site: `make docs`."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

import inventories  # noqa: E402
import links  # noqa: E402

import rmsprop_jax  # noqa: E402
from benchmarks import tables  # noqa: E402

project = "rmsprop_jax"
author = "The rmsprop_jax authors"
copyright = author
version = release = rmsprop_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute", "**/*.ipynb"]
default_role = "code"
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"rmsprop_jax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["llms.txt"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "source_repository": links.REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [],
}

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures run to eleven lines with them, and Args say it
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # types stand in the text

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# Formulas: one file, which `make docs` puts there.
mathjax_path = "mathjax/tex-svg.js"

# Where other projects' names are documented, without asking them: see inventories.py.
intersphinx_mapping = inventories.mapping(DOCS / "_build" / "inventories")


def _source(app, docname, source):
    """Tables of the benchmarks' results, and the pages that stand in other folders, put in their places."""

    def page(match):
        app.env.note_dependency(str(ROOT / match[1]), docname=docname)
        return links.page(match[1])

    text = re.sub(r"<!-- page (\S+) -->", page, source[0])
    text = text.replace("REPOSITORY", links.REPOSITORY).replace("COLAB", links.COLAB)
    filled = tables.filled(text)
    if filled != source[0]:  # so that an incremental build sees new results
        for results in (ROOT / "benchmarks" / "results").glob("*.json"):
            app.env.note_dependency(str(results), docname=docname)
    source[0] = filled


def setup(app):
    app.connect("source-read", _source)
