"""SmolVLM, Gemma 3, Gemma 4 and LightOnOCR: limits of images, batches, evidence, and what images never reach."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.data.collator import Collator
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import LayoutError, RecipeError
from sfa_adapters.hosts.placement import check_covered, split_map
from sfa_adapters.hosts.prepare import prepare, set_trainable
from sfa_adapters.hosts.quantization import kept_modules
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.weights import count_parameters, weights_of
from sfa_adapters.observe import attention_modules
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.reduction.fastv.token_density import TowerImages, token_density
from sfa_adapters.scr import SCRConfig
from sfa_adapters.scr.augment import change_pixels
from sfa_adapters.scr.evidence import Evidence
from sfa_adapters.scr.targets import boxes_to_tokens, image_tokens
from sfa_adapters.scr.watch import Watch
from sfa_adapters.vlm.records import vlm_spec

FAMILIES = ("smolvlm", "gemma3", "gemma4", "lighton_ocr")
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def nano() -> dict[str, tuple[Any, Any]]:
    return {family: build_host(family) for family in FAMILIES}


def recipe(family: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"plan": "bf16", "dtype": "float32", "data": "charts", "prompt": "{question}"}
    return Recipe(
        name="t", model="m", family=family, **{**settings, "max_tiles": 4, "max_pixels": 140 * 140, **changes}
    )


def batch_of(nano: dict[str, tuple[Any, Any]], family: str, sizes: Sequence[tuple[int, int]], **changes: Any) -> Any:
    """A batch of pages of these sizes; the answer to each stands in its upper left quarter."""
    random = np.random.default_rng(0)
    examples = []
    for number, (height, width) in enumerate(sizes):
        box = (0.0, 0.0, width / 2, height / 2)
        row = Row(f"r{number}", None, "How many?", ("1",), boxes=(box,))
        examples.append({"row": row, "image": random.integers(0, 256, (height, width, 3), dtype=np.uint8)})
    return Collator(nano[family][1], vlm_spec(family), recipe(family, **changes))(examples)


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and "evidence" not in name}


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tiles", "pictures"), [(1, 1), (3, 1), (4, 5), (100, 5)])
def test_smolvlm_cuts_a_square_page_into_no_more_tiles(nano: Any, tiles: int, pictures: int) -> None:
    """100 is more than its processor is made for."""
    pixels = batch_of(nano, "smolvlm", [(140, 140)], max_tiles=tiles)["pixel_values"]
    assert pixels.shape[:2] == (1, pictures)


@pytest.mark.parametrize(("tiles", "pictures"), [(1, 1), (2, 3), (3, 4)])
def test_gemma_3_pans_and_scans_a_long_page(nano: Any, tiles: int, pictures: int) -> None:
    assert len(batch_of(nano, "gemma3", [(100, 390)], max_tiles=tiles)["pixel_values"]) == pictures


@pytest.mark.parametrize(("pixels", "tokens"), [(70 * 144, 70), (140 * 144 - 1, 70), (140 * 144, 140)])
def test_gemma_4_takes_the_largest_budget_that_fits(nano: Any, pixels: int, tokens: int) -> None:
    batch = batch_of(nano, "gemma4", [(200, 200)], max_pixels=pixels)
    assert batch["pixel_values"].shape[1] == tokens * 9


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma4", {"max_pixels": 1000}, "max_pixels=1000 must be at least 10080, 70 image tokens"),
        ("lighton_ocr", {"max_pixels": 500}, "max_pixels=500 must be at least 784"),
    ],
)
def test_a_limit_below_one_step_is_refused(nano: Any, family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        batch_of(nano, family, [(100, 100)], **changes)


LIGHTON = SimpleNamespace(patch_size={"height": 28, "width": 28}, size={"longest_edge": 280})


@given(st.integers(1, 900), st.integers(1, 900), st.integers(28 * 28, 300 * 300))
@settings(max_examples=60, deadline=None)
def test_a_page_of_lighton_ocr_has_no_more_pixels(height: int, width: int, pixels: int) -> None:
    from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

    images = vlm_spec("lighton_ocr").images
    assert images is not None
    page = images.page(np.zeros((height, width, 3), np.uint8), LIGHTON, pixels)
    down, across = get_resize_output_image_size(page.image.transpose(2, 0, 1), 280, 28)
    assert down * across <= pixels
    right, bottom = page.place((0, 0, width, height))[2:]
    assert (bottom, right) == pytest.approx(page.image.shape[:2])
    if max(height, width) <= 280 and -(-height // 28) * -(-width // 28) * 784 <= pixels:
        assert page.image.shape[:2] == (height, width)


# -- batches ----------------------------------------------------------------------------------------------------------


def test_pages_with_different_numbers_of_tiles_are_padded(nano: Any) -> None:
    """The tiles of zeros count for nothing: SmolVLM leaves them out."""
    batch = batch_of(nano, "smolvlm", [(60, 200), (150, 150)])
    assert batch["pixel_values"].shape[:2] == batch["pixel_attention_mask"].shape[:2] == (2, 5)
    assert not batch["pixel_values"][0, 3:].any()
    assert batch["pixel_attention_mask"][0, :3].all()
    assert nano["smolvlm"][0](**inputs_of(batch)).loss.isfinite()


def test_pages_of_different_sizes_share_a_canvas(nano: Any) -> None:
    batch = batch_of(nano, "lighton_ocr", [(60, 200), (130, 90)])
    assert batch["image_sizes"].tolist() == [[56, 196], [140, 112]] or batch["pixel_values"].shape[-2:] == (140, 224)
    assert nano["lighton_ocr"][0](**inputs_of(batch)).loss.isfinite()


@pytest.mark.parametrize("family", ["lighton_ocr", "gemma4"])
def test_evidence_lies_on_the_grid_of_each_page(nano: Any, family: str) -> None:
    batch = batch_of(nano, family, [(60, 200), (200, 60)], scr_grounding=0.3)
    ids = nano[family][0].config.image_token_id
    counts = (batch["input_ids"] == ids).sum(1).tolist()
    for mask, count, page in zip(batch["evidence_mask"], counts, ((60, 200), (200, 60)), strict=True):
        grids = [(r, count // r) for r in range(1, count + 1) if count % r == 0]
        wanted = [boxes_to_tokens([(0, 0, page[1] / 2, page[0] / 2)], page, grid) for grid in grids]
        match = [grid for grid, want in zip(grids, wanted, strict=True) if torch.allclose(mask[:count], want)]
        assert any((rows < columns) == (page[0] < page[1]) for rows, columns in match)
        assert not mask[count:].any()


@pytest.mark.parametrize(("family", "first"), [("smolvlm", False), ("gemma3", True)])
def test_the_whole_page_is_found_among_its_tiles(nano: Any, family: str, first: bool) -> None:
    """Before the crops of Gemma 3 and behind the tiles of SmolVLM, with text between them."""
    model = nano[family][0]
    batch = batch_of(nano, family, [(60, 200), (150, 150)], scr_grounding=0.3)
    inputs = inputs_of(batch)
    watch = Watch(model, SCRConfig(grounding=1.0, entropy=0.0))
    with torch.no_grad(), watch() as seen:
        model(**inputs)
    tokens, evidence = Evidence(boxes=batch["evidence_boxes"], page_sizes=batch["page_sizes"]).target(
        watch, seen, inputs
    )
    every = image_tokens(inputs["input_ids"], watch.image_token)
    side = round(tokens.places.shape[1] ** 0.5)
    for row, count in enumerate(every.counts.tolist()):
        start = 0 if first else count - side**2
        assert torch.equal(tokens.places[row], every.places[row, start : start + side**2])
        quarter = evidence[row].view(side, side)
        assert quarter[: side // 2, : side // 2].eq(1).all()
        assert quarter.sum() == (side // 2) ** 2
    whole = Evidence().target(watch, seen, inputs)[0]
    assert torch.equal(whole.places, tokens.places)


def test_padding_tiles_stay_zero_when_pages_are_changed() -> None:
    pixels = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    pixels[0, 1:] = 0
    config = SCRConfig(stability=1.0, augmentations=("brightness",))
    changed = change_pixels(pixels, HALF, config, torch.Generator().manual_seed(0))
    assert not changed[0, 1:].any()
    assert not torch.equal(changed[1], pixels[1])


def test_density_of_pages_on_a_canvas_is_that_of_each_page() -> None:
    """A page fills the upper left part of its canvas, and what lies beside it is no part of it."""
    random = torch.Generator().manual_seed(0)
    canvases = torch.rand(2, 3, 112, 168, generator=random)
    grids = ((1, 8, 12), (1, 4, 8))
    both = token_density(TowerImages(canvases, grids, merge=2, patch=14), [24, 8], 24, HALF)
    alone = token_density(TowerImages(canvases[1:, :, :56, :112], (grids[1],), merge=2, patch=14), [8], 8, HALF)
    assert torch.equal(both[1, :8], alone[0])
    assert not both[1, 8:].any()
    first = token_density(TowerImages(canvases[:1], grids[:1], merge=2, patch=14), [24], 24, HALF)
    assert torch.equal(both[0], first[0])


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_text_and_images_of_smolvlm_are_joined_in_one_precision(freeze_vision: bool) -> None:
    """A tower that trains is float32, and the frozen language model is not: the host itself would fail."""
    wanted = recipe("smolvlm", dtype="bfloat16", freeze_vision=freeze_vision)
    model, processor = build_host("smolvlm")
    narrow: Any = model
    host = prepare(narrow.to(torch.bfloat16), processor, wanted)
    seen: list[torch.dtype] = []
    host.model.model.text_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    batch = inputs_of(batch_of({"smolvlm": (model, processor)}, "smolvlm", [(140, 140)]))
    with host.autocast():
        host.model(**batch).loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert host.model.model.connector.modality_projection.proj.weight.grad.abs().sum() > 0


# -- what images never reach ------------------------------------------------------------------------------------------


def test_the_tower_for_audio_is_frozen_kept_whole_and_placed(nano: Any) -> None:
    model, spec = nano["gemma4"][0], vlm_spec("gemma4")
    places = spec.places(model)
    assert places.unused == ("model.audio_tower", "model.embed_audio")
    audio = [name for name, _ in model.named_parameters() if places.is_unused(name)]
    assert audio
    assert {places.part_of(name) for name in audio} == {"llm"}
    wanted = recipe("gemma4", freeze_llm=False)
    set_trainable(model, spec, wanted)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not trains & set(audio)
    assert any(places.part_of(name) == "llm" for name in trains)
    counts = count_parameters(wanted, model.config)
    weights = dict(model.named_parameters())
    assert counts.unused == sum(weights[name].numel() for name in audio)
    assert sum(w.trained for w in weights_of(wanted, counts)) == sum(weights[n].numel() for n in trains) + counts.sfa
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and places.is_unused(name)]
    assert linear
    assert set(linear) <= set(kept_modules(model, spec))
    check_covered(model, split_map(places, 0, 1))


def test_attention_of_the_tower_for_audio_is_that_of_neither(nano: Any) -> None:
    """It runs on sound alone, so waiting for it would fail; by its path it is there."""
    model = nano["gemma4"][0]
    both = attention_modules(model)
    assert [*attention_modules(model, "vision"), *attention_modules(model, "language")] == list(both)
    assert not any("audio" in name for name in both)
    assert attention_modules(model, "*audio*")


def test_a_gemma_4_without_audio_has_nothing_unused(nano: Any) -> None:
    config = nano["gemma4"][0].config.to_dict() | {"audio_config": None}
    model = type(nano["gemma4"][0])(type(nano["gemma4"][0].config)(**config))
    assert vlm_spec("gemma4").places(model).unused == ()


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "beside"), [("lighton_ocr", "image_sizes"), ("gemma4", "image_position_ids")])
def test_an_empty_list_of_images_is_an_error(nano: Any, family: str, beside: str) -> None:
    model = inject_sfa(copy.deepcopy(nano[family][0]))
    inputs = inputs_of(batch_of(nano, family, [(100, 100)]))
    none = inputs | {name: inputs[name][:0] for name in ("pixel_values", beside)}
    with pytest.raises(LayoutError, match="needs at least one image"):
        model(**none)


def test_frames_of_a_video_are_images_of_their_own(nano: Any) -> None:
    """SmolVLM sees each frame as one tile; the bias of a frame does not depend on its neighbours."""
    model = inject_sfa(copy.deepcopy(nano["smolvlm"][0]), SFAConfig(init="axial"))
    frames = torch.rand(1, 3, 3, 112, 112)
    with torch.no_grad():
        together = torch.cat(list(model.get_image_features(frames).pooler_output))
        alone = [torch.cat(list(model.get_image_features(frames[:, n : n + 1]).pooler_output)) for n in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
