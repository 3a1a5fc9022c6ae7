"""The text layer of a page: words and boxes, the script, and the rule that drops layers that lie."""

import numpy as np
import pytest

from sfa_adapters.recipes.density.text_layer import TextLayer, layer_fault, read_layers, script_of

PAGE = """<page width="200.0" height="100.0">
  <word xMin="10.0" yMin="20.0" xMax="50.0" yMax="30.5">Fish &amp; chips</word>
  <word xMin="60.0" yMin="20.0" xMax="60.0" yMax="30.0">flat</word>
  <word xMin="70.0" yMin="20.0" xMax="90.0" yMax="30.0"> </word>
</page>
<page width="50.0" height="60.0">
</page>"""


def _page(lines=6):
    """A white page of 400 x 300 px with bars for words, and the layer of a page of half that size in points."""
    picture = np.full((300, 400, 3), 255, np.uint8)
    boxes = []
    for line in range(lines):
        for left in (20, 140, 260):
            top = 20 + 40 * line
            picture[top + 3 : top + 15, left : left + 100 : 3] = 0
            boxes.append((left / 2, top / 2, left / 2 + 50, top / 2 + 9))
    return picture, TextLayer((200.0, 150.0), np.array(boxes), ("wordword",) * len(boxes))


def _areas(layer):
    return layer.boxes * 2


def test_words_are_read_page_by_page_without_empty_ones():
    first, second = read_layers(PAGE)
    assert first.size == (200.0, 100.0)
    assert first.words == ("Fish & chips",)
    np.testing.assert_allclose(first.boxes, [[10, 20, 50, 30.5]])
    assert second.words == ()
    assert second.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("words", "script"),
    [
        (("plain", "words", "1234"), "latin"),
        (("слово", "bash"), "cyrillic"),
        (("λόγος",), "greek"),
        (("كلمة",), "arabic"),
        (("漢字文",), "chinese"),
        (("漢字文を読む", "漢字"), "japanese"),
        (("한국어",), "korean"),
        (("many", "Latin", "words", "and", "漢"), "latin"),
        ((), "latin"),
    ],
)
def test_the_script_of_a_page(words, script):
    assert script_of(words) == script


def test_an_honest_layer_has_no_fault():
    picture, layer = _page()
    assert layer_fault(picture, layer, _areas(layer)) is None


def test_words_that_are_not_printed_are_a_fault():
    picture, layer = _page()
    picture[:] = 255
    assert layer_fault(picture, layer, _areas(layer)) == "invisible words"


def test_printed_words_that_are_not_listed_are_a_fault():
    picture, layer = _page()
    fewer = TextLayer(layer.size, layer.boxes[:14], layer.words[:14])
    assert layer_fault(picture, fewer, _areas(layer)) == "printed words that are not in it"
    assert layer_fault(picture, fewer, _areas(fewer)) is None


def test_boxes_beside_the_letters_are_a_fault():
    picture, layer = _page()
    tall = layer.boxes.copy()
    tall[:, 1] -= 50
    assert "not where" in str(layer_fault(picture, TextLayer(layer.size, tall, layer.words), _areas(layer)))


def test_a_page_with_few_words_and_one_of_another_shape_are_faults():
    picture, layer = _page()
    few = TextLayer(layer.size, layer.boxes[:3], layer.words[:3])
    assert "characters" in str(layer_fault(picture, few, _areas(layer)))
    wide = TextLayer((300.0, 150.0), layer.boxes, layer.words)
    assert "shape" in str(layer_fault(picture, wide, _areas(layer)))
