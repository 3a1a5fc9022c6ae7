"""Mean and deviation of image normalisation: from the record of the tower, or as the user gives them."""

from typing import Any

import numpy as np

from sfa_adapters import processor_statistics
from sfa_adapters.normalisation import image_statistics
from sfa_adapters.tower_search import FoundTower, find_tower
from tests.support.hosts import HOSTS

CASES = {case.name: case for case in HOSTS}


def _of(located: FoundTower, **given: Any) -> Any:
    return image_statistics(located.backbone, located.tower, **given)


def test_towers_say_what_their_images_are_normalised_with() -> None:
    expected = {
        "llava": processor_statistics.CLIP,
        "internvl": processor_statistics.IMAGENET,
        "llava_onevision": processor_statistics.HALF,
        "qwen2_5_vl": processor_statistics.CLIP,
    }
    for name, values in expected.items():
        assert _of(find_tower(CASES[name].build())) == values


def test_what_the_user_says_comes_first_and_half_of_it_is_not_enough() -> None:
    tower = find_tower(CASES["llava"].build())
    assert _of(tower, std=(1.0, 1.0, 1.0)) == (processor_statistics.CLIP[0], (1.0, 1.0, 1.0))
    assert image_statistics(None, None, (0.5,) * 3, (0.25,) * 3) == ((0.5,) * 3, (0.25,) * 3)
    assert image_statistics(None, None, (0.5,) * 3) is None


def test_lists_and_arrays_become_tuples() -> None:
    tower = find_tower(CASES["llava"].build())
    mean, std = _of(tower, mean=np.zeros(3), std=[1.0] * 3)
    assert (mean, std) == ((0.0,) * 3, (1.0,) * 3)
    assert {type(mean), type(std)} == {tuple}
