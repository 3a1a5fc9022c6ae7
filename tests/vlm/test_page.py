"""Evidence boxes follow a page into the image that the processor makes of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sfa_adapters.vlm.page import Page, padded_to_square

SIDES = st.integers(1, 40)


@given(SIDES, SIDES)
def test_a_padded_page_is_in_the_middle_and_boxes_follow(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(1, 255, (height, width, 3), dtype=np.uint8)
    page = padded_to_square(image, (0.0, 0.5, 1.0))
    left, top, right, bottom = (round(value) for value in page.place((0, 0, width, height)))
    side = max(height, width)
    assert (left, top) == ((side - width) // 2, (side - height) // 2)
    assert page.image.shape == (side, side, 3)
    assert np.array_equal(page.image[top:bottom, left:right], image)
    outside = np.ones(page.image.shape[:2], dtype=bool)
    outside[top:bottom, left:right] = False
    assert (page.image[outside] == (0, 127, 255)).all()


def test_boxes_of_an_image_of_another_size() -> None:
    page = Page.unchanged(np.zeros((20, 10, 3), np.uint8))
    assert page.place((0, 0, 5, 5)) == (0, 0, 5, 5)
    assert page.place((10, 20, 30, 40), source=(100, 200)) == (1, 2, 3, 4)
