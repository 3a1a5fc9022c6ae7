"""Exports for inference engines: trained weights under their ordinary names, and the bias beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from sfa_adapters import eject_sfa, inject_sfa, load_sfa
from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.reduction import FastVConfig, inject_fastv
from sfa_adapters.serving.adapter import read_adapter
from sfa_adapters.sharing import export_for_engine
from tests.support.compare import strong_config


def _answer(model: Any, processor: Any) -> torch.Tensor:
    from PIL import Image

    # Where all patches are alike, a bias changes nothing.
    pixels = np.random.default_rng(0).integers(0, 255, (84, 112, 3), np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    inputs = processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])  # with one grid, and with pages of any size
def test_the_folder_gives_the_answers_of_the_trained_model(family: str, tmp_path: Path) -> None:
    model, processor = build_host(family)
    inject_sfa(model, strong_config())
    lora = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, model)  # pyright: ignore[reportArgumentType]
    model.eval()
    expected = _answer(model, processor)
    done = export_for_engine(model, tmp_path / "served", processor=processor)
    assert torch.equal(_answer(model, processor), expected)  # the model stays as it is
    assert '--additional-config \'{"sfa": "' in str(done)
    again: Any = AutoModelForImageTextToText.from_pretrained(done.folder, dtype=torch.float32).eval()
    assert not [name for name in again.state_dict() if "sfa_" in name or "lora_" in name]
    load_sfa(again, done.adapter)
    out = _answer(again, AutoProcessor.from_pretrained(done.folder))
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    eject_sfa(again)
    assert (_answer(again, processor) - expected).abs().max() > 1e-4
    assert len(read_adapter(done.folder, done.folder).layers) == done.layers == 3


def test_what_engines_do_not_have_is_refused(tmp_path: Path) -> None:
    model, _ = build_host("internvl")
    with pytest.raises(InjectionError, match="0 active SFA adapters"):
        export_for_engine(model, tmp_path / "none")
    inject_sfa(model)
    inject_fastv(model, FastVConfig(ratio=0.5))
    with pytest.raises(RecipeError, match="fastv changes which tokens the model sees"):
        export_for_engine(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
