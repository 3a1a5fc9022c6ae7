"""`sfa analyze tokens --pages`: tables for pages of the user, and one line for each mistake."""

import json

import numpy as np
import pytest
from PIL import Image

from sfa_adapters.cli.main import main
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.analyze import own_pages
from sfa_adapters.recipes.density.plan_rows import Case, plan_rows
from sfa_adapters.recipes.density.real_pages import RealPage
from sfa_adapters.recipes.synthetic.pages import text_page


@pytest.fixture
def folder(tmp_path):
    """Two pages with files of words, one without."""
    scans = tmp_path / "scans"
    scans.mkdir()
    for seed in range(3):
        page = text_page(6 + seed, seed)
        Image.fromarray(page.image).save(scans / f"{seed}.png")
        words = {"boxes": page.boxes.tolist(), "script": "latin", "size": list(page.image.shape[:2])}
        (scans / f"{seed}.words.json").write_text(json.dumps(words))
    (scans / "2.words.json").unlink()
    return scans


@pytest.fixture
def engine(monkeypatch):
    """An OCR engine that sees the true boxes of the third page."""
    boxes = text_page(8, 2).boxes.astype(float)
    monkeypatch.setattr(own_pages, "ocr_boxes", lambda picture: boxes)


def _run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["analyze", "tokens", *map(str, arguments)])
    out, err = capsys.readouterr()
    return left.value.code, out, err


@pytest.mark.usefixtures("engine")
def test_both_tables_are_printed_and_written(capsys, folder, tmp_path, monkeypatch):
    cases = (Case("boxes", "14, 56"), Case("density", "14, 56"), Case("random", "14, 56"))
    monkeypatch.setattr(own_pages, "plan_rows", lambda pages, _: plan_rows(pages, cases, (0.5,)))
    code, out, _ = _run(capsys, "--pages", folder, "--out", tmp_path / "out")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    content = json.loads((tmp_path / "out/pages.json").read_text())
    assert (content["pages"], content["by_engine"]) == (3, 1)
    assert [row["density"] for row in content["density"]] == [
        "estimator", "edge labels", "Canny, blurred"
    ]  # fmt: skip
    assert float(content["density"][0]["r"]) > 0.9
    fine = {row["name"]: row["fine"]["value"] for row in content["plans"]}
    assert fine["boxes; 14, 56 px"] >= fine["density; 14, 56 px"] > fine["random; 14, 56 px"]
    assert fine["down-sampling"] == 0
    assert "| density |" in (tmp_path / "out/pages.md").read_text()


def test_a_router_of_pages_takes_the_densest_ones():
    rng = np.random.default_rng(0)
    pages = [_page(rng, lines) for lines in (2, 12, 20, 6)]
    row = next(row for row in plan_rows(pages, (), (0.5,)) if row.name == "page router")
    assert row.fine.value == 0.25  # (4 * 0.5 - 1) / 3 = a third of four pages: one
    assert row.tokens == pytest.approx((1 + 3 * 0.25) / 4)
    assert row.tokens <= 0.5


def _page(rng, lines):
    boxes = np.array([(40, 40 + 30 * k, 40 + rng.uniform(300, 600), 55 + 30 * k) for k in range(lines)], np.float32)

    class Page(RealPage):
        def picture(self):
            return np.full((900, 700, 3), 255, np.uint8)

    return Page(None, boxes, "latin", f"{lines}", (900, 700))


def test_larger_cells_have_the_density_that_the_scorer_gives_them(folder):
    import torch

    from sfa_adapters.adat.scorers import score
    from sfa_adapters.recipes.density.plan_rows import _Shown
    from sfa_adapters.recipes.density.real_pages import read_page

    shown = _Shown(read_page(folder / "0.words.json"), 0)
    for scorer in ("reconstruction", "edges"):
        for cell in (28, 56, 112):
            torch.testing.assert_close(shown.density(scorer, cell), score(shown.pixels, scorer, cell)[0])


def _mistake(capsys, *arguments):
    code, _, err = _run(capsys, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    return err


def test_a_folder_of_pdf_files_is_told_how_to_render_them(capsys, tmp_path):
    (tmp_path / "a.pdf").write_text("%PDF")
    assert "pdftoppm -r 150 -png a.pdf page" in _mistake(capsys, "--pages", tmp_path)


def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch):
    assert "not a folder" in _mistake(capsys, "--pages", tmp_path / "none")
    assert "has no images" in _mistake(capsys, "--pages", tmp_path)
    Image.new("RGB", (60, 40), "white").save(tmp_path / "blank.png")
    monkeypatch.setattr(own_pages, "ocr_boxes", lambda picture: np.zeros((0, 4)))
    assert "no text on any of the 1 images" in _mistake(capsys, "--pages", tmp_path)


def test_a_damaged_page_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(DataError, match=r"a\.png"):
        own_pages.own_pages(tmp_path)
