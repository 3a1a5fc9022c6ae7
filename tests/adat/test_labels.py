"""Density pseudo labels: text against other busy texture, on a scale that does not depend on the page."""

import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters.adat import density_labels, labels
from sfa_adapters.adat.labels import box_density
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic.pages import SIZE, render_page, text_page

TEXT = 0.3  # above it a place counts as text: the lower threshold of the published plan


def _white(value=255):
    return np.full((SIZE, SIZE, 3), value, np.uint8)


def _correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.mark.parametrize("value", [0, 90, 250, 255])
def test_blank_paper_is_zero(value):
    assert density_labels(_white(value)).max() == 0


@pytest.mark.parametrize("sigma", [2, 5, 10, 20, 40])
def test_noise_is_not_text(sigma):
    rng = np.random.default_rng(sigma)
    noisy = np.clip(235 + rng.normal(0, sigma, (SIZE, SIZE, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    assert density_labels(noisy).mean() < 0.02


@pytest.mark.parametrize("seed", range(6))
def test_blank_scans_stay_below_two_percent(seed):
    assert density_labels(render_page("blank", seed).image).mean() < 0.02


@pytest.mark.parametrize(("step", "weight"), [(8, 1), (16, 1), (16, 3), (33, 1), (33, 3)])
def test_grids_and_hatching_are_edges_but_not_text(step, weight):
    grid, hatching, frames = _white(), _white(), _white()
    for k in range(-SIZE, 2 * SIZE, step):
        cv2.line(grid, (k, 0), (k, SIZE), (0, 0, 0), weight)
        cv2.line(grid, (0, k), (SIZE, k), (0, 0, 0), weight)
        cv2.line(hatching, (k, 0), (k + SIZE, SIZE), (0, 0, 0), weight, cv2.LINE_AA)
    for k in range(4, SIZE // 2 - 48, step):  # smaller ones might be letters
        cv2.rectangle(frames, (k, k), (SIZE - k, SIZE - k), (0, 0, 0), weight)
    for page in (grid, hatching, frames):
        assert (cv2.Canny(page, 80, 160) > 0).mean() > 0.02  # there are edges
        assert (density_labels(page) > TEXT).mean() < 0.03


def test_text_in_a_table_with_rules_is_found():
    page = _white()
    for k in range(0, SIZE, 32):
        cv2.line(page, (k, 0), (k, SIZE), (0, 0, 0), 1)
        cv2.line(page, (0, k), (SIZE, k), (0, 0, 0), 1)
    bare = density_labels(page)
    for k in range(32, SIZE - 64, 64):
        cv2.putText(page, "48", (k + 4, k + 22), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    density = density_labels(page)
    for k in range(32, SIZE - 64, 64):
        assert density[k // 16 : k // 16 + 2, k // 16 : k // 16 + 2].max() > TEXT
    assert (bare > TEXT).mean() < 0.02


@pytest.mark.parametrize("x_height", [6, 8, 12, 20])
def test_text_is_found_down_to_six_pixels(x_height):
    page = text_page(x_height, seed=x_height)
    density, true = density_labels(page.image), box_density(page.boxes, (SIZE, SIZE))
    centre = ((page.boxes[:, :2] + page.boxes[:, 2:]) / 32).astype(int).clip(0, 27)
    assert (density[centre[:, 1], centre[:, 0]] > TEXT).mean() > 0.9
    assert _correlation(density, true) > 0.8


def test_light_text_on_dark_paper_is_the_same_text():
    page = text_page(8, seed=3).image
    assert _correlation(density_labels(page), density_labels(255 - page)) > 0.97


@pytest.mark.parametrize("kind", ["text", "table", "mixed"])
def test_edges_agree_with_the_printed_boxes(kind):
    pairs = [
        (density_labels(p.image), box_density(p.boxes, (SIZE, SIZE))) for p in (render_page(kind, s) for s in range(8))
    ]
    density, true = (np.stack(part) for part in zip(*pairs, strict=True))
    assert _correlation(density, true) > 0.7


def test_the_scale_does_not_depend_on_the_rest_of_the_page():
    page = _white()
    cv2.putText(page, "small words here", (20, 40), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    alone = density_labels(page)[:4]
    page[200:] = text_page(9, seed=1).image[200:]
    np.testing.assert_array_equal(density_labels(page)[:4], alone)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=30, deadline=None)
def test_any_page_and_any_grid(rows, columns, height, width):
    picture = np.random.default_rng(height).integers(0, 256, (height, width), dtype=np.uint8)
    density = density_labels(picture, (rows, columns))
    assert density.shape == (rows, columns)
    assert density.dtype == np.float32
    assert density.min() >= 0
    assert density.max() <= 1


# -- boxes ------------------------------------------------------------------------------------------------------------


def test_boxes_full_and_empty():
    assert box_density(np.zeros((0, 4)), (100, 50), (3, 5)).tolist() == [[0.0] * 5] * 3
    np.testing.assert_allclose(box_density(np.array([[0, 0, 50, 100]]), (100, 50), (3, 5)), 1.0)


@given(
    st.lists(st.tuples(*[st.integers(-20, 140)] * 4), min_size=1, max_size=6), st.tuples(*[st.integers(-20, 140)] * 4)
)
@settings(max_examples=60, deadline=None)
def test_one_more_box_never_lowers_a_density(boxes, more):
    def tidy(box):
        return (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))

    some = np.array([tidy(b) for b in boxes])
    before = box_density(some, (112, 112), (7, 7))
    after = box_density(np.concatenate([some, [tidy(more)]]), (112, 112), (7, 7))
    assert (after >= before - 1e-6).all()
    assert (after <= 1).all()


def test_a_box_far_from_a_cell_does_not_touch_it():
    density = box_density(np.array([[32, 32, 48, 48]]), (160, 160), (10, 10))
    assert density[2, 2] > 0.8
    assert density[:1].max() == density[5:].max() == 0


@pytest.mark.parametrize("boxes", [np.zeros((2, 3)), np.array([[0, 0, np.nan, 1]])])
def test_bad_boxes_are_named(boxes):
    with pytest.raises(DataError, match="boxes"):
        box_density(boxes, (10, 10))


# -- mistakes and OCR -------------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    with pytest.raises(DataError, match="grid"):
        density_labels(_white(), (0, 28))
    with pytest.raises(DataError, match="grid"):
        density_labels(_white(), (28.0, 28.0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"'boxes'.*edges, ocr"):
        density_labels(_white(), source="boxes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="float values"):
        density_labels(np.full((4, 4), 3.0))


def test_a_missing_ocr_engine_names_its_extra(monkeypatch):
    labels._ocr_engine.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[ocr\]"):
        density_labels(_white(), source="ocr")
    labels._ocr_engine.cache_clear()


def test_boxes_of_the_engine_become_densities(monkeypatch):
    class Found:
        boxes: np.ndarray | None = np.array([[[32, 30], [60, 32], [60, 48], [32, 46]]])

    monkeypatch.setattr(labels, "_ocr_engine", lambda: lambda image, **options: Found())
    density = density_labels(_white(), source="ocr")
    np.testing.assert_array_equal(density, box_density(np.array([[32, 30, 60, 48]]), (SIZE, SIZE)))
    assert density[2, 2] > 0.8
    Found.boxes = None
    assert density_labels(_white(), source="ocr").max() == 0
