"""`drop_blank_groups` of Qwen2.5-VL: merge groups are dropped whole, and all other tokens keep their positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sfa_adapters import inject_sfa
from sfa_adapters.adat import GroupPolicy, drop_blank_groups, inject_adat
from sfa_adapters.errors import InjectionError, PlanError
from tests.support.compare import assert_close, difference, strong_config

IMAGE, TEXT = 60, 64
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tiny_qwen() -> Any:
    torch.manual_seed(5)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": TEXT, "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        image_token_id=IMAGE, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def page(rows: int, columns: int, seed: int) -> Tensor:
    """White paper with dark marks on some of its 28 px groups, `[3, height, width]` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    marked = torch.rand(rows, columns, generator=generator) < 0.5
    marked[0, 0] = True
    noise = torch.rand(3, rows * 28, columns * 28, generator=generator)
    return torch.where(marked.repeat_interleave(28, 0).repeat_interleave(28, 1), noise, torch.ones(()))


def dark(images: Tensor) -> Tensor:
    """The share of a group that is not white."""
    return torch.nn.functional.avg_pool2d((images.mean(1) < 0.99).float()[:, None], 28)[:, 0]


EXACT = GroupPolicy(threshold=0.1, margin=0, scorer=dark)


def flat(image: Tensor) -> Tensor:
    """Patches as the processor lists them: groups row by row, four patches each, the frame twice."""
    image = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    rows = []
    for r in range(image.shape[1] // 28):
        for c in range(image.shape[2] // 28):
            for i in range(2):
                for j in range(2):
                    top, left = r * 28 + i * 14, c * 28 + j * 14
                    patch = image[:, top : top + 14, left : left + 14]
                    rows.append(patch[:, None].expand(-1, 2, -1, -1).flatten())
    return torch.stack(rows)


def batch_of(pages: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    rows = []
    for number, image in enumerate(pages):
        groups = image.shape[1] * image.shape[2] // 28**2
        rows.append([5, 6, 62, *[IMAGE] * groups, 63, *range(7, 12 + number)])
    longest = max(map(len, rows))
    blank = [[0] * (longest - len(row)) for row in rows]
    ids = torch.tensor([b + r if side == "left" else r + b for b, r in zip(blank, rows, strict=True)])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat([flat(image) for image in pages]),
        "image_grid_thw": torch.tensor([[1, p.shape[1] // 14, p.shape[2] // 14] for p in pages]),
    }


PAGES = [page(3, 5, 0), page(4, 2, 1)]


def last_logits(model: Any, batch: dict[str, Any]) -> Tensor:
    """The logits at the last real token of each row."""
    with torch.no_grad():
        logits = model(**batch).logits
    last = batch["attention_mask"].shape[1] - 1 - batch["attention_mask"].flip(1).argmax(1)
    return logits[torch.arange(len(last)), last]


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_changes_where_no_group_is_blank(side: str) -> None:
    model, batch = tiny_qwen(), batch_of(PAGES, side)
    all_kept = GroupPolicy(threshold=0.0, margin=9, scorer=dark)
    reduced = drop_blank_groups(model, batch, all_kept)
    assert torch.equal(reduced["input_ids"], batch["input_ids"])
    assert torch.equal(reduced["pixel_values"], batch["pixel_values"])
    assert_close(last_logits(model, reduced), last_logits(model, batch), 1e-5)


def test_the_tower_computes_what_it_would_with_the_dropped_groups_masked() -> None:
    """Slow and plain: the whole page, with dropped patches taken out of every attention by a mask."""
    model, batch = tiny_qwen(), batch_of(PAGES)
    reduced = drop_blank_groups(model, batch, EXACT)
    kept = torch.cat([(dark(p[None])[0] > 0.1).flatten() for p in PAGES])
    assert 0 < int(kept.sum()) < len(kept)
    tower = model.model.visual
    with torch.no_grad():
        short = torch.cat(list(model.model.get_image_features(**_tower_part(reduced)).pooler_output))
        order = _window_order(batch)
        hidden = kept[order].repeat_interleave(4)

        def hide(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "position_bias": _Hidden(hidden)}

        for block in tower.blocks:
            block.attn.register_forward_pre_hook(hide, with_kwargs=True)
        whole = torch.cat(list(model.model.get_image_features(**_tower_part(batch)).pooler_output))
    assert_close(short, whole[kept])


class _Hidden:
    """Serves each segment a row that hides its dropped patches."""

    def __init__(self, kept: Tensor) -> None:
        self.kept, self.start = kept, 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        mask = kwargs.pop("attn_mask")
        n = args[0].shape[-2]
        part = mask.kept[mask.start : mask.start + n]
        mask.start += n
        # A row without any key left would be NaN; nobody looks at the rows of dropped patches.
        row = torch.where(part, 0.0, float("-inf")) if bool(part.any()) else torch.zeros(n)
        return func(*args, attn_mask=row.expand(1, 1, n, n), **kwargs)

    def contiguous(self) -> _Hidden:
        return self


def _tower_part(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k == "pixel_values" or k.startswith("image_")}


def _window_order(batch: dict[str, Any]) -> Tensor:
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(batch["image_grid_thw"], 2, 56, 14)[0]


def test_positions_stay_and_renumbering_them_would_change_the_answer() -> None:
    model, batch = tiny_qwen(), batch_of(PAGES)
    reduced = drop_blank_groups(model, batch, EXACT)
    three, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )  # fmt: skip
    for row, image in enumerate(PAGES):
        kept = (dark(image[None])[0] > 0.1).flatten()
        here = batch["input_ids"][row] == IMAGE
        there = reduced["input_ids"][row] == IMAGE
        assert torch.equal(reduced["position_ids"][1:, row][:, there], three[:, row][:, here][:, kept])
        assert torch.equal(reduced["position_ids"][1:, row, -5:], three[:, row, -5:]), "the text keeps its places"
    moved = {**reduced, "position_ids": reduced["attention_mask"].cumsum(-1)[None].expand(4, -1, -1) - 1}
    moved["position_ids"] = moved["position_ids"].clamp(min=0)
    assert difference(last_logits(model, moved), last_logits(model, reduced)) > 1e-3


def test_generate_goes_on_from_the_kept_positions_and_batches_do_not_mix() -> None:
    model, batch = tiny_qwen(), batch_of(PAGES)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        together = model.generate(**drop_blank_groups(model, batch, EXACT, for_generate=True), **options)
        for row, image in enumerate(PAGES):
            alone = batch_of([image])
            if row == 1:  # its text is longer
                ids = batch["input_ids"][1][batch["attention_mask"][1].bool()]
                alone |= {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
                alone["mm_token_type_ids"] = (ids == IMAGE).int()[None]
            words = model.generate(**drop_blank_groups(model, alone, EXACT, for_generate=True), **options)[0]
            assert len(words) == 5
            assert words.tolist() == together[row].tolist()
            # Token by token without a cache, positions counted on by hand.
            single = drop_blank_groups(model, alone, EXACT)
            ids, places = single["input_ids"], single["position_ids"]
            for word in words.tolist():
                step = {**single, "input_ids": ids, "position_ids": places, "attention_mask": torch.ones_like(ids)}
                step["mm_token_type_ids"] = (ids == IMAGE).int()
                assert int(last_logits(model, step).argmax()) == word
                ids = torch.cat((ids, torch.tensor([[word]])), 1)
                places = torch.cat((places, places[..., -1:] + 1), -1)


def test_sfa_keeps_the_places_too() -> None:
    model, batch = tiny_qwen(), batch_of(PAGES)
    torch.manual_seed(3)
    inject_sfa(model, strong_config())
    all_kept = drop_blank_groups(model, batch, GroupPolicy(threshold=0.0, margin=9, scorer=dark))
    assert_close(last_logits(model, all_kept), last_logits(model, batch), 1e-5)
    reduced = drop_blank_groups(model, batch, EXACT)
    together = last_logits(model, reduced)
    assert torch.isfinite(together).all()
    first = drop_blank_groups(model, batch_of(PAGES[:1]), EXACT)
    assert_close(last_logits(model, first)[0], together[0])


def test_labels_are_shortened_with_the_text_and_train() -> None:
    model, batch = tiny_qwen(), batch_of(PAGES)
    labels = torch.where(batch["input_ids"] < 12, batch["input_ids"], -100).masked_fill(batch["input_ids"] == 0, -100)
    reduced = drop_blank_groups(model, {**batch, "labels": labels}, EXACT)
    assert torch.equal(reduced["labels"] >= 0, (reduced["input_ids"] < 12) & (reduced["attention_mask"] == 1))
    model(**reduced).loss.backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0


def test_a_blank_page_keeps_one_group_and_margins_keep_neighbours() -> None:
    model = tiny_qwen()
    blank = batch_of([torch.ones(3, 84, 84)])
    assert int((drop_blank_groups(model, blank, EXACT)["input_ids"] == IMAGE).sum()) == 1
    lone = torch.ones(3, 140, 140)
    lone[:, 56:84, 56:84] = 0
    kept = drop_blank_groups(model, batch_of([lone]), GroupPolicy(threshold=0.1, margin=1, scorer=dark))
    assert int((kept["input_ids"] == IMAGE).sum()) == 9


def test_bad_input_is_named() -> None:
    model, batch = tiny_qwen(), batch_of(PAGES)
    with pytest.raises(InjectionError, match="drop_blank_groups"):
        inject_adat(model)
    with pytest.raises(PlanError, match="mm_token_type_ids"):
        drop_blank_groups(model, {k: v for k, v in batch.items() if k != "mm_token_type_ids"})
    with pytest.raises(PlanError, match="videos"):
        drop_blank_groups(model, {**batch, "pixel_values_videos": torch.zeros(1)})
    with pytest.raises(PlanError, match="image tokens"):
        drop_blank_groups(
            model, {**batch, "input_ids": batch["input_ids"].where(batch["input_ids"] != IMAGE, 7)}, EXACT
        )
    with pytest.raises(PlanError, match="threshold"):
        GroupPolicy(threshold=2.0)
    with pytest.raises(PlanError, match="margin"):
        GroupPolicy(margin=-1)
