"""`scripts/first-hour`: which commands of a page it types, and which it lists with a reason."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "first-hour"))

PAGE = """# A page

Say `pip install -e .`, never `pip`.

| `pip install nothing` | a table |

```python
x = 1
```

    sfa recipes            # lists them
    not a command

```sh
sfa train --nano
cat file
```

```python
assert x == 1
```
"""


def test_commands_of_a_page() -> None:
    assert SCRIPT["commands"](PAGE) == ["pip install -e .", "sfa recipes", "sfa train --nano"]
    assert SCRIPT["python_of"](PAGE) == "x = 1\n\nassert x == 1\n"


def test_the_walk_has_the_readme_the_start_pages_and_all_notebooks() -> None:
    names = [path.name for path in SCRIPT["start_pages"]()]
    assert names[0] == "README.md"
    assert {"demo.md", "sfa.md", "backbones.md", "recipes.md"} < set(names)
    assert {path.name for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")} <= set(names)


def test_what_is_typed_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    typed = [c for c in SCRIPT["commands"](text) if not any(re.search(p, c) for p, _ in SCRIPT["NOT_HERE"])]
    assert {"sfa demo", "pytest -n 2", "sfa inspect internvl3_5_8b", 'pip install -e ".[all]"'} <= set(typed)
    assert not any(command.startswith(("vllm", "sfa train", "sfa study")) for command in typed)


def test_failures_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = SCRIPT["walk"]
    monkeypatch.setitem(walk.__globals__, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "    python -c 'raise SystemExit(3)'\n    sfa study tables\n\n```python\nprint(1)\n```\n", encoding="utf-8"
    )
    rows = walk(page, {}, tmp_path / "log")
    assert [row[2] for row in rows] == ["**exit 3**", "takes hours; its rows are in docs/studies/", "ran"]
    assert "1" in (tmp_path / "log").read_text(encoding="utf-8")
    again = walk(page, {"python -c 'raise SystemExit(3)'": "README.md"}, tmp_path / "log")
    assert again[0][2] == "as in README.md"
    assert sys.executable in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_notebook_that_fails_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = SCRIPT["walk"]
    monkeypatch.setitem(walk.__globals__, "ROOT", tmp_path)
    page = tmp_path / "broken.ipynb"
    page.write_text('{"cells": [{"cell_type": "code"}], "nbformat": 4}', encoding="utf-8")
    ((what, _, result),) = walk(page, {}, tmp_path / "log")
    assert what == "`jupyter execute`, 1 cells"
    assert result.startswith("**exit ")
