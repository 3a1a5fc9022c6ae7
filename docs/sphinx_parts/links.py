"""Links between files of the repository become links between pages of the site.

Pages in docs/ are read on GitHub as well, so they link to files by path: `../README.md`, `../backbones/vit.py`. Sphinx
knows what lies in docs/ only. A link to a file that has a page on the site is turned into one to that page; a link to
another file becomes a download; a link to a folder or to nothing is an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

__all__ = ["DOCS", "ROOT", "connect", "on_the_site"]

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^()\s#]+)(#[^()\s]*)?(?=\))")
_IMAGE = re.compile(r'(?<=<img src=")([^"]+)()(?=")')  # a picture with a width, which Markdown cannot say
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def page_of(file: Path) -> Path:
    """Where a file of the repository is shown: itself in docs/, or its copy in docs/project/ and docs/results/."""
    from sphinx_parts import project_pages

    return project_pages.copies().get(file, file)


def on_the_site(text: str, source: Path, place: Path) -> str:
    """Rewrites the links of a page.

    Args:
        text: Markdown.
        source: The file it was written as; its links are relative to that.
        place: The file under docs/ as which Sphinx reads it.

    Raises:
        SphinxError: A link leads to no file.
    """

    def rewrite(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if target.is_dir() and target == ROOT / "benchmarks" / "results":
            target = DOCS / "results" / "index.md"
        elif not target.is_file():
            raise SphinxError(f"{source.relative_to(ROOT)} links to {match[1]}, which is no file.")
        return os.path.relpath(page_of(target), place.parent) + (match[2] or "")

    def changed(part: str) -> str:
        return _IMAGE.sub(rewrite, _LINK.sub(rewrite, part))

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [changed(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, changed(text[end:])])


def _read(app: Sphinx, name: str, content: list[str]) -> None:
    path = Path(app.env.doc2path(name))
    if path.suffix == ".md" and path.parent == DOCS:
        content[0] = on_the_site(content[0], path, path)


def connect(app: Sphinx) -> None:
    """Rewrites pages of docs/ as they are read."""
    app.connect("source-read", _read, priority=400)
