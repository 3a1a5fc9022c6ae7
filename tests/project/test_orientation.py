"""The architecture page and the glossary name files that exist, and the picture of the floors can be drawn."""

import re
import runpy
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = ("architecture.md", "glossary.md")
PACKAGE = ROOT / "sfa_adapters"


@pytest.mark.parametrize("page", PAGES)
def test_every_path_is_there(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.py|/))`", text))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (PACKAGE / path).exists() and not (ROOT / path).exists()] == []


def test_every_name_beside_a_path_is_in_its_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    pairs = re.findall(r"`([A-Za-z_]+)(?:\.([a-z_]+))?` in `([a-z_/]+\.py)`", text)
    assert len(pairs) > 6
    for name, method, path in pairs:
        code = (PACKAGE / path).read_text(encoding="utf-8")
        for part in filter(None, (name, method)):
            assert re.search(rf"(?:def|class) {part}\b", code), f"{path} has no {part}."


def test_the_floors_are_drawn_from_the_contract(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "draw-floors"))
    rows = script["floors"]()
    names = {name for row in rows for name in row}
    there = {p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
    assert there <= names
    assert rows[-1][0] == "errors"
    assert script["draw"](tmp_path / "floors.png").stat().st_size > 10_000
