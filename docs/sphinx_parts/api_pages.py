"""Reference of the code, from docstrings: one page for each package, in docs/api/, which git ignores.

A module is public if its package exports names from its `__init__`, or if a page of the docs imports from it.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from sphinx.application import Sphinx

from sphinx_parts.links import DOCS, ROOT
from sphinx_parts.project_pages import write_if_new

__all__ = ["connect", "public_modules"]

_IMPORT = re.compile(r"^from (sfa_adapters(?:\.\w+)*) import", re.MULTILINE)
_CORE = "sfa_adapters"


def public_modules() -> dict[str, list[str]]:
    """Package -> its public modules, itself first. Modules at the top of the library belong to `sfa_adapters`."""
    texts = [page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *DOCS.glob("*.md"))]
    names = {name for text in texts for name in _IMPORT.findall(text)}
    for init in (ROOT / "sfa_adapters").glob("*/__init__.py"):
        if "__all__ = [" in init.read_text(encoding="utf-8"):
            names.add(f"{_CORE}.{init.parent.name}")
    pages: dict[str, list[str]] = {_CORE: [_CORE]}
    for name in sorted(names - {_CORE}):
        parts = name.split(".")
        package = ".".join(parts[:2])
        inside = (ROOT / Path(*parts[:2])).is_dir()
        pages.setdefault(package if inside else _CORE, []).append(name)
    return dict(sorted(pages.items()))


def _page(package: str, modules: list[str]) -> str:
    lines = [package, "=" * len(package), ""]
    exported: set[str] = set()
    for name in modules:
        module = importlib.import_module(name)
        names = list(getattr(module, "__all__", []))
        # A name is shown once: where its package exports it, else where it is defined.
        home = {item: getattr(getattr(module, item), "__module__", name) for item in names}
        again = [item for item in names if item in exported or (name != package and home[item] != name)]
        exported |= set(names)
        if name != package:
            lines += [name, "-" * len(name), ""]
        lines += [f".. automodule:: {name}"]
        if len(again) < len(names):
            lines += ["   :members:"] + ["   :exclude-members: " + ", ".join(again)] * bool(again)
        lines += [""]
    return "\n".join(lines)


def _write(app: Sphinx) -> None:
    folder = DOCS / "api"
    pages = public_modules()
    wanted = {folder / "index.md"}
    for package, modules in pages.items():
        place = folder / f"{package}.rst"
        wanted.add(place)
        write_if_new(place, _page(package, modules))
    text = (
        "# Reference of the code\n\nEvery module that a page of this site imports from, by package, from its "
        "docstrings. Names that are not here may change without a word in the changelog.\n\n"
        "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(pages) + "\n```\n"
    )
    write_if_new(folder / "index.md", text)
    for old in set(folder.iterdir()) - wanted:
        old.unlink()


def connect(app: Sphinx) -> None:
    """Writes the pages before Sphinx looks for them."""
    app.connect("builder-inited", _write)
