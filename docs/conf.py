"""The documentation: `sphinx-build -W -b html docs docs/_build`, in the environment of `pip install -e ".[docs]"`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import _measured  # noqa: E402
import _settings  # noqa: E402
from hf_ddpm import __version__  # noqa: E402

project = "hf_ddpm"
author = "The hf_ddpm authors"
project_copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute"]  # MyST-NB writes the second beside the first

# Markdown. Equations stand between dollars; headings are targets of links.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# A notebook shows the outputs that are stored in it.
nb_execution_mode = "off"

# The API. Docstrings have single backticks around code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"hf_ddpm {__version__}"
html_copy_source = False
html_show_sphinx = False


def setup(app: Sphinx) -> None:
    """Make what is derived from other files: pages of measured tables and notebooks, and the table of settings."""
    app.connect("builder-inited", lambda _: _measured.write_pages(DOCS))
    app.connect("builder-inited", _copy_notebooks)
    app.connect("source-read", _fill_page)


def _copy_notebooks(_: Sphinx) -> None:
    """Copy the notebooks to where Sphinx reads them, `docs/examples/`, which git ignores."""
    shutil.rmtree(DOCS / "examples", ignore_errors=True)
    (DOCS / "examples").mkdir()
    for path in sorted((DOCS.parent / "examples").glob("*.ipynb")):
        shutil.copy2(path, DOCS / "examples")


def _fill_page(app: Sphinx, docname: str, source: list[str]) -> None:
    if "/" not in docname:
        source[0] = _measured.with_links(source[0])
    if docname == "settings":
        for path in _settings.SOURCES:  # the page is out of date when one of them has changed
            app.env.note_dependency(path)
        source[0] = source[0].replace(_settings.PLACE, _settings.tables())
