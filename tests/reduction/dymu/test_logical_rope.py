"""DyMU with language models: kept tokens, position ids, caches, `generate`, and FastV after it."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfa_adapters.adat import PatchPolicy, inject_adat
from sfa_adapters.compat import cache_of_output
from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.hooks import features_of
from sfa_adapters.reduction.dymu.cache_record import KeptOfPrompt, choose_kept
from sfa_adapters.reduction.dymu.config import DyMUConfig
from sfa_adapters.reduction.dymu.host_tokens import HostTokens, ImageKeys
from sfa_adapters.reduction.dymu.inject import eject_dymu, inject_dymu
from sfa_adapters.reduction.dymu.logical_rope import latest_kept
from sfa_adapters.reduction.fastv.inject import FastVConfig, eject_fastv, inject_fastv
from sfa_adapters.reduction.kept_tokens import keep_positions, keep_states
from tests.support.compare import Snapshot, assert_close, passing
from tests.support.dymu import BY_NAME, GENERATE, NAMES, PAD, THRESHOLD, padded, single
from tests.support.hosts import IMAGE, logits_of

every_host = pytest.mark.parametrize("name", NAMES)
MERGE = DyMUConfig(thresholds=THRESHOLD)
DENSITY = FastVConfig(layer=1, ratio=0.5, selector="density")
NEW = 32


def language_of(model: Any) -> nn.Module:
    return model.model.language_model


def inputs_of_language_model(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What goes into the language model, and what DyMU left of the prompt."""
    seen: dict[str, Any] = {}
    language = language_of(model)
    handle = language.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    seen["kept"] = latest_kept(language)
    return seen


def assert_same_generation(one: Any, other: Any, row: int = 0, other_row: int | None = None) -> None:
    other_row = row if other_row is None else other_row
    count = len(one.logits)
    assert count == len(other.logits)
    assert torch.equal(one.sequences[row, -count:], other.sequences[other_row, -count:])
    for first, second in zip(one.logits, other.logits, strict=True):
        assert_close(first[row], second[other_row], 1e-4)


@every_host
def test_what_is_left_expands_to_the_full_sequence_and_keeps_its_position_ids(name: str) -> None:
    host = BY_NAME[name]
    model, inputs = host.build(), padded(host)
    inject_dymu(model, DyMUConfig(thresholds=THRESHOLD, language="off"))
    full = inputs_of_language_model(model, inputs)
    inject_dymu(eject_dymu(model), MERGE)
    short = inputs_of_language_model(model, inputs)
    kept: KeptOfPrompt = short["kept"]
    assert short["inputs_embeds"].shape[1] == kept.index.shape[1] < full["inputs_embeds"].shape[1]
    assert_close(keep_states(short["inputs_embeds"], kept.owner), full["inputs_embeds"])
    positions = full.get("position_ids")
    positions = torch.arange(full["inputs_embeds"].shape[1])[None] if positions is None else positions
    assert torch.equal(short["position_ids"], keep_positions(positions, kept.index, channels=False))
    assert torch.equal(short["attention_mask"], inputs["attention_mask"].gather(1, kept.index) * kept.live)
    assert (kept.index.diff(dim=1)[kept.live[:, 1:] & kept.live[:, :-1]] > 0).all()
    for row in range(2):  # all text is left, and of the image tokens as many as differ
        places, ids = kept.index[row][kept.live[row]], inputs["input_ids"][row]
        assert int((ids[places] != IMAGE).sum()) == int((ids != IMAGE).sum())
        image = full["inputs_embeds"][row][ids == IMAGE]
        distinct = ((image[:, None] - image).abs().amax(-1) > 1e-5).long().argmin(dim=1).unique()
        newline = getattr(model.model, "image_newline", None)  # newline tokens are equal, and stay
        newlines = 0 if newline is None else int((image == newline).all(-1).sum())
        assert int((ids[places] == IMAGE).sum()) == len(distinct) + max(newlines - 1, 0)


def test_renumbered_positions_would_change_the_output() -> None:
    host = BY_NAME["llava_onevision"]
    model = inject_dymu(host.build(), MERGE)
    kept_ids = logits_of(model, host.inputs())

    def renumber(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": torch.arange(kwargs["inputs_embeds"].shape[1])[None]}

    handle = language_of(model).register_forward_pre_hook(renumber, with_kwargs=True)
    renumbered = logits_of(model, host.inputs())
    handle.remove()
    assert (kept_ids - renumbered).abs().max() > 1e-2


@every_host
def test_a_padded_batch_generates_what_its_samples_generate_alone(name: str) -> None:
    host = BY_NAME[name]
    model: Any = inject_dymu(host.build(), MERGE)
    inputs = padded(host)
    batch = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **GENERATE)
    kept_slots = {layer.keys.shape[2] for layer in cache_of_output(batch).layers}
    assert len(kept_slots) == 1
    assert kept_slots.pop() < batch.sequences.shape[1] - 1
    for number in range(2):
        alone = model.generate(**single(inputs, number), max_new_tokens=NEW, min_new_tokens=NEW, **GENERATE)
        assert_same_generation(batch, alone, number, 0)


@every_host
@pytest.mark.parametrize("how", ["static", "eager", "no cache"])
def test_caches_and_kinds_of_attention_agree(name: str, how: str) -> None:
    host = BY_NAME[name]
    model: Any = inject_dymu(host.build(), MERGE)
    inputs = padded(host)
    count = 8 if how == "no cache" else NEW
    options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, **GENERATE}
    plain = model.generate(**inputs, **options)
    if how == "eager":
        model.set_attn_implementation({"text_config": "eager"})
    changed = {"static": {"cache_implementation": "static"}, "no cache": {"use_cache": False}}.get(how, {})
    generated = model.generate(**inputs, **options, **changed)
    for row in range(2):
        assert_same_generation(plain, generated, row)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "qwen2_5_vl"])
def test_beams_assistance_and_later_turns(name: str) -> None:
    host = BY_NAME[name]
    model: Any = inject_dymu(host.build(), MERGE)
    inputs = padded(host)
    options = {k: v for k, v in GENERATE.items() if k in ("do_sample", "suppress_tokens")}
    beams = [model.generate(**inputs, max_new_tokens=6, num_beams=3, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*beams)
    one = single(inputs, 0)
    greedy = model.generate(**one, max_new_tokens=12, **options)
    assert torch.equal(model.generate(**one, max_new_tokens=12, prompt_lookup_num_tokens=3, **options), greedy)
    first = model.generate(**one, max_new_tokens=4, min_new_tokens=4, **GENERATE)
    more = torch.cat((first.sequences, torch.tensor([[5, 6, 7, 8]])), 1)
    turn: dict[str, Any] = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    if name == "qwen2_5_vl":
        turn["mm_token_type_ids"] = (more == IMAGE).long()
    count: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, **GENERATE}
    wanted = model.generate(**{**one, **turn}, **count)
    cache = copy.deepcopy(cache_of_output(first))  # what it holds goes with it
    assert_same_generation(model.generate(**turn, **passing(model, cache), **count), wanted)


def test_several_images_in_a_prompt_and_none() -> None:
    host = BY_NAME["llava"]
    model = inject_dymu(host.build(), MERGE)
    inputs = host.inputs()
    ids = inputs["input_ids"]
    both = {
        "input_ids": torch.cat((ids[:1], ids[1:]), 1), "attention_mask": torch.ones(1, 2 * ids.shape[1]),
        "pixel_values": inputs["pixel_values"],
    }  # fmt: skip
    both["attention_mask"] = both["attention_mask"].long()
    seen = inputs_of_language_model(model, both)
    assert seen["inputs_embeds"].shape[1] == 2 * (6 + 8)
    text = {"input_ids": torch.randint(3, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    logits = logits_of(model, text)
    assert inputs_of_language_model(model, text)["kept"] is None
    assert torch.equal(logits, logits_of(eject_dymu(model), text))


def test_tiles_are_cut_and_resized_by_the_host_itself() -> None:
    """LLaVA-OneVision takes the padding off tiles, and resizes many of them: every token must find its tile."""
    host = BY_NAME["llava_onevision"]
    model: Any = host.build()
    model.config.image_grid_pinpoints = [[56, 56], [56, 112], [112, 112]]
    pixels = torch.randn(2, 5, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[50, 112], [100, 60]])
    inject_dymu(model, DyMUConfig(thresholds=THRESHOLD, language="off"))
    with torch.no_grad():
        features = model.model.get_image_features(pixels, sizes).pooler_output
    lengths = [len(part) for part in features]
    assert lengths[0] != lengths[1]
    total = max(lengths) + 4
    ids = torch.zeros(2, total, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, total - length - 4 :] = 5
        ids[row, total - length - 2 : total - 2] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels, "image_sizes": sizes}
    full = inputs_of_language_model(model, inputs)
    inject_dymu(eject_dymu(model), MERGE)
    short = inputs_of_language_model(model, inputs)
    kept: KeptOfPrompt = short["kept"]
    assert short["inputs_embeds"].shape[1] < total - 10
    assert_close(keep_states(short["inputs_embeds"], kept.owner), full["inputs_embeds"])
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **GENERATE)
    with torch.no_grad():
        assert_close(generated.logits[0], model(**inputs).logits[:, -1], 1e-4)


def test_where_the_representative_was_cut_away_the_first_of_the_others_stands_in() -> None:
    image = torch.tensor([[False, True, True, True, False]])
    keys = ImageKeys(torch.tensor([0, 1, 0]), torch.tensor([False, True, False]), 2)
    kept = choose_kept(image, keys)
    assert kept is not None
    assert kept.index.tolist() == [[0, 1, 2, 4]]
    assert kept.owner.tolist() == [[0, 1, 2, 1, 3]]
    keys = ImageKeys(torch.tensor([0, 1, 0]), torch.tensor([False, True, True]), 2)
    kept = choose_kept(image, keys)
    assert kept is not None
    assert kept.index.tolist() == [[0, 2, 3, 4]]
    with pytest.raises(LayoutError, match="hold 3 image tokens"):
        choose_kept(image, ImageKeys(torch.zeros(4, dtype=torch.long), torch.ones(4).bool(), 1))


def test_a_mask_of_ones_own_loses_rows_and_columns() -> None:
    """Masks that keep questions of one row apart, as in packed training."""
    host = BY_NAME["llava"]
    model = inject_dymu(host.build(), MERGE)
    inputs = host.inputs()
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(length, length).tril().bool()
    plain = logits_of(model, inputs)
    for mask in (causal, torch.zeros(length, length).masked_fill(~causal, torch.finfo(torch.float32).min)):
        logits = logits_of(model, {**inputs, "attention_mask": mask[None, None].expand(2, 1, -1, -1)})
        assert_close(logits, plain)
    apart = causal.clone()
    apart[-2:, -4:-2] = False
    changed = logits_of(model, {**inputs, "attention_mask": apart[None, None]})
    assert_close(changed[:, :-2], plain[:, :-2])
    assert (changed[:, -1] - plain[:, -1]).abs().max() > 1e-3


def test_adaptive_tokens_shorten_the_text_too() -> None:
    """A large token covers several patches, which come out equal."""
    host = BY_NAME["internvl"]
    model = host.build()
    policy = PatchPolicy(levels=((0.5, 14), (0.0, 56)), cell=56, scorer=lambda x: torch.zeros(len(x), 1, 1))
    inject_adat(model, policy)
    wanted = logits_of(model, host.inputs())
    inject_dymu(model, DyMUConfig(thresholds=1.0))
    seen = inputs_of_language_model(model, host.inputs())
    assert seen["inputs_embeds"].shape[1] == 6 + 1  # one token covers the page
    assert logits_of(model, host.inputs()).shape == wanted.shape


# -- the hybrid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune_at", ["layer", "input"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_fastv_prunes_what_dymu_left(name: str, prune_at: Any) -> None:
    host = BY_NAME[name]
    model: Any = host.build()
    inputs = padded(host)
    with torch.no_grad():
        model(**inputs)
    before = Snapshot(model)
    inject_dymu(model, MERGE)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, **GENERATE}
    merged = model.generate(**inputs, **options)
    inject_fastv(model, FastVConfig(layer=1, ratio=0.5, prune_at=prune_at))
    both = model.generate(**inputs, **options)
    slots = [layer.keys.shape[2] for layer in cache_of_output(both).layers]
    merged_slots = cache_of_output(merged).layers[0].keys.shape[2]
    assert slots[-1] < merged_slots
    assert slots[0] == (merged_slots if prune_at == "layer" else slots[-1])
    for number in range(2):
        assert_same_generation(both, model.generate(**single(inputs, number), **options), number, 0)
    eject_fastv(model)
    eject_dymu(model)
    before.assert_unchanged(model)


def test_the_wrong_order_of_the_hybrid_is_an_error() -> None:
    model = inject_fastv(BY_NAME["llava"].build(), FastVConfig(layer=1, ratio=0.5, prune_at="input"))
    before = Snapshot(model)
    with pytest.raises(InjectionError, match="inject_dymu first"):
        inject_dymu(model, MERGE)
    before.assert_unchanged(model)


@pytest.mark.parametrize("language", ["logical_rope", "vtu"])
@pytest.mark.parametrize("fastv_first", [True, False])
def test_density_beside_merged_image_tokens_is_refused_in_either_order(fastv_first: bool, language: Any) -> None:
    """Density is known for each patch; image tokens that were merged are no longer one for each of them."""
    model = BY_NAME["llava"].build()
    steps = [lambda: inject_fastv(model, DENSITY), lambda: inject_dymu(model, replace(MERGE, language=language))]
    first, second = steps if fastv_first else reversed(steps)
    first()
    before = Snapshot(model)
    with pytest.raises(InjectionError, match=r"selector='density' needs every image token.*Choose another selector"):
        second()
    before.assert_unchanged(model)
    assert list(features_of(model)) == ["fastv" if fastv_first else "dymu"]


@pytest.mark.parametrize("fastv_first", [True, False])
def test_density_works_beside_merging_in_the_tower_only(fastv_first: bool) -> None:
    model, inputs = BY_NAME["llava"].build(), BY_NAME["llava"].inputs()
    tower_only = replace(MERGE, language="off")
    if fastv_first:
        inject_dymu(inject_fastv(model, DENSITY), tower_only)
    else:
        inject_fastv(inject_dymu(model, tower_only), DENSITY)
    merged_only = logits_of(inject_dymu(BY_NAME["llava"].build(), tower_only), inputs)
    assert (logits_of(model, inputs) - merged_only).abs().max() > 1e-4  # FastV dropped tokens


def test_padding_is_the_one_that_tests_assume() -> None:
    mask: Tensor = padded(BY_NAME["llava"])["attention_mask"]
    assert (mask == 0).sum(-1).tolist() == [0, PAD]


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_prefix_tokens_are_merged_with_nothing(strategy: str) -> None:
    core: Any = SimpleNamespace(config=SimpleNamespace(vision_feature_select_strategy=strategy))
    host = HostTokens(core, nn.Identity(), nn.Identity(), "all", 1, (-1,))
    merged = torch.tensor([[0, 0, 1], [2, 3, 3]])  # two pictures of three tokens
    keys = host._with_prefix(ImageKeys(merged, torch.tensor([[True, False, True]] * 2), 4), 2)
    kept = 2 if strategy == "full" else 1  # "default" drops the first token
    assert keys.key.shape == (2, kept + 3)
    assert torch.equal(keys.key[:, kept:], merged)
    prefix = keys.key[:, :kept].flatten().tolist()
    assert len(set(prefix)) == len(prefix)
    assert not set(prefix) & set(merged.flatten().tolist())
    assert max(prefix) < keys.count
    assert bool(keys.is_represented[:, :kept].all())
