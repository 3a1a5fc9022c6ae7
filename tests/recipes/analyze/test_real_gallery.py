"""The gallery of real pages: it is drawn from a set with all scripts, and says what a set lacks."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image
from sfa_adapters.recipes.analyze.real_gallery import draw_real_gallery


def page(folder: Path, script: str, side: int = 400) -> None:
    """One page with two words, and the same page larger, as if it were scanned at 600 dpi."""
    place = folder / "test" / "pages" / f"{script}-doc"
    place.mkdir(parents=True, exist_ok=True)
    picture = np.full((side, side, 3), 255, dtype=np.uint8)
    boxes = [[60.0, 80.0, 200.0, 100.0], [60.0, 180.0, 260.0, 200.0]]
    for left, top, right, bottom in boxes:
        picture[int(top) : int(bottom), int(left) : int(right) : 3] = 0
    cv2.imwrite(str(place / "p-0001.png"), picture)
    cv2.imwrite(str(place / "p-0001.600dpi.png"), cv2.resize(picture, None, fx=3, fy=3))
    content = {"boxes": boxes, "script": script, "size": [side, side]}
    (place / "p-0001.words.json").write_text(json.dumps(content))


def test_the_gallery_is_drawn_from_pages_of_all_scripts(tmp_path: Path) -> None:
    for script in ("latin", "chinese", "japanese", "arabic"):
        page(tmp_path, script)
    with pytest.raises(DataError, match="no cyrillic page"):
        draw_real_gallery(tmp_path, tmp_path / "x.png")
    page(tmp_path, "cyrillic")
    picture = as_image(draw_real_gallery(tmp_path, tmp_path / "gallery.png"))
    assert min(picture.shape[:2]) > 1000
    assert picture.min() < 50
