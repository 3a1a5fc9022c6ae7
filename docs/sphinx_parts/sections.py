"""The sections of the site, read from docs/index.md: a heading for each, and under it the table of its pages.

A page that is added to that table is in the navigation. What exists on the site alone (reference of the code, pages of
hosts, copies of files of the repository) is listed here.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

__all__ = ["connect", "sections"]

# Pages without a file in docs/, by section; they stand behind the others, and README before all.
_FIRST = "The library in short <project/readme>"
_WRITTEN = {
    "Reference": ["hosts/index", "api/index"],
    "Measured": ["results/index", "figures/numbers/README"],
    "Project": ["project/contributing", "project/changelog", "project/security", "project/code_of_conduct"],
}


def sections(index: str) -> dict[str, list[str]]:
    """Section -> names of its pages, in the order of docs/index.md.

    Args:
        index: The text of that page.
    """
    result: dict[str, list[str]] = {}
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", index, re.MULTILINE | re.DOTALL):
        names = re.findall(r"^\| \[[^]]+\]\(([\w/-]+)\.(?:md|ipynb)\)", body, re.MULTILINE)
        if names:
            result[title] = names
    for title, names in _WRITTEN.items():
        result.setdefault(title, []).extend(names)
    return result


def _read(app: Sphinx, name: str, content: list[str]) -> None:
    if name == "index":
        contents = sections(content[0])
        # Titles in place of names of files.
        content[0] = re.sub(r"\[(\w+\.(?:md|ipynb))\]\(((?:notebooks/)?\1)\)", r"[](\2)", content[0])
        for number, (title, pages) in enumerate(contents.items()):
            there = [_FIRST] * (number == 0) + [page for page in pages if page in app.env.found_docs]
            content[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(there) + "\n```\n"
    elif name == "studies":
        content[0] += "\n```{toctree}\n:hidden:\n:glob:\n\nstudies/*/table\n```\n"


def connect(app: Sphinx) -> None:
    """Adds the tables of contents to the pages that carry them."""
    app.connect("source-read", _read)
