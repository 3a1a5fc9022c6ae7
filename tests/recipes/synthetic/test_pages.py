"""Rendered pages: the boxes are where the ink is, and equal seeds give equal pages."""

import numpy as np
import pytest

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic import scans, sheet
from sfa_adapters.recipes.synthetic.pages import KINDS, SIZE, render_page, text_page


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_page(kind):
    page, again, other = render_page(kind, 3), render_page(kind, 3), render_page(kind, 4)
    assert page.image.shape == (SIZE, SIZE, 3)
    assert page.image.dtype == np.uint8
    np.testing.assert_array_equal(page.image, again.image)
    np.testing.assert_array_equal(page.boxes, again.boxes)
    assert (page.image != other.image).any()
    assert page.boxes.shape == (len(page.x_heights), 4)
    assert (page.boxes[:, 2:] > page.boxes[:, :2]).all()
    assert page.boxes.size == 0 or (page.boxes.min() >= 0 and page.boxes.max() <= SIZE)


def test_which_kinds_carry_text():
    for kind in KINDS:
        counts = [len(render_page(kind, seed).boxes) for seed in range(6)]
        if kind in ("blank", "lines"):
            assert max(counts) == 0
        elif kind != "photo":
            assert min(counts) > 0


@pytest.mark.parametrize("seed", range(3))
def test_all_ink_of_a_clean_page_is_in_its_boxes_and_every_box_has_ink(seed):
    page = text_page(9, seed)
    ink = page.image.min(axis=2) < 128
    inside = np.zeros_like(ink)
    for left, top, right, bottom in page.boxes:
        area = np.s_[int(top) : int(np.ceil(bottom)) + 1, int(left) : int(np.ceil(right)) + 1]
        inside[area] = True
        assert ink[area].any()
    assert ink.sum() > 1000
    assert (ink & ~inside).sum() / ink.sum() < 0.01


@pytest.mark.parametrize("x_height", [6.0, 12.0, 20.0])
def test_x_heights_are_what_was_asked_for(x_height):
    for face in sheet.FACES["train"] + sheet.FACES["test"]:
        font = sheet.font_of(face, round(x_height / sheet.x_height_of(face), 1))
        _, top, _, bottom = font.getbbox("x", anchor="ls")
        assert abs((bottom - top) - x_height) <= 1.0


def test_a_turn_takes_the_boxes_along():
    rng = np.random.default_rng(0)
    image = np.full((SIZE, SIZE, 3), 255, np.uint8)
    boxes = np.array([[20.0, 30.0, 60.0, 40.0], [380.0, 400.0, 430.0, 412.0]])
    for left, top, right, bottom in boxes.astype(int):
        image[top:bottom, left:right] = 0
    moved = 0.0
    for _ in range(12):
        turned, turned_boxes = scans.artefacts(rng, image, boxes, (255, 255, 255), 1.0)
        ink = turned.min(axis=2) < 60
        for left, top, right, bottom in turned_boxes:
            outer = np.zeros_like(ink)
            outer[int(top) - 2 : int(bottom) + 3, int(left) - 2 : int(right) + 3] = True
            ink &= ~outer
        assert ink.mean() < 0.004  # specks only
        moved = max(moved, float(np.abs(turned_boxes - boxes).max()))
    assert moved > 1


def test_splits_share_nothing():
    assert not set(sheet.FACES["train"]) & set(sheet.FACES["test"])
    assert not set(scans.PHOTOGRAPHS["train"]) & set(scans.PHOTOGRAPHS["test"])
    assert (render_page("text", 1, "train").image != render_page("text", 1, "val").image).any()


def test_unknown_kinds_and_splits_are_named():
    with pytest.raises(DataError, match="poem"):
        render_page("poem", 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="dev"):
        render_page("text", 0, "dev")  # pyright: ignore[reportArgumentType]
