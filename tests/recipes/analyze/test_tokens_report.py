"""Pictures of adaptive tokens: files of a readable size, every token drawn, bad input named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfa_adapters.adat.policy import PatchPolicy
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.analyze.tokens_report import (
    Measured,
    ScoredPage,
    level_colours,
    plot_efficiency,
    plot_gallery,
    plot_plan,
)
from sfa_adapters.recipes.nano.evaluate import Interval


def page(height: int = 56, width: int = 84) -> ScoredPage:
    image = np.full((height, width, 3), 255, np.uint8)
    image[:28, :28] = 0
    density = torch.zeros(height // 28, width // 28)
    density[0, 0], density[0, 1] = 0.9, 0.5
    return ScoredPage("a page", image, density)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def rows(accuracy: bool) -> list[Measured]:
    known = Interval(0.6, 0.55, 0.64) if accuracy else None
    return [Measured(m, r, 100 * r, 5 + 10 * r, known) for m in ("ADAT", "down-sampling") for r in (1.0, 0.25, 0.5)]


def test_a_plan_is_drawn_in_the_colours_of_its_levels(tmp_path: Path) -> None:
    shown = page()
    plan = PatchPolicy.published().plan(torch.as_tensor(shown.density), (56, 84), 14)
    drawn = pixels(plot_plan(shown, plan, tmp_path / "plan.png"))
    assert drawn.shape[1] == 2400
    for colour in level_colours(3):  # all three levels are on this page
        wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        assert (np.abs(drawn[:, 1600:] - wanted).sum(-1) < 60).sum() > 100


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_gallery_grows_by_bands(tmp_path: Path, count: int) -> None:
    height, width, _ = pixels(plot_gallery([page()] * count, tmp_path / "gallery.png")).shape
    assert (width, height) == (round(160 * (3.6 * min(count, 4) + 1.4)), round(160 * 7.75 * -(-count // 4)))


@pytest.mark.parametrize("accuracy", [True, False])
def test_the_panel_of_accuracies_needs_some(tmp_path: Path, accuracy: bool) -> None:
    path = plot_efficiency(rows(accuracy), tmp_path / "curve.png", "a title")
    assert pixels(path).shape[1] == (2176 if accuracy else 1120)


def test_bad_input_is_named(tmp_path: Path) -> None:
    path, shown = tmp_path / "none.png", page()
    plan = PatchPolicy.published().plan(torch.zeros(2, 2), (56, 56), 14)
    with pytest.raises(DataError, match=r"\(56, 84\) px, but .*\(56, 56\)"):
        plot_plan(shown, plan, path)
    with pytest.raises(DataError, match="needs pages"):
        plot_gallery([], path)
    with pytest.raises(DataError, match="finite"):
        plot_gallery([ScoredPage("nan", shown.image, torch.full((2, 2), float("nan")))], path)
    with pytest.raises(DataError, match="no row"):
        plot_efficiency([], path)
    with pytest.raises(DataError, match="above 0"):
        plot_efficiency([Measured("ADAT", 0.5, 10, float("nan"))], path)
    assert not path.exists()
