"""Checks the links of the site that was written: every local target is a file, and every fragment an element of it.

Without a network. Sphinx checks references of pages; this also sees links of the theme, downloads and anchors in code.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

__all__ = ["broken", "connect"]

_LOG = logging.getLogger(__name__)


class _Page(HTMLParser):
    """Links and names of elements of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("href", "src") and value:
                self.links.append(value)
            elif key in ("id", "name") and value:
                self.names.add(value)


@cache
def _page(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def broken(folder: Path, pages: Iterable[str] | None = None) -> list[str]:
    """Links of a site that lead nowhere, as "page: link".

    Args:
        folder: The site.
        pages: Names of the pages to read, without the ending; all by default. A folder may hold pages of former builds.
    """
    folder = folder.resolve()
    _page.cache_clear()
    result = []
    files = folder.rglob("*.html") if pages is None else (folder / f"{page}.html" for page in pages)
    for file in sorted(files):
        for link in dict.fromkeys(_page(file).links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            missing = not target.is_file()
            if not missing and parts.fragment and target.suffix == ".html":
                missing = unquote(parts.fragment) not in _page(target).names
            if missing:
                result.append(f"{file.relative_to(folder)}: {link}")
    return result


def _check(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        for line in broken(Path(app.outdir), app.env.found_docs):
            _LOG.warning("a link leads nowhere: %s", line)


def connect(app: Sphinx) -> None:
    """Runs when the site is written."""
    app.connect("build-finished", _check)
