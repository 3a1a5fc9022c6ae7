"""Figures of the docs: drawn from committed numbers, readable at half width, in colours that can be told apart."""

import itertools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfa_adapters import figure_style
from tests.support.paths import ROOT

SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "draw-figures"))


@pytest.mark.parametrize("name", list(SCRIPT["DRAWN"]))
def test_letters_are_ten_pixels_high_at_half_width(name: str, tmp_path: Path) -> None:
    figure = SCRIPT["DRAWN"][name]()
    figure.savefig(tmp_path / "figure.png")
    assert figure.get_figwidth() == figure_style.HALF_WIDTH
    texts = [text for text in figure.findobj(lambda item: hasattr(item, "get_fontsize")) if text.get_text().strip()]
    assert len(texts) > 10
    smallest = min(text.get_fontsize() for text in texts)
    assert smallest * 440 / (72 * figure.get_figwidth()) >= 9.9, name
    assert (ROOT / "docs" / "figures" / f"{name}.png").is_file()


def _seen_without_red_or_green(colour: str, kind: str) -> np.ndarray:
    """A colour as somebody without one kind of cone sees it (Vienot et al., 1999), linear RGB."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2
    matrices = {
        "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    return np.array(matrices[kind]) @ rgb


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_colours_differ_for_colour_blind_people(kind: str) -> None:
    for one, other in itertools.combinations(figure_style.COLOURS[:5], 2):
        distance = np.abs(_seen_without_red_or_green(one, kind) - _seen_without_red_or_green(other, kind)).max()
        assert distance > 0.08, (one, other, distance)
    assert len(figure_style.MARKERS) == len(figure_style.COLOURS)


def test_numbers_add_up() -> None:
    rows = SCRIPT["read"](ROOT / "docs" / "figures" / "numbers" / "study_answers.csv")
    assert {sum(int(row[kind]) for kind in row if kind != "arm") for row in rows} == {450}
    page = (ROOT / "docs" / "scr.md").read_text(encoding="utf-8")
    for quantity, kind in (("relaxed accuracy %", "correct"), ("fabricated numbers %", "fabricated")):
        shares = " | ".join(f"{100 * int(row[kind]) / 450:.1f}" for row in rows)
        assert f"| {quantity} | {shares} |" in page
    entropies = SCRIPT["read"](ROOT / "docs" / "figures" / "numbers" / "study_entropy.csv")
    values = " | ".join(row["sparse"] for row in entropies)
    assert f"| H / log n, sparse | {values} |" in page


def test_an_unknown_figure_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "draw-figures"), "nothing"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "No figure nothing. There are: first_look, heads_methods" in done.stderr
