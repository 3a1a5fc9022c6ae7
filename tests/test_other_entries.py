"""Ways into a tower other than its forward, and adapters that leave while others stay."""

from typing import Any

import timm
import torch

from sfa_adapters import describe, eject_sfa, inject_sfa
from tests import support
from tests.towers import CASES


def test_timm_forward_features_sees_the_grid_of_its_image():
    """A transposed grid has the same number of tokens, so only the image can tell."""
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=96, dynamic_img_size=True, num_classes=0)
    model.eval()
    inject_sfa(model, support.strong_config())
    images = [torch.randn(1, 3, 64, 96), torch.randn(1, 3, 96, 64)]
    with torch.no_grad():
        expected = []
        for image in images:
            model(image)
            expected.append(model.forward_features(image))
        found = [model.forward_features(image) for image in images]
        intermediate = model.forward_intermediates(images[0], intermediates_only=True, norm=True, output_fmt="NLC")[-1]
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(mine, reference)
    support.assert_close(intermediate, expected[0][:, 1:])


def test_ejecting_the_active_adapter_activates_what_is_left():
    """Warnings are errors here: PEFT would warn once per layer."""
    case = next(case for case in CASES if case.name == "clip")
    model, inputs = case.fresh()
    inject_sfa(model, support.strong_config(), adapter_name="first")
    expected = support.read(case, model, inputs)
    inject_sfa(model, support.strong_config(), adapter_name="second")
    assert support.difference(support.read(case, model, inputs), expected) > 1e-3
    eject_sfa(model, "second")
    assert describe(model).active == ("first",)
    assert torch.equal(support.read(case, model, inputs), expected)
