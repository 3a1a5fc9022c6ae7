"""Density scorers: printed text scores high, blank and noisy paper low; what the entropy rule can and cannot do."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sfa_adapters.adat.policy import PatchPolicy
from sfa_adapters.adat.scorers import (
    ENTROPY_BITS,
    Reduce,
    entropy_bits,
    noise_level,
    reconstruction,
    score,
    to_cells,
)
from sfa_adapters.errors import DataError, PlanError

APT_BITS = 5.75  # the threshold that APT uses at 32 px
TEXT = "invoice 1284 of 73.50 was paid in March and totals rise by 6 percent over the lazy quarter "
exact = settings(max_examples=40, derandomize=True, deadline=None, database=None)


def page(size: int = 12, ink: int = 0, paper: int = 255, side: int = 224, lines: int = 99) -> np.ndarray:
    """A page of printed text, gray levels; what no line reaches stays blank."""
    image = Image.new("L", (side, side), paper)
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
    for line in range(min(lines, int(side / size / 1.5))):
        draw.text((2, int(line * size * 1.5)), TEXT[line % 7 :] + TEXT, fill=ink, font=font)
    return np.asarray(image)


def noisy(gray: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    return np.clip(gray + np.random.default_rng(seed).normal(0, sigma, gray.shape), 0, 255).round().astype(np.uint8)


def batch(*pages: np.ndarray) -> Tensor:
    return torch.stack([torch.from_numpy(gray.copy()).expand(3, -1, -1) for gray in pages]) / 255


# -- entropy and reconstruction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 12, 16, 22, 32])
def test_entropy_at_the_fixed_threshold_takes_all_clean_print_for_blank_paper(size: int) -> None:
    """The counter-example to APT's threshold of 5.75 bits: all windows of print are below it."""
    text = batch(page(size))
    assert (entropy_bits(text) < APT_BITS).all()
    apt = PatchPolicy([(APT_BITS / ENTROPY_BITS, 16), (0.0, 32)], cell=32, scorer="entropy")
    assert apt.plan_images(text, 16)[0].ratio == 0.25  # every window is coarse
    safe = PatchPolicy([(0.3, 16), (0.0, 32)], cell=32, scorer="reconstruction")
    assert safe.plan_images(text, 16)[0].ratio > 0.8


def half_a_page(size: int = 12, paper: int = 255, ink: int = 0) -> np.ndarray:
    """Text in the upper 224 of 448 px, blank paper below."""
    gray = page(size, ink, paper, side=448).copy()
    gray[224:] = paper
    return gray


@pytest.mark.parametrize("size", [8, 12, 16, 22])
@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0), (120, 220)])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 8.0, 15.0])
def test_entropy_ranks_print_above_paper_also_under_even_noise(size: int, ink: int, paper: int, sigma: float) -> None:
    """Under a budget only the order counts, and there the rule is right: every window of text is above all of paper."""
    pixels = batch(noisy(half_a_page(size, paper, ink), sigma))
    bits = entropy_bits(pixels)[0]
    text, blank = bits[:6], bits[7:]
    assert text.min() > blank.max()
    policy = PatchPolicy([(0.5, 16), (0.0, 32)], cell=32, scorer="entropy", budget=196 + 3 * 98)  # 98 of 196 cells
    level = policy.plan_images(pixels, 16)[0].level
    assert (level[:6] == 0).all()
    assert (level[7:] == 1).all()


def test_entropy_ranks_shadow_and_grain_on_paper_above_clean_print() -> None:
    """Uneven pages: any spread of gray levels counts, also one without a stroke. `reconstruction` does not mind."""
    shadow, grain = half_a_page(), half_a_page()
    shadow[256:] = (shadow[256:] * np.linspace(1, 0.5, 448)).round()
    grain[256:] = noisy(grain[256:], 8.0)
    for gray in (shadow, grain):
        bits = entropy_bits(batch(gray))[0]
        assert bits[:6].max() < bits[8:].min()
        cells = score(batch(gray), "reconstruction", 32)[0]
        assert cells[:6].min() > cells[8:].max()


def test_entropy_takes_windows_over_the_border_for_the_densest() -> None:
    """On a page that 32 px do not divide, they come before all text."""
    gray = np.full((240, 240), 255, np.uint8)
    gray[:224, :224] = page(12)
    bits = entropy_bits(batch(gray))[0]
    assert bits[-1].min() > bits[:-1, :-1].max()
    assert bits[:, -1].min() > bits[:-1, :-1].max()


def test_entropy_is_that_of_the_histogram() -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 3, 64, 96)
    entropies = entropy_bits(image)
    gray = (image * torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]).sum(1) * 255
    for b, row, column in ((0, 0, 0), (1, 1, 2)):
        window = gray[b, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32].flatten().double().numpy()
        share = np.histogram(window, 512, (0, 255))[0] / 1024
        wanted = -(share[share > 0] * np.log2(share[share > 0])).sum()
        assert entropies[b, row, column].item() == pytest.approx(wanted, abs=0.01)
    over = entropy_bits(torch.zeros(1, 3, 40, 70))[0]  # never coarse over the border
    assert over.tolist() == [[0, 0, ENTROPY_BITS], [ENTROPY_BITS] * 3]


@pytest.mark.parametrize("sigma", [0.0, 1.0, 3.0, 8.0, 15.0])
def test_reconstruction_sees_print_through_noise(sigma: float) -> None:
    """Half a page of text, half of it paper: the noise gate follows the noise of the page."""
    text = page(12, paper=220, lines=6, side=224)
    cells = score(batch(noisy(text, sigma)), "reconstruction", 28)[0]
    assert (cells[:3] > 0.5).all()
    assert (cells[5:] < 0.1).all()


def test_reconstruction_finds_nothing_on_empty_pages() -> None:
    blank = np.full((224, 224), 255, np.uint8)
    ramp = np.linspace(60, 250, 224).round().astype(np.uint8)[None].repeat(224, 0)
    for empty in (blank, blank - 255, ramp, noisy(blank - 30, 4.0), noisy(blank, 4.0)):
        assert reconstruction(batch(empty)).max() < 0.1


@pytest.mark.parametrize("sigma", [1.0, 4.0, 10.0])
def test_noise_level_is_the_deviation(sigma: float) -> None:
    torch.manual_seed(0)
    gray = 128 + sigma * torch.randn(2, 200, 200)
    torch.testing.assert_close(noise_level(gray), torch.full((2,), sigma), rtol=0.05, atol=0.0)
    assert noise_level(torch.zeros(1, 5, 1)) == 0
    assert noise_level(255 * torch.rand(1, 64, 64)) == 16  # texture, not noise


# -- all scorers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["density", "edges", "reconstruction"])
def test_text_safe_scorers_tell_print_from_paper(name: Any) -> None:
    cells = score(batch(page(12, side=448, lines=10)), name, 28)[0]
    assert cells.shape == (16, 16)
    assert cells[1:5].min() > 0.3
    assert cells[1:5].mean() > 0.6
    assert cells[10:].max() < 0.1


@pytest.mark.parametrize("name", ["density", "edges", "reconstruction", "entropy", "uniform"])
@pytest.mark.parametrize("size", [(224, 224), (70, 126), (14, 14)])
def test_scores_are_densities_and_a_batch_is_its_images(name: Any, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    pages = batch(page(10), 255 - page(20), noisy(page(14), 5.0))[..., : size[0], : size[1]]
    cells = score(pages, name, 28, constant=0.4)
    assert cells.shape == (3, -(-size[0] // 28), -(-size[1] // 28))
    assert cells.dtype == torch.float32
    assert cells.min() >= 0
    assert cells.max() <= 1
    alone = torch.cat([score(image[None], name, 28, constant=0.4) for image in pages])
    torch.testing.assert_close(alone, cells, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(score(pages.flip(0), name, 28, constant=0.4), cells.flip(0), atol=1e-5, rtol=0.0)
    assert (score(pages, name, 28, "mean", 0.4) <= cells + 1e-6).all()
    assert not cells.requires_grad


def test_a_function_scores_at_any_resolution() -> None:
    images = torch.rand(2, 3, 56, 84)
    assert torch.equal(score(images, lambda x: x.mean(1), 28, "max"), score(images, lambda x: x.mean(1)[:, None], 28))
    coarse = score(images, lambda x: torch.tensor([[[0.25]], [[0.75]]]), 28)
    assert torch.equal(coarse, torch.tensor([0.25, 0.75])[:, None, None].expand(2, 2, 3))


# -- maps and cells -----------------------------------------------------------------------------------------------


@exact
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 12), st.integers(0, 10_000))
def test_cells_are_reduced_over_what_they_touch(size: int, pixels: int, cell: int, seed: int) -> None:
    """Against counting in parts of a pixel; the map is stretched over `pixels`, the cells begin where it does."""
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    count = -(-pixels // cell)
    fine = values.repeat_interleave(pixels)  # `size` values per pixel
    parts = [fine[k * cell * size : (k + 1) * cell * size] for k in range(count)]
    expected: dict[Reduce, list[Tensor]] = {"max": [p.max() for p in parts], "mean": [p.mean() for p in parts]}
    for reduce, wanted in expected.items():
        across = to_cells(values[None], (1, pixels), cell, (1, count), reduce)[0]  # pyright: ignore[reportArgumentType]
        down = to_cells(values[:, None], (pixels, 1), cell, (count, 1), reduce)[:, 0]  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(across, torch.stack(wanted))
        assert torch.equal(across, down)


def test_a_lone_digit_makes_its_cell_dense() -> None:
    gray = np.full((112, 112), 255, np.uint8)
    gray[32:48, 32:48] = page(11)[:16, :16]  # one or two characters in the second cell
    cells = score(batch(gray), "reconstruction", 28)[0]
    assert cells[1, 1] > 0.5
    cells[1, 1] = 0
    assert cells.max() < 0.1


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.full((1, 2, 2), float("nan")), "NaN counts"),
        (torch.full((1, 2, 2), 1.5), "from 1.5 to 1.5"),
        (torch.full((1, 2, 2), -0.1), "from -0.1"),
        (torch.zeros(2, 2, 2), r"\(2, 2, 2\) for 1 images; it must return \[1, h, w\]"),
        (torch.zeros(1, 3, 2, 2), r"\(1, 3, 2, 2\)"),
        (torch.zeros(1, 0, 2), r"\(1, 0, 2\)"),
    ],
)
def test_wrong_maps_are_named(returned: Tensor, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        score(torch.rand(1, 3, 28, 28), lambda _: returned, 14)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 28, 28), r"\(3, 28, 28\)"),
        (torch.rand(1, 4, 28, 28), r"\(1, 4, 28, 28\)"),
        (torch.rand(0, 3, 28, 28), r"\(0, 3, 28, 28\)"),
        (torch.zeros(1, 3, 28, 28, dtype=torch.uint8), "uint8"),
        (torch.rand(1, 3, 28, 28) * 255, "RGB in"),
        (torch.full((1, 3, 28, 28), float("nan")), "nan"),
    ],
)
def test_wrong_images_are_named(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(images, "reconstruction", 14)


def test_unknown_options_are_named() -> None:
    unknown: Any = "sobel"
    with pytest.raises(PlanError, match="scorer='sobel'"):
        score(torch.rand(1, 3, 28, 28), unknown, 14)
    with pytest.raises(PlanError, match="reduce='sobel'"):
        score(torch.rand(1, 3, 28, 28), "uniform", 14, unknown)
