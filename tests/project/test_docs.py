"""The code blocks of each docs page run, from top to bottom in one namespace; documented commands exist."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfa_adapters import registry
from sfa_adapters.cli.main import app
from sfa_adapters.registry import registered_backbones
from sfa_adapters.vlm import records
from sfa_adapters.vlm.records import registered_vlms
from tests.support.paths import ROOT

PAGES = [
    page
    for page in sorted((ROOT / "docs").glob("*.md"))  # that of the README runs below
    if "```python" in page.read_text("utf-8")
]


@pytest.fixture
def own_records() -> Iterator[None]:
    """Pages register towers and hosts; other tests must not see them."""
    registered_backbones()
    registered_vlms()
    tables: list[dict[str, Any]] = [registry._BACKBONES, records._SPECS]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.mark.usefixtures("own_records")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)


def test_the_quickstart_of_the_readme_runs_in_a_plain_install(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    missing = ["timm", "torchvision", "PIL", "cv2", "datasets", "matplotlib", "skimage", "pandas"]
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\n" + "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_the_inspect_commands_of_the_readme_work_with_the_demo_extra_alone() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index("## Try it") : text.index("## Which models")]
    commands = [command.split()[1:] for command in re.findall(r"`(sfa inspect [^`]+)`", block)]
    assert commands
    missing = ["timm", "torchvision", "cv2", "datasets", "bitsandbytes", "tensorboard", "skimage", "rapidocr", "pandas"]
    code = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "from huggingface_hub import HfApi\n"
        "def refuse(*args, **kwargs): raise AssertionError('the hub was asked')\n"
        "HfApi.model_info = refuse\n"
        "from sfa_adapters.cli.main import main\n"
        f"for command in {commands}:\n"
        "    try: main(command)\n"
        "    except SystemExit as left: assert left.code == 0, command\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def _documented_commands() -> list[tuple[str, str]]:
    """Every command line of `sfa` in the pages and notebooks, with the page that it stands in."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    texts = [(page.name, page.read_text("utf-8")) for page in pages]
    for book in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        cells = json.loads(book.read_text("utf-8"))["cells"]
        texts.append((book.name, "\n".join("".join(cell["source"]) for cell in cells)))
    return [
        (name, command.split("#")[0].split("|")[0].strip(" `.,"))
        for name, text in texts
        for command in re.findall(r"(?:^\s*(?:\$ |!)?|`)(sfa [a-z][^`\n]*)", text, re.MULTILINE)
    ]


def test_documented_commands_exist_with_their_options() -> None:
    import typer

    commands = _documented_commands()
    assert len(commands) > 100
    wrong = []
    for page, line in commands:
        command: Any = typer.main.get_command(app)
        words = line.split()[1:]
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if hasattr(command, "commands"):
            if words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
                wrong.append(f"{page}: {line}: no command {words[0]}")
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in re.findall(r"(?<=\s)--[a-z][a-z-]*", line) if word not in {*known, "--help"}]
        wrong += [f"{page}: {line}: no option {word}" for word in unknown]
    assert not wrong, "\n".join(wrong)
