"""The tables of docs/backbones.md name every type of the installed libraries; a nightly job builds all of them."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from importlib.metadata import version

import pytest

from sfa_adapters.testing import survey
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
SCRIPT = ROOT / "scripts" / "draw-backbones"
SECTIONS: list[tuple[str, Callable[[], list[str]], int]] = [
    ("Hosts of transformers (image-text-to-text)", survey.hosts, 78),
    ("Vision models of transformers", survey.vision_models, 45),
    ("Models of timm (a choice)", survey.timm_models, 15),
]


def script() -> Callable[[list[str]], int]:
    """`main` of scripts/draw-backbones, which has no ending by which Python would find it."""
    return runpy.run_path(str(SCRIPT))["main"]


def section(title: str) -> str:
    """The text under a heading."""
    return PAGE.partition(f"### {title}\n")[2].partition("\n### ")[0].partition("<!-- end")[0]


def types(text: str) -> list[str]:
    """Types that a section names: in the first column of its tables, and in its last line."""
    rows = [name for name in re.findall(r"^\| (\S+) \|", text, re.MULTILINE) if name != "type"]
    without = re.search(r"^No vision attention: (.*)\.$", text, re.MULTILINE)
    return rows + (without[1].split(", ") if without else [])


@pytest.mark.parametrize(("title", "names", "least"), SECTIONS, ids=["hosts", "vision", "timm"])
def test_the_page_names_every_type_once_and_keeps_what_worked(
    title: str, names: Callable[[], list[str]], least: int
) -> None:
    text = section(title)
    count = re.search(r"^(\d+) of (\d+) with vision attention work\.$", text, re.MULTILINE)
    assert count is not None
    assert int(count[1]) >= least, "fewer types work than before"
    assert int(count[1]) == len(re.findall(r"\| works \|$", text, re.MULTILINE))
    assert "taken, not checked" not in text, "add a small tower of this class to the contract suite"
    for name, reason in re.findall(r"^\| (\S+) \| (.*) \|$", text.partition("cannot be built:")[2], re.MULTILINE):
        assert name == "type" or reason.startswith("ImportError: "), (
            f"say in sfa_adapters.testing.survey what the default configuration of {name} lacks"
        )
    listed = re.search(r"with transformers ([\d.]+), timm ([\d.]+)\.", PAGE)
    assert listed is not None
    if listed.groups() != (version("transformers"), version("timm")):
        pytest.skip(f"the page was written with transformers {listed[1]} and timm {listed[2]}")
    assert sorted(types(text)) == sorted(names()), "run python scripts/draw-backbones"


@pytest.mark.nightly
def test_the_page_is_what_the_script_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert script()(["--check"]) == 0, capsys.readouterr().out


def test_wrong_arguments_of_the_script_are_answered_with_its_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert script()(["--chek"]) == 2
    assert "Example:" in capsys.readouterr().err
