"""Files of the repository that are shown on the site although they do not lie in docs/.

README, CONTRIBUTING and the like, and the dated results of benchmarks. Their text is copied with its links rewritten,
into docs/project/ and docs/results/, which git ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from sphinx.application import Sphinx

from sphinx_parts.links import DOCS, ROOT, on_the_site

__all__ = ["RESULTS", "connect", "copies", "write_if_new"]

RESULTS = ROOT / "benchmarks" / "results"
_PAGES = ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT")


@cache
def copies() -> Mapping[Path, Path]:
    """Files of the repository, and as which file under docs/ Sphinx reads them."""
    pages = {ROOT / f"{name}.md": DOCS / "project" / f"{name.lower()}.md" for name in _PAGES}
    results = {file: DOCS / "results" / file.name for file in sorted(RESULTS.glob("*.md"))}
    return {file: place for file, place in (pages | results).items() if file.is_file()}


def write_if_new(place: Path, text: str) -> None:
    """Writes a page, and leaves its time alone where it says the same, so that Sphinx does not read it again."""
    if not place.is_file() or place.read_text(encoding="utf-8") != text:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")


def _write(app: Sphinx) -> None:
    for folder in {place.parent for place in copies().values()}:
        for old in set(folder.glob("*.md")) - set(copies().values()):
            old.unlink()
    for file, place in copies().items():
        write_if_new(place, on_the_site(file.read_text(encoding="utf-8"), file, place))
    rows = "\n".join(f"{place.stem}" for file, place in copies().items() if file.parent == RESULTS)
    text = (
        "# Results of benchmarks\n\nOne dated file for each machine and question, as `python -m benchmarks.NAME` wrote "
        "it. What follows from them is in [Performance](../performance.md).\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{rows}\n```\n"
    )
    write_if_new(DOCS / "results" / "index.md", text)


def connect(app: Sphinx) -> None:
    """Writes the copies before Sphinx looks for pages."""
    app.connect("builder-inited", _write)
