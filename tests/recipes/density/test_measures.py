"""Measures of density maps against the same measures written out plainly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters.recipes.density.measures import BINS, DENSE, TEXT, count_page, measure


def _pages(seed, count=5):
    rng = np.random.default_rng(seed)
    pages = []
    for number in range(count):
        truth = np.clip(rng.normal(0.2, 0.5, (9, 7)), 0, 1)
        estimate = np.clip(truth + rng.normal(0, 0.2, truth.shape), 0, 1)
        middles = rng.uniform((-1, -1), (10, 8), (20, 2))
        pages.append((f"document {number % 3}", estimate, truth, middles))
    return pages


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_all_measures_are_what_they_say(seed):
    pages = _pages(seed)
    counts = [count_page(*page) for page in pages]
    x, y = (np.concatenate([p[i].ravel() for p in pages]) for i in (1, 2))
    assert measure(counts, "r").value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    # A histogram cannot tell values of one bin apart: the reference sees the same bins.
    bins = np.minimum((x * BINS).astype(int), BINS - 1)
    text, blank = bins[y >= DENSE], bins[y == 0]
    wins = (text[:, None] > blank).mean() + 0.5 * (text[:, None] == blank).mean()
    assert measure(counts, "AUC").value == pytest.approx(wins, abs=1e-9)
    assert measure(counts, "false").value == pytest.approx((x[y == 0] > TEXT).mean(), abs=1e-9)
    hits = []
    for _, estimate, _, middles in pages:
        for row, column in middles:
            if 0 <= row < 9 and 0 <= column < 7:
                hits.append(estimate[int(row), int(column)] > TEXT)
    assert measure(counts, "hit").value == pytest.approx(np.mean(hits), abs=1e-9)


def test_intervals_resample_documents():
    pages = _pages(1, 6)
    counts = [count_page(*page) for page in pages]
    interval = measure(counts, "r")
    assert interval.low < interval.value < interval.high
    alike = [count_page("one", *pages[0][1:]) for _ in range(6)]
    assert measure(alike, "r").low == pytest.approx(measure(alike, "r").high)


def test_pages_without_text_have_no_hit_rate():
    counts = [count_page("a", np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((0, 2)))]
    assert np.isnan(measure(counts, "hit").value)
    assert measure(counts, "false").value == 0


def test_scans_are_compared_in_coarser_cells() -> None:
    rng = np.random.default_rng(5)
    estimate, truth = rng.random((8, 12)), rng.random((8, 12))
    middles = np.array([[1.5, 2.5], [7.0, 11.0]])
    fine = count_page("a", estimate, truth, middles)
    coarse = count_page("a", estimate, truth, middles, coarse=4)
    blocks = (values.reshape(2, 4, 3, 4).mean(axis=(1, 3)) for values in (estimate, truth))
    np.testing.assert_allclose(coarse.sums, count_page("a", *blocks, middles / 4).sums)
    assert coarse.sums[0] == 6
    np.testing.assert_array_equal(coarse.words, fine.words)  # words are found on the map that was given
    odd = count_page("a", np.arange(5.0)[None] / 5, np.zeros((1, 5)), middles, coarse=2)
    np.testing.assert_allclose(odd.sums[[0, 1]], [3, (0.5 + 2.5 + 4) / 5])
