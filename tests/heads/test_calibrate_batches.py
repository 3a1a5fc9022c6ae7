"""Head scores when prompts of a batch differ, when samples cannot be used, and when memory runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from sfa_adapters.errors import DataError, ObservationError, RecipeError
from sfa_adapters.heads.layers import head_layers, weights_digest
from sfa_adapters.heads.measures import S4Score
from sfa_adapters.reduction import FastVConfig, inject_fastv
from tests.support.head_scoring import BY_NAME, LLAVA, assert_scores, calibrated, eager_s4
from tests.support.hosts import IMAGE

METHODS = ("s4", "gate", "flap")
OTHER = torch.randint(3, 50, (12,), generator=torch.Generator().manual_seed(2)).tolist()


def prompt(*parts: int | list[int], width: int = 0) -> dict[str, Any]:
    """Text, and image tokens where a number says how many; padded on the left to `width`."""
    ids = [token for part in parts for token in ([IMAGE] * part if isinstance(part, int) else part)]
    pad = max(0, width - len(ids))
    return {
        "input_ids": torch.tensor([[0] * pad + ids]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(ids)]),
    }


def with_images(*prompts: dict[str, Any], images: int) -> dict[str, Any]:
    pixels = torch.randn(images, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    return {**{name: torch.cat([p[name] for p in prompts]) for name in prompts[0]}, "pixel_values": pixels}


def tensors(values: Any) -> list[torch.Tensor]:
    return [torch.tensor(scores) for scores in values.values()]


@pytest.mark.parametrize("method", METHODS)
def test_prompts_of_one_batch_have_text_and_image_in_different_places(method: str) -> None:
    model: Any = LLAVA.build()
    short, long = (OTHER[:1], 16, OTHER[1:3]), (OTHER[3:6], 16, OTHER[6:12])
    together = with_images(prompt(*short, width=25), prompt(*long), images=2)
    alone = [with_images(prompt(*parts), images=2) for parts in (short, long)]
    for number, one in enumerate(alone):
        one["pixel_values"] = together["pixel_values"][number : number + 1]
    scores = calibrated(model, [together], method)
    assert_scores(scores, tensors(calibrated(model, alone, method).values), 1e-4)
    if method == "s4":
        assert_scores(scores, eager_s4(model, [together], 0.4))


def test_s4_counts_the_image_tokens_that_a_query_sees() -> None:
    model: Any = LLAVA.build()
    batch = with_images(prompt(OTHER[:2], 16, OTHER[2:5], 16, OTHER[5:8]), images=2)
    assert_scores(calibrated(model, [batch]), eager_s4(model, [batch], 0.4))


@pytest.mark.parametrize("method", ["s4", "gate"])
def test_a_sample_that_cannot_be_used_says_nothing_to_its_neighbour(method: str) -> None:
    model = LLAVA.build()
    good = with_images(prompt(OTHER[:2], 16, OTHER[2:5]), images=1)
    mixed = with_images(prompt(OTHER[:2], 16, OTHER[2:5]), prompt(OTHER[:5], width=21), images=1)
    scores = calibrated(model, [mixed], method)
    assert (scores.data["samples"], scores.data["skipped"]) == (1, {"no image tokens": 1})
    assert_scores(scores, tensors(calibrated(model, [good], method).values), 1e-4)


def test_gate_predicts_the_text_behind_the_image_or_the_labels() -> None:
    model = LLAVA.build()
    batch = LLAVA.inputs()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    labels[:, :2] = -100
    labelled = calibrated(model, [{**batch, "labels": labels}], "gate")
    assert labelled.values == calibrated(model, [batch], "gate").values
    half = labels.clone()
    half[1] = -100
    half[1, 0] = 5  # nothing comes before it that could predict it
    scores = calibrated(model, [{**batch, "labels": half}], "gate")
    assert (scores.data["samples"], scores.data["skipped"]) == (1, {"no label": 1})


def test_what_a_tower_can_be_asked() -> None:
    scores = calibrated(LLAVA.build(), [LLAVA.inputs()], "gate", modules="vision")
    assert all(value > 0 for of_layer in scores.values.values() for value in of_layer)
    qwen = BY_NAME["qwen2_5_vl"]
    with pytest.raises(RecipeError, match="one row per prompt"):
        calibrated(qwen.build(), [qwen.inputs()], "gate", modules="vision")
    with pytest.raises(DataError, match="did not run: give prompts with images"):
        calibrated(LLAVA.build(), [prompt(OTHER)], "flap", modules="vision")


def test_what_attention_does_not_show_is_refused() -> None:
    model: Any = LLAVA.build()
    model.get_decoder().layers[0].self_attn.o_proj = Linear4bit(32, 32, bias=False).to("cpu")
    with pytest.raises(RecipeError, match="packed weights"):
        calibrated(model, [LLAVA.inputs()], "flap")
    with pytest.raises(ObservationError, match=r"has 22 tokens, but .* attends over 14"):  # half of the image is gone
        calibrated(inject_fastv(LLAVA.build(), FastVConfig(layer=1, ratio=0.5)), [LLAVA.inputs()])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_fits_at_the_second_try_counts_once(method: str) -> None:
    model = LLAVA.build()
    expected = calibrated(model, [LLAVA.inputs(0), LLAVA.inputs(1)], method)
    last = list(head_layers(model).values())[-1].output
    calls = 0

    def full_once(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the layers before it have been read by then
            raise torch.OutOfMemoryError("no room")

    handle = last.register_forward_pre_hook(full_once)
    scores = calibrated(model, [LLAVA.inputs(0), LLAVA.inputs(1)], method)
    handle.remove()
    assert calls == 3
    assert scores == expected


def test_the_second_try_reads_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def take(self: S4Score, batch: Any, block_bytes: int) -> None:
        tried.append(block_bytes)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(S4Score, "take", take)
    with pytest.raises(DataError, match=r"None of the 2 samples.*no room for it"):
        calibrated(LLAVA.build(), [LLAVA.inputs()])
    first, second = tried
    assert second < first / 10


def test_the_record_tells_prompts_and_weights_apart() -> None:
    model = LLAVA.build()
    one, same, other = (calibrated(model, [LLAVA.inputs(seed)], "flap") for seed in (0, 0, 1))
    assert one.data["prompts"] == same.data["prompts"] == other.data["prompts"]  # the text is the same
    assert calibrated(model, [prompt(OTHER)], "flap").data["prompts"] != one.data["prompts"]
    large = nn.Module()
    large.weight = nn.Parameter(torch.zeros(5120, 5121, dtype=torch.bfloat16))  # more entries than float32 can count
    before = weights_digest({"a": large})
    with torch.no_grad():
        large.weight[-1, -1] = 1.0
    assert weights_digest({"a": large}) != before
