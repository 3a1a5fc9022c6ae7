"""The survey of towers: what works, what nobody checks, what is refused and why, what cannot be built."""

from __future__ import annotations

import pytest
from torch import nn

from sfa_adapters.testing import survey

CLASS = "transformers.models.internvl.modeling_internvl.InternVLVisionModel"


def test_each_type_has_a_verdict_and_a_reason_where_it_does_not_work() -> None:
    names = ["internvl", "resnet", "nonsense"]
    build = {"internvl": survey.build_host, "resnet": survey.build_vision_model, "nonsense": survey.build_host}
    works, none, unbuilt = survey.survey(names, lambda name: build[name](name), {CLASS})
    assert (works.verdict, works.tower, works.path) == ("works", "InternVLVisionModel", "model.vision_tower")
    assert (works.backbone, works.joined, works.reason) == ("internvit", "batch", "")
    assert none.verdict == "none"
    assert "No registered backbone fits ResNetModel" in none.reason
    assert unbuilt.verdict == "unbuilt"
    assert unbuilt.reason.startswith("KeyError")


def test_a_tower_of_a_class_that_the_suite_does_not_check_is_not_said_to_work() -> None:
    (entry,) = survey.survey(["internvl"], survey.build_host, set())
    assert entry.verdict == "unchecked"


@pytest.mark.parametrize(("only_vision", "verdict"), [(True, "refused"), (False, "none")])
def test_any_attention_of_a_vision_model_counts(only_vision: bool, verdict: str) -> None:
    class Attention(nn.Module): ...

    (entry,) = survey.survey(["x"], lambda name: nn.Sequential(Attention()), set(), only_vision)
    assert entry.verdict == verdict


def test_what_is_surveyed_comes_from_the_installed_libraries() -> None:
    hosts = survey.hosts()
    assert {"internvl", "qwen3_vl", "llava_onevision"} <= set(hosts)
    assert not set(hosts) & set(survey.vision_models())
    assert {"dinov2", "siglip_vision_model"} <= set(survey.vision_models())
    assert "vit_base_patch16_224" in survey.timm_models()
