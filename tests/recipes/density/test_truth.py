"""True density of views: that of boxes where nothing is turned, and moved with the page where it is."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters.adat.labels import box_density
from sfa_adapters.recipes.density.truth import corners_of, heights_of, view_density

UPRIGHT = np.eye(3)
whole = st.integers(0, 250)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(whole, whole, st.integers(1, 90), st.integers(1, 60)), min_size=1, max_size=12))
def test_upright_whole_boxes_have_the_density_of_boxes(places):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in places], dtype=float)
    density = view_density(corners_of(boxes, UPRIGHT), (16, 16))
    np.testing.assert_allclose(density, box_density(boxes, (256, 256), (16, 16)), atol=1e-6)


def test_a_turn_by_ninety_degrees_turns_the_density():
    boxes = np.array([[20, 40, 120, 60], [30.0, 100, 200, 130]])
    turn = np.array([[0, -1, 256], [1, 0, 0], [0, 0, 1.0]])  # clockwise: (x, y) to (256 - y, x)
    upright = view_density(corners_of(boxes, UPRIGHT), (16, 16))
    turned = view_density(corners_of(boxes, turn), (16, 16))
    np.testing.assert_allclose(turned, np.rot90(upright, -1), atol=1e-6)


def test_a_turned_box_is_filled_as_an_obvious_reference_fills_it():
    boxes = np.array([[60.0, 100, 190, 124]])
    angle = np.deg2rad(30)
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.array([[c, -s, 128 - c * 128 + s * 128], [s, c, 128 - s * 128 - c * 128], [0, 0, 1.0]])
    y, x = np.mgrid[0:256, 0:256] + 0.5
    back = np.linalg.inv(matrix) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    inside = (back[0] >= 60) & (back[0] <= 190) & (back[1] >= 100) & (back[1] <= 124)
    area = view_density(corners_of(boxes, matrix), (16, 16)).sum()
    import cv2

    smooth = cv2.GaussianBlur(inside.reshape(256, 256).astype(np.float32), (0, 0), 4, borderType=cv2.BORDER_REPLICATE)
    slow = np.minimum(smooth * 1.5, 1).reshape(16, 16, 16, 16).mean(axis=(1, 3))
    np.testing.assert_allclose(view_density(corners_of(boxes, matrix), (16, 16)), slow, atol=0.02)
    assert area > 5


def test_the_height_of_a_line_does_not_depend_on_its_turn():
    boxes = np.array([[10.0, 10, 110, 30]])
    turn = np.array([[0, -2, 300], [2, 0, 0], [0, 0, 1.0]])
    assert abs(heights_of(corners_of(boxes, turn))[0] - 39) < 1e-6  # twice 20 px, half a pixel less on either side


def test_the_strip_around_a_view_blurs_its_border():
    boxes = np.array([[-64.0, -64, 0, 320]])  # left of the view, up to its border
    corners = corners_of(boxes, UPRIGHT)
    assert view_density(corners, (16, 16), around=1)[:, 0].min() > 0
    assert view_density(corners, (16, 16)).max() == 0
