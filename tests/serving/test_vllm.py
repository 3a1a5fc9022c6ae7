"""The part of the vLLM plug-in that needs no vLLM: which adapter is served, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfa_adapters.errors import ServingError
from sfa_adapters.serving.image_tokens import TOKENS
from sfa_adapters.serving.vllm import register
from sfa_adapters.serving.vllm_options import ENVIRONMENT, check_config, check_image_tokens, folder_of

QWEN = "Qwen2_5_VLForConditionalGeneration"


def _config(additional: Any = None, architecture: str = QWEN, **settings: Any) -> Any:
    compilation = {"cudagraph_mm_encoder": False, "compile_mm_encoder": False}
    names = ("mm_encoder_attn_dtype", "mm_encoder_tp_mode", "video_pruning_rate")
    multimodal = SimpleNamespace(**{name: settings.pop(name, None) for name in names})
    return SimpleNamespace(
        additional_config=additional or {},
        compilation_config=SimpleNamespace(**{**compilation, **settings}),
        model_config=SimpleNamespace(multimodal_config=multimodal, architectures=[architecture]),
    )


def test_the_option_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert folder_of(_config()) is None
    assert folder_of(_config({"sfa": "a"})) == "a"
    monkeypatch.setenv(ENVIRONMENT, "b")
    assert folder_of(_config()) == "b"
    assert folder_of(_config({"sfa": "b"})) == "b"
    with pytest.raises(ServingError, match="names the adapter a, and SFA_ADAPTER names b: give one"):
        folder_of(_config({"sfa": "a"}))
    with pytest.raises(ServingError, match="must be the folder of an adapter, not 3"):
        folder_of(_config({"sfa": 3}))


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"mm_encoder_attn_dtype": "fp8"}, "FP8 attention of the encoder"),
        ({"cudagraph_mm_encoder": True}, "CUDA graphs of the encoder"),
        ({"compile_mm_encoder": True}, "compilation of the encoder"),
    ],
)
def test_what_is_refused_by_name(setting: dict[str, Any], name: str) -> None:
    check_config(_config())
    with pytest.raises(ServingError, match=name):
        check_config(_config(**setting))


def test_a_wrong_folder_is_named_before_vllm_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "nowhere"))
    with pytest.raises(ServingError, match="nowhere is no folder"):
        register()


def test_fewer_image_tokens_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKENS, raising=False)
    check_image_tokens(_config(architecture="InternVLForConditionalGeneration"))  # it was not asked for
    monkeypatch.setenv(TOKENS, "0.5")
    check_image_tokens(_config())
    with pytest.raises(ServingError, match=r"offered for Qwen2_5_VL.*is a InternVLForConditionalGeneration"):
        check_image_tokens(_config(architecture="InternVLForConditionalGeneration"))
    with pytest.raises(ServingError, match="cannot be used with video_pruning_rate"):
        check_image_tokens(_config(video_pruning_rate=0.5))
    with pytest.raises(ServingError, match="cudagraph_mm_encoder"):
        check_image_tokens(_config(cudagraph_mm_encoder=True))
    check_image_tokens(_config(mm_encoder_tp_mode="data"))
    monkeypatch.setenv(TOKENS, "blank")
    check_image_tokens(_config(mm_encoder_tp_mode="weights"))
    with pytest.raises(ServingError, match="each process encodes other images"):
        check_image_tokens(_config(mm_encoder_tp_mode="data"))


def test_a_wrong_share_is_named_before_vllm_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv(TOKENS, "half")
    with pytest.raises(ServingError, match="SFA_IMAGE_TOKENS='half' must be the share"):
        register()
