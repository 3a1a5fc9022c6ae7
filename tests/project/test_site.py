"""The site: its sections, links and docstrings; and it builds with warnings as errors where Sphinx is installed."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("myst_nb") is None, reason='Sphinx is not installed: pip install -e ".[docs]"'
)


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """The modules of docs/sphinx_parts by name; the folder is no package of the library."""
    sys.path.insert(0, str(ROOT / "docs"))
    names = ("docstrings", "links", "sections", "html_links")
    yield {name: importlib.import_module(f"sphinx_parts.{name}") for name in names}
    sys.path.remove(str(ROOT / "docs"))


def test_every_page_of_docs_is_in_one_section(parts: dict[str, ModuleType]) -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = [page for pages in parts["sections"].sections(index).values() for page in pages]
    assert len(listed) == len(set(listed))
    there = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert there - set(listed) == set(), "Add the page to a table of docs/index.md."


@pytest.mark.parametrize(
    ("docstring", "rst"),
    [
        ("a * b of |w| in x_", r"a \* b of \|w\| in x\_"),
        ("the `e * e`s", r"the ``e * e``\ s"),
        ("Sum:\n\n    a * b\n\nEnd.", "Sum:\n\n\n::\n\n    a * b\n\nEnd."),
        ("* one * two\n  more\n* three", "* one \\* two\n  more\n* three"),
        (
            "Text.\n\nArgs:\n    x: Its `a|b`.\n        And |y|.",
            "Text.\n\nArgs:\n    x: Its ``a|b``.\n        And \\|y\\|.",
        ),
        (
            "| a | b |\n|---|---|\n| 1 | `x` |",
            "\n.. list-table::\n   :header-rows: 1\n\n   * - a\n     - b\n   * - 1\n     - ``x``\n",
        ),
    ],
)
def test_docstrings_are_plain_text(parts: dict[str, ModuleType], docstring: str, rst: str) -> None:
    assert "\n".join(parts["docstrings"].as_rst(docstring.split("\n"))).strip("\n") == rst.strip("\n")


def test_links_out_of_docs_lead_to_pages_and_files(parts: dict[str, ModuleType]) -> None:
    from sphinx.errors import SphinxError

    links, page = parts["links"], ROOT / "docs" / "sfa.md"
    text = "[a](../README.md#try-it) [b](../backbones/vit.py) [c](peft.md) [d](https://e.org) [e](#here)"
    assert links.on_the_site(text, page, page) == text.replace("../README.md", "project/readme.md")
    picture = '<img src="docs/figures/plan.png" width="440" alt="x">'
    readme = ROOT / "README.md"
    assert links.on_the_site(picture, readme, ROOT / "docs" / "project" / "readme.md") == picture.replace("docs", "..")
    code = "```sh\n[x](nowhere.md)\n```\n"
    assert links.on_the_site(code, page, page) == code
    with pytest.raises(SphinxError, match=r"docs/sfa\.md links to nowhere\.md, which is no file"):
        links.on_the_site("[x](nowhere.md)", page, page)


def test_broken_links_of_a_site_are_seen(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y"></a><a href="#z"></a><a href="https://e.org"></a>')
    (tmp_path / "b.html").write_text('<p id="y"><a href="a.html#x"></a><img src="c.png"><a href="d.html"></a>')
    assert parts["html_links"].broken(tmp_path) == ["a.html: #z", "b.html: c.png", "b.html: d.html"]


@pytest.mark.timeout(900)
def test_the_site_builds_with_warnings_as_errors(tmp_path: Path) -> None:
    """Reads every page and docstring, and resolves all references; writes nothing, and runs no notebook."""
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "dummy", "-D", "nb_execution_mode=off"]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path)], check=False, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr


def test_code_of_notebooks_can_be_coloured() -> None:
    """Their lines that begin with `!` are no Python: the lexer is the one that the notebook names."""
    from pygments.lexers import get_lexer_by_name

    for file in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        book = json.loads(file.read_text("utf-8"))
        lexer = get_lexer_by_name(book["metadata"]["language_info"]["pygments_lexer"])
        lexer.add_filter("raiseonerror")
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                list(lexer.get_tokens("".join(cell["source"])))
