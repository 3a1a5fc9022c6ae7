"""The site: `sphinx-build -W -b html docs docs/_build`. What is special about it is in `docs/sphinx_parts/`."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from sphinx_parts import api_pages, docstrings, hosts, html_links, links, project_pages, sections

_PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _PROJECT["name"]
release = version = _PROJECT["version"]
author = "the maintainers of sfa-adapters"
copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute", "sphinx_parts", "**.ipynb_checkpoints"]

# Pages are written for GitHub's reader, too: headings are link targets, and links lead to files.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "colon_fence", "html_image"]
myst_dmath_double_inline = True
suppress_warnings = ["myst.strikethrough"]

# Notebooks are in git without output and run while the site is built; the cache keeps what has not changed.
nb_execution_mode = "cache"
nb_execution_timeout = 1200  # seconds for a cell; on two free cores a whole notebook takes under 120
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, and warnings of libraries about one another

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes in one list, not one entry each beside the members
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
if repository := _PROJECT.get("urls", {}).get("Repository"):
    html_theme_options |= {"source_repository": repository, "source_branch": "main", "source_directory": "docs/"}
copybutton_exclude = ".linenos, .gp"


def setup(app: object) -> None:
    """Writes the pages that are made from code, and turns links of the repository into links of the site."""
    for part in (project_pages, hosts, api_pages, docstrings, sections, links, html_links):
        part.connect(app)
