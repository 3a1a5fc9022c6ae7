"""The terms of SCR as functions: values and gradients against dense attention, targets, changes of pages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from sfa_adapters import observe
from sfa_adapters.attention_call import HIDDEN, AttentionCall
from sfa_adapters.errors import DataError, ObservationError
from sfa_adapters.scr import SCRConfig
from sfa_adapters.scr.augment import change, change_pixels, shift, to_pages
from sfa_adapters.scr.losses import band_penalty, grounding_rows, jeffreys, narrowed, row_entropies, sample_mean
from sfa_adapters.scr.targets import (
    answer_boxes,
    answer_queries,
    boxes_to_tokens,
    choose_rows,
    image_tokens,
    packed_evidence,
)
from tests.support.compare import assert_close
from tests.support.hosts import HOSTS

SHAPES = ["plain", "causal", "bool mask", "float mask", "grouped", "scores"]
every_shape = pytest.mark.parametrize("shape", SHAPES)
BAND = (0.5, 0.6)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made_call(shape: str, tensors: list[Tensor]) -> AttentionCall:
    """A computation of 2 samples, 4 heads, 6 tokens, from leaves that can be differentiated."""
    visible = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    visible[1, ..., 0] = False  # a padded token: row 0 of sample 1 sees nothing
    if shape == "scores":
        return AttentionCall("layer", scores=tensors[0].masked_fill(~visible, torch.finfo(torch.float64).min))
    call = AttentionCall("layer", query=tensors[0], key=tensors[1], scale=0.7)
    if shape == "causal":
        return replace(call, is_causal=True)
    if shape == "bool mask":
        return replace(call, mask=visible)
    if shape == "float mask":  # as a learned bias, shared by the samples
        return replace(call, mask=tensors[2])
    return call


def leaves(shape: str) -> list[Tensor]:
    if shape == "scores":
        return [random(2, 4, 6, 6).requires_grad_()]
    keys = 2 if shape == "grouped" else 4
    made = [random(2, 4, 6, 3), random(2, keys, 6, 3, seed=1)]
    made += [random(1, 4, 6, 6, seed=2)] if shape == "float mask" else []
    return [tensor.requires_grad_() for tensor in made]


def dense(call: AttentionCall) -> Tensor:
    """All logits, the plain way, `[B, H, Q, K]`."""
    if call.scores is not None:
        return call.scores
    assert call.query is not None
    assert call.key is not None
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    logits = call.query @ key.transpose(-1, -2) * call.scale
    if call.is_causal:
        logits = logits.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -1e300) if call.mask.dtype == torch.bool else logits + call.mask
    return logits


ROWS = torch.tensor([[1, 4, 5], [5, 2, 3]])
KEYS = torch.tensor([[0, 1, 2], [1, 2, 0]])
PRESENT = torch.tensor([[True, True, True], [True, True, False]])
EVIDENCE = torch.tensor([[0.0, 2.0, 1.0], [0.5, 0.0, 0.0]])[:, None].expand(2, 3, 3)


def dense_grounding(attention: Tensor, kind: str) -> Tensor:
    """The same from whole attention maps `[B, H, Q, K]`, in loops, `[B, R]`."""
    losses = []
    for sample in range(2):
        for row in ROWS[sample]:
            keys = KEYS[sample][PRESENT[sample]]
            on_image = attention[sample, :, row, keys]
            on_image = (on_image / on_image.sum(-1, keepdim=True)).mean(0)
            target = EVIDENCE[sample, 0][PRESENT[sample]].double()
            target = target * (on_image > 0)
            target = target / target.sum()
            there = target > 0
            divergence = (target[there] * (target[there] / on_image[there]).log()).sum()
            losses.append(divergence if kind == "kl" else -on_image[there].sum().log())
    return torch.stack(losses).view(2, 3)


# -- values and gradients against dense attention ---------------------------------------------------------------------


@every_shape
def test_entropies_and_their_gradients_are_those_of_dense_attention(shape: str) -> None:
    inputs = leaves(shape)

    def ours(*tensors: Tensor) -> Tensor:
        # One row at a time: more blocks than one.
        return row_entropies(made_call(shape, list(tensors)), ROWS, block_bytes=1)

    call = made_call(shape, inputs)
    attention = dense(call).softmax(-1)
    visible = (attention > 0).sum(-1).clamp(min=2)
    entropy = torch.special.entr(attention).sum(-1) / visible.double().log()
    assert_close(ours(*inputs), entropy.transpose(1, 2)[torch.arange(2)[:, None], ROWS].transpose(1, 2), 1e-12)
    assert gradcheck(ours, inputs, fast_mode=True)


@every_shape
@pytest.mark.parametrize("kind", ["kl", "mass"])
def test_grounding_and_its_gradients_are_those_of_dense_attention(shape: str, kind: Any) -> None:
    inputs = leaves(shape)

    def ours(*tensors: Tensor) -> Tensor:
        call = made_call(shape, list(tensors))
        value, _, usable = grounding_rows(call, ROWS, KEYS, PRESENT, EVIDENCE, kind, block_bytes=1)
        assert usable.all()
        return value

    assert_close(ours(*inputs), dense_grounding(dense(made_call(shape, inputs)).softmax(-1), kind), 1e-12)
    assert gradcheck(ours, inputs, fast_mode=True)


def parameter_gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert grads
    return grads


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert max(value.abs().max().item() for value in second.values()) > 1e-4, "the comparison says nothing"
    for name in first:
        # transformers' eager attention takes its softmax in fp32 whatever the model is in.
        assert_close(first[name], second[name], 2e-6, name)


def watched(model: nn.Module, modules: str, inputs: dict[str, Any]) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with observe(model, calls.append, modules=modules):
        model(**inputs)
    return calls


def test_entropy_moves_a_real_tower_as_dense_eager_attention_does() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = SiglipVisionConfig(**options, num_attention_heads=2, image_size=32, patch_size=8, vision_use_head=False)
    tower = SiglipVisionModel(config).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    images = random(2, 3, 32, 32)
    rows = torch.tensor([[0, 7, 15], [3, 4, 9]])

    calls = watched(tower, "vision", {"pixel_values": images})
    torch.stack([band_penalty(row_entropies(c, rows), BAND).mean() for c in calls]).mean().backward()
    streamed = parameter_gradients(tower)
    tower.set_attn_implementation("eager")
    maps = tower(pixel_values=images, output_attentions=True).attentions
    chosen = [a.transpose(1, 2)[torch.arange(2)[:, None], rows] for a in maps]
    levels = [torch.special.entr(a).sum(-1) / math.log(16) for a in chosen]
    torch.stack([band_penalty(level, BAND).mean() for level in levels]).mean().backward()
    assert_same(streamed, parameter_gradients(tower))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_grounding_moves_a_real_llama_as_dense_eager_attention_does(side: str, implementation: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
    model = LlamaModel(config).double()
    model.set_attn_implementation(implementation)
    seen = torch.ones(2, 8, dtype=torch.long)
    seen[1, :2] = 0
    seen = seen if side == "left" else seen.flip(1)
    hidden = ~(torch.ones(8, 8, dtype=torch.bool).tril() & seen.bool()[:, None, None])
    # Minus infinity in fp32, for the same reason, would make NaN of rows that are padding.
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float32).min)
    inputs = {"input_ids": torch.arange(16).view(2, 8), "attention_mask": mask}
    rows, keys = torch.tensor([[4, 5, 6], [4, 5, 4]]), torch.tensor([[1, 2, 3], [2, 3, 4]])
    present, evidence = torch.ones(2, 3, dtype=torch.bool), EVIDENCE.double()

    calls = watched(model, "language", {**inputs, "use_cache": False})
    values = [grounding_rows(c, rows, keys, present, evidence)[0] for c in calls]
    torch.stack(values).mean().backward()
    streamed = parameter_gradients(model)
    model.set_attn_implementation("eager")
    reference = []
    for attention in model(**inputs, output_attentions=True, use_cache=False).attentions:
        on_image = attention.transpose(1, 2)[torch.arange(2)[:, None], rows]  # [B, R, H, K]
        on_image = on_image.gather(-1, keys[:, None, None].expand(2, 3, 4, 3))
        on_image = (on_image / on_image.sum(-1, keepdim=True)).mean(2)
        target = evidence / evidence.sum(-1, keepdim=True)
        reference.append((torch.xlogy(target, target) - target * on_image.log()).sum(-1))
    torch.stack(reference).mean().backward()
    assert_same(streamed, parameter_gradients(model))


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    call = AttentionCall("layer", query=random(1, 2, 64, 4).requires_grad_(), key=random(1, 2, 512, 4).requires_grad_())
    rows, keys = torch.arange(64)[None], torch.arange(512)[None]
    evidence, first, second = random(1, 64, 512).abs(), random(64, 512).requires_grad_(), random(64, 512, seed=1)
    given = {t.untyped_storage().data_ptr() for t in (evidence, first, second)}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = row_entropies(call, rows, block_bytes=2**14).mean()
        value = value + grounding_rows(call, rows, keys, keys >= 0, evidence, block_bytes=2**14)[0].mean()
        value = value + jeffreys(first, second, block_bytes=2**14).mean()
    value.backward()
    assert sum(kept) < 64 * 512 / 8


# -- rows that say nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "mass"])
def test_rows_without_visible_evidence_give_zero_and_no_gradient(kind: Any) -> None:
    inputs = leaves("bool mask")
    call = made_call("bool mask", inputs)
    rows = torch.tensor([[0, 5], [0, 1]])  # row 0 of sample 1 sees no token at all
    keys = torch.tensor([[2, 3], [0, 1]])  # row 0 of sample 0 sees no image token; nobody sees token 0 of sample 1
    evidence = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    value, mass, usable = grounding_rows(call, rows, keys, torch.ones(2, 2, dtype=torch.bool), evidence, kind)
    assert not usable.any()
    assert not value.any()
    assert not mass.any()
    value.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in inputs)


def test_attention_of_a_billionth_of_a_billionth_has_a_finite_logarithm() -> None:
    key = torch.tensor([[0.0], [100.0]])[None, None].requires_grad_()
    call = AttentionCall("layer", query=torch.tensor([[[[10.0]]]]), key=key)  # logits 0 and 1000
    keys, present = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    value, _, _ = grounding_rows(call, torch.zeros(1, 1, dtype=torch.long), keys, present, torch.tensor([[[1.0, 0.0]]]))
    assert value.item() == pytest.approx(1000)
    value.sum().backward()
    assert key.grad is not None
    assert key.grad.flatten().tolist() == pytest.approx([-10, 10])


def test_nan_logits_are_an_error_that_names_the_layer() -> None:
    call = AttentionCall("tower.layer3", query=torch.full((1, 1, 2, 2), float("nan")), key=torch.ones(1, 1, 2, 2))
    rows, present = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ObservationError, match="layer3"):
        row_entropies(call, rows)
    with pytest.raises(ObservationError, match="layer3"):
        grounding_rows(call, rows, rows, present, torch.ones(1, 1, 1))
    with pytest.raises(ObservationError, match="NaN"):
        jeffreys(torch.full((1, 3), float("nan")), torch.ones(1, 3))


def test_narrowed_keeps_the_bias_of_another_sample_out() -> None:
    call = AttentionCall("layer", query=random(2, 4, 6, 3), key=random(2, 4, 6, 3, seed=1), mask=random(2, 1, 6, 6))
    logits = narrowed(call, ROWS, KEYS, PRESENT).logits(slice(None))
    whole = call.logits(slice(None)).transpose(1, 2)[torch.arange(2)[:, None], ROWS]
    whole = whole.gather(-1, KEYS[:, None, None].expand(2, 3, 4, 3)).transpose(1, 2)
    assert_close(logits.masked_fill(~PRESENT[:, None, None], 0), whole.masked_fill(~PRESENT[:, None, None], 0), 1e-12)
    assert bool((logits[1, ..., 2] == HIDDEN).all())


# -- small maths ------------------------------------------------------------------------------------------------------

numbers = st.lists(st.floats(-20, 20), min_size=4, max_size=4)


@given(numbers, numbers)
@settings(deadline=None)
def test_jeffreys_is_half_of_both_divergences(first: list[float], second: list[float]) -> None:
    p, q = torch.tensor([first], dtype=torch.float64), torch.tensor([second], dtype=torch.float64)
    divergence = jeffreys(p, q)
    assert divergence.item() >= -1e-12
    assert_close(divergence, jeffreys(q, p), 1e-12)
    a, b = torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    kl = torch.distributions.kl_divergence
    assert_close(divergence, (kl(a, b) + kl(b, a)) / 2, 1e-9)
    assert jeffreys(p, p + 3).item() == pytest.approx(0, abs=1e-12)


def test_jeffreys_has_the_gradient_of_its_formula() -> None:
    inputs = [random(3, 5).requires_grad_(), random(3, 5, seed=1).requires_grad_()]
    assert gradcheck(lambda p, q: jeffreys(p, q, block_bytes=1), inputs, fast_mode=True)


@given(st.floats(0, 1))
def test_the_band_is_free_and_both_extremes_cost(value: float) -> None:
    penalty = band_penalty(torch.tensor(value, dtype=torch.float64), (0.25, 0.75)).item()
    assert penalty == pytest.approx(max(0.25 - value, value - 0.75, 0) ** 2)


def test_the_mean_counts_samples_not_rows() -> None:
    values = torch.tensor([[1.0, 3.0], [8.0, float("nan")], [float("nan"), 5.0]], requires_grad=True)
    used = torch.tensor([[True, True], [True, False], [False, False]])
    mean = sample_mean(values, used)
    assert mean.item() == 5
    mean.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.25, 0.25], [0.5, 0], [0, 0]]


# -- targets ----------------------------------------------------------------------------------------------------------


def test_boxes_become_shares_of_tokens() -> None:
    # A page of 40 x 80 px (height, width) in 2 x 4 tokens of 20 px.
    shares = boxes_to_tokens([(20, 0, 50, 20), (0, 30, 20, 40)], (40, 80), (2, 4))
    assert shares.tolist() == [0, 1, 0.5, 0, 0.5, 0, 0, 0]
    assert boxes_to_tokens([], (40, 80), (2, 4)).tolist() == [0] * 8
    assert boxes_to_tokens([(-10, -10, 10, 20)], (40, 80), (2, 4))[0] == 0.5  # outside the page
    filled = torch.tensor([[0.0, 0, 20, 20], [float("nan")] * 4])
    assert boxes_to_tokens(filled, (40, 80), (2, 4)).sum() == 1
    assert boxes_to_tokens([(0, 0, 20, 20)] * 2, (40, 80), (2, 4)).max() == 1


@given(st.floats(0, 50), st.floats(0, 30), st.floats(0, 50), st.floats(0, 30), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None)
def test_a_box_keeps_its_area(x: float, y: float, w: float, h: float, rows: int, columns: int) -> None:
    covered = boxes_to_tokens([(x, y, x + w, y + h)], (60, 100), (rows, columns))
    assert covered.sum().item() * 60 * 100 / (rows * columns) == pytest.approx(w * h, abs=1e-2)
    assert 0 <= covered.min() <= covered.max() <= 1


@pytest.mark.parametrize(
    ("boxes", "page", "message"),
    [
        ([(5, 0, 1, 2)], (10, 10), r"boxes\[0\]=\[5.0, 0.0, 1.0, 2.0\]"),
        ([(0, 0, float("nan"), 2)], (10, 10), r"boxes\[0\]"),
        ([(0, 0, 1)], (10, 10), r"\(1, 3\)"),
        ([(0, 0, 1, 1)], (0, 10), r"page=\(0, 10\)"),
    ],
)
def test_boxes_that_are_none_are_named(boxes: Any, page: tuple[int, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        boxes_to_tokens(boxes, page, (2, 2))


def test_answers_find_their_boxes() -> None:
    texts, boxes = ["2019", "1,234", "Ada", "12%"], [(float(i), 0.0, 1.0 + i, 1.0) for i in range(4)]
    assert answer_boxes("1234", texts, boxes) == [boxes[1]]
    assert answer_boxes("12", texts, boxes) == [boxes[3]]
    assert answer_boxes("ada", texts, boxes) == [boxes[2]]
    assert answer_boxes("7", texts, boxes) == []


def test_the_query_of_an_answer_token_is_the_one_before_it() -> None:
    labels = torch.tensor([[-100, -100, 7, 8, -100, 9], [-100] * 6])
    assert answer_queries(labels).nonzero().tolist() == [[0, 1], [0, 2], [0, 4]]


def test_packed_questions_get_their_own_boxes() -> None:
    labels = torch.tensor([[-100, 7, 8, -100, 9, 9], [-100, -100, 7, -100, -100, -100]])
    boxes = [[[(0, 0, 10, 10)], [(10, 10, 20, 20)]], [[]]]
    shares = packed_evidence(labels, boxes, (20, 20), (2, 2))
    assert shares[0].argmax(-1).tolist() == [0, 0, 0, 0, 3, 3]
    assert shares[0].sum(-1).tolist() == [0, 1, 1, 0, 1, 1]
    assert not shares[1].any()
    with pytest.raises(DataError, match="Sample 0 has 2 answers, but boxes for 1 questions"):
        packed_evidence(labels, [[[]], [[]]], (20, 20), (2, 2))


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 9))
def test_rows_are_chosen_among_candidates(flags: list[bool], most: int) -> None:
    candidates = torch.tensor([flags, [False] * len(flags)])
    rows, used = choose_rows(candidates, most, torch.Generator().manual_seed(0))
    assert rows.shape[1] == min(sum(flags), most)
    assert used[0].all()
    assert not used[1].any()
    assert rows[0].unique().tolist() == rows[0].tolist()
    assert all(flags[row] for row in rows[0])


def test_image_tokens_of_pages_and_tiles() -> None:
    image = 9
    ids = torch.tensor([[1, 9, 9, 9, 9, 9, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    tokens = image_tokens(ids, image)
    assert tokens.places[0].tolist() == [1, 2, 3, 4, 5]
    assert tokens.counts.tolist() == [5, 0]
    newline = tokens.of_page(4, 0, base_first=True)
    assert newline.places[0].tolist() == [1, 2, 3, 4]
    assert newline.present.tolist() == [[True] * 4, [False] * 4]
    kept_cls = tokens.of_page(4, 1, base_first=False)
    assert kept_cls.places[0].tolist() == [2, 3, 4, 5]
    with pytest.raises(DataError, match="5 image tokens; a page has 4"):
        tokens.of_page(4, 0, base_first=False)
    tiles = image_tokens(torch.full((1, 8), image), image).of_page(4, 0, base_first=False)
    assert tiles.places.tolist() == [[4, 5, 6, 7]]  # InternVL puts the whole page behind its tiles
    with pytest.raises(DataError, match="in pieces"):
        image_tokens(torch.tensor([[9, 9, 1, 9, 9]]), image).of_page(2, 0, base_first=False)


def test_tokens_of_internvl_lie_row_after_row() -> None:
    model: Any = next(host for host in HOSTS if host.name == "internvl").build()
    assert isinstance(model, InternVLForConditionalGeneration)
    patch = torch.arange(16.0).view(1, 4, 4, 1)  # 4 x 4 patches, numbered row after row
    tokens = model.model.pixel_shuffle(patch, 0.5).flatten(1, 2)[0]
    assert [sorted(token.tolist()) for token in tokens] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


# -- augmentations ----------------------------------------------------------------------------------------------------


def page(side: int = 24) -> Tensor:
    """White paper with a dark block."""
    image = torch.ones(2, 3, side, side)
    image[..., 8:14, 6:12] = 0.1
    return image


def test_shifts_move_and_fill() -> None:
    image = page()
    image[..., 0, :] = 0.5
    moved = shift(image, 2, -1)
    assert torch.equal(moved[..., 10:16, 5:11], image[..., 8:14, 6:12])
    assert bool((moved[..., :2, :] == 0.5).all())
    assert bool((shift(image, 2, -1, "white")[..., :2, :] == 1).all())


@pytest.mark.parametrize("name", ["shift", "brightness", "blur", "jpeg"])
def test_every_change_is_small_and_repeats_with_its_seed(name: Any) -> None:
    config = SCRConfig(augmentations=[name])
    seen = []
    for seed in range(8):
        changed = change(page(), config, torch.Generator().manual_seed(seed))
        assert changed.shape == page().shape
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert torch.equal(changed, change(page(), config, torch.Generator().manual_seed(seed)))
        assert not torch.equal(changed, page())
        # The block is still where it was, up to the shift, and still dark.
        dark = (changed[0, 0] < 0.5).nonzero().float().mean(0)
        assert (dark - torch.tensor([10.5, 8.5])).abs().max() <= config.max_shift
        assert abs(int((changed[0, 0] < 0.5).sum()) - 36) <= 8
        seen.append(changed)
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_normalised_tiles_come_back_normalised() -> None:
    pixels = ((page()[:, None].expand(2, 3, 3, 24, 24)) - 0.5) / 0.5
    config = SCRConfig(augmentations=["brightness"])
    changed = change_pixels(pixels.bfloat16(), ((0.5,) * 3, (0.5,) * 3), config, torch.Generator().manual_seed(1))
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.bfloat16
    ratio = (changed.float() * 0.5 + 0.5)[..., 10, 8] / 0.1
    assert 0.85 < ratio.min() <= ratio.max() < 1.15


def test_images_of_other_statistics_are_refused() -> None:
    with pytest.raises(DataError, match="0 to 1"):
        to_pages(torch.full((1, 3, 4, 4), -1.0), ((0.0,) * 3, (1.0,) * 3))
    with pytest.raises(DataError, match=r"\(16, 588\)"):
        to_pages(torch.zeros(16, 588), ((0.0,) * 3, (1.0,) * 3))


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("entropy", -0.1), ("grounding", float("nan")), ("stability", "1"), ("warmup_steps", -1), ("warmup_steps", 1.5),
        ("entropy_band", (0.7, 0.3)), ("entropy_band", (0, 2)), ("vision_layers", []), ("language_layers", [0.5]),
        ("grounding_kind", "focal"), ("max_rows", 0), ("scorer", "ocr"), ("dense_threshold", 1.0),
        ("image_mean", (0.5, 0.5)), ("image_std", (1, 0, 1)), ("augmentations", ["flip"]), ("augmentations", ()),
        ("max_shift", 0), ("fill", "black"), ("max_brightness", 0), ("max_blur", -1), ("jpeg_quality", (90, 20)),
        ("block_bytes", 0), ("seed", -1),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"{field}=") as caught:
        SCRConfig(**{field: value})
    assert repr(value) in str(caught.value)


def test_weights_warm_up_in_a_straight_line() -> None:
    config = SCRConfig(warmup_steps=4)
    assert [config.warmth(step) for step in (0, 1, 4, 100)] == [0.2, 0.4, 1, 1]
    assert SCRConfig().warmth(0) == 1
    assert SCRConfig(grounding=0).active == ("entropy", "stability")
