"""`prune_receipt`: what was removed, and what that saves in time and bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads import PruneReceipt, prune_receipt, take_probe
from sfa_adapters.heads import speed as speed_module
from sfa_adapters.heads.expected import decode_bytes, flops_of
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.snapshot import unpruned
from sfa_adapters.heads.speed import LEAST_GAIN, Speed, measure_speed
from sfa_adapters.observe import attention_modules
from sfa_adapters.statistics import Interval
from tests.support.hosts import logits_of
from tests.support.pruning import (
    BY_NAME,
    FIRST,
    SECOND,
    host,
    language_model,
    plan_for,
    size,
    text_inputs,
    text_plan,
    tower_plan,
)

PLAIN = text_inputs(padded=False)


def test_the_receipt_tells_what_went() -> None:
    model = language_model(kv=2)
    plan, inputs = text_plan(model, 2), text_inputs()
    before = logits_of(model, inputs)
    count = sum(p.numel() for p in model.parameters())
    probe = take_probe(model, inputs)
    prune_heads(model, plan, "absorb")
    receipt = prune_receipt(probe, model, rounds=0)
    assert receipt.parameters == (count, sum(p.numel() for p in model.parameters()))
    assert receipt.heads == {FIRST: (4, 2), SECOND: (4, 2)}
    assert receipt.kv_heads == {FIRST: (2, 2), SECOND: (2, 1)}
    assert receipt.cache_channels == (2 * 8 * 4, 2 * 8 * 3)
    change = (logits_of(model, inputs) - before).abs()
    assert receipt.largest_change == pytest.approx(float(change.max()))
    assert receipt.mean_change == pytest.approx(float(change.mean()))
    assert receipt.speed is None
    text = str(receipt)
    assert "4 of 8 gone" in text
    assert "key/value 2 -> 1" in text
    assert "absorb" in text


def test_modules_that_lost_the_same_share_a_line() -> None:
    paths = {f"layers.{i}": (32, 22 if i else 32) for i in range(32)}
    lines = str(PruneReceipt((100, 90), paths, paths, (64, 44), 0.5, 0.1, "none")).splitlines()
    assert lines[-2:] == ["  layers.0  32 -> 32", "  layers.1 and 30 more  32 -> 22"]
    assert max(map(len, lines)) <= 80


def test_a_receipt_for_nothing_is_an_error() -> None:
    model = language_model()
    probe = take_probe(model, text_inputs())
    with pytest.raises(InjectionError, match="lost no heads"):
        prune_receipt(probe, model)
    late = take_probe(prune_heads(model, text_plan(model, 4)), text_inputs())
    with pytest.raises(InjectionError, match="Nothing happened"):
        prune_receipt(late, model)


def test_heads_that_gave_nothing_are_reported_as_nothing() -> None:
    model = language_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
    probe = take_probe(model, text_inputs())
    prune_heads(model, plan_for(model, {FIRST: (1,)}))
    after = logits_of(model, text_inputs())
    if torch.equal(after, probe.output):
        with pytest.raises(InjectionError, match="Nothing happened"):
            prune_receipt(probe, model, rounds=0)
    else:
        assert prune_receipt(probe, model, rounds=0).largest_change < 1e-5


def test_the_receipt_of_a_host_counts_time_and_bytes() -> None:
    model, inputs = host("llava")
    language, vision = list(attention_modules(model, "language")), list(attention_modules(model, "vision"))
    plan = plan_for(model, {language[0]: (0, 2), language[1]: (0, 1), vision[0]: (1,)})  # layer 1 loses a group of two
    inputs = {**inputs, "labels": inputs["input_ids"]}
    probe, before = take_probe(model, inputs), size(model)
    prune_heads(model, plan).train()
    identities = {name: id(p) for name, p in model.named_parameters()}
    receipt = prune_receipt(probe, model, rounds=5, tokens=3)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert all(module.training for module in model.modules())

    speed = receipt.speed
    assert speed is not None
    assert speed.decode is not None
    assert speed.decode_ratio is not None
    assert speed.cache is not None
    assert speed.weights == (before, size(model))
    # Keys and values of 2 rows of 22 tokens; heads of 8 channels; 2 groups in 2 layers, of which one goes.
    assert speed.cache == (4 * 2 * 2 * 22 * 8 * 4, 4 * 2 * 2 * 22 * 8 * 3)
    assert speed.peak[0] >= speed.peak[1] > 0  # equal where no attention layer is what takes most at a time
    for pair, ratio in ((speed.prefill, speed.prefill_ratio), (speed.decode, speed.decode_ratio)):
        assert min(pair) > 0
        assert ratio.low <= ratio.value <= ratio.high
    # Of the language model 2 heads of q and o in each layer go, and one key/value head in the second one.
    q, step = 32 * 8 * 4, decode_bytes(model)
    gone = 2 * 4 * q + 2 * q
    assert speed.expected_decode == pytest.approx((step + gone + speed.cache[0]) / (step + speed.cache[1]))
    with unpruned(probe, model):
        flops = flops_of(model.eval(), inputs)
        assert decode_bytes(model) == step + gone
    assert speed.expected_prefill == pytest.approx(flops / flops_of(model, inputs))
    assert speed.expected_prefill > 1.03

    record = json.loads(receipt.to_json())
    assert record["heads"][vision[0]] == [4, 3]
    assert record["speed"]["prefill_ratio"]["low"] == speed.prefill_ratio.low
    assert record["speed"]["verdict"] == speed.verdict
    lines = str(receipt).splitlines()
    assert len(lines) <= 12
    for word in ("prefill", "decode", "memory", "verdict"):
        assert any(line.startswith(word) for line in lines), word


def test_heads_of_a_tower_make_prefill_cheaper_and_decoding_not() -> None:
    model, inputs = host("internvl")
    probe = take_probe(model, inputs)
    prune_heads(model, plan_for(model, dict.fromkeys(attention_modules(model, "vision"), (0, 1, 2))))
    speed = measure_speed(probe, model, 5, 2)
    assert speed.expected_prefill > 1.05
    assert speed.expected_decode == 1
    assert speed.cache is not None
    assert speed.cache[0] == speed.cache[1]


@pytest.mark.parametrize("name", ["clip", "timm_cls"])
def test_a_tower_alone_is_timed_on_a_forward(name: str) -> None:
    model, inputs = BY_NAME[name].fresh()
    given = {"x": inputs["pixel_values"]} if name == "timm_cls" else inputs
    probe = take_probe(model, given)
    prune_heads(model, tower_plan(model))
    receipt = prune_receipt(probe, model, rounds=5)
    speed = receipt.speed
    assert speed is not None
    assert (speed.tokens, speed.decode, speed.decode_ratio, speed.expected_decode, speed.cache) == (0, *[None] * 4)
    assert min(speed.prefill) > 0
    assert speed.expected_prefill > 1.05
    assert "\nforward " in str(receipt)
    assert "a forward" in speed.verdict
    assert json.loads(receipt.to_json())["speed"]["decode"] is None


def test_both_take_turns_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    probe = take_probe(model, PLAIN)
    prune_heads(model, text_plan(model, 4))
    turns: list[str] = []

    def clock(_: Any, prompt: Any, tokens: int) -> list[float]:
        original = model.get_submodule(FIRST).q_proj.out_features == 32
        turns.append("original" if original else "pruned")
        if len(turns) <= 2:
            return [1000.0] * tokens
        assert not any(module.training for module in model.modules())
        return [6.0 if original else 2.0, 0.4 if original else 0.5, 99.0, 0.4 if original else 0.5]

    monkeypatch.setattr(speed_module, "token_seconds", clock)
    model.train()
    speed = measure_speed(probe, model, 6, 4)
    assert turns == ["original", "pruned", *["pruned", "original", "original", "pruned"] * 3]
    assert speed.prefill == (6.0, 2.0)
    assert speed.prefill_ratio == Interval(*[pytest.approx(3.0)] * 3)  # pyright: ignore[reportArgumentType]
    assert speed.decode == (0.4, 0.5)  # the median of an answer, so that one slow token does not count
    assert speed.decode_ratio is not None
    assert speed.decode_ratio.value == pytest.approx(0.8)


def test_ratios_are_formed_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down from round to round slows both: the ratio stays, and its interval is narrow."""
    model = language_model()
    probe = take_probe(model, PLAIN)
    prune_heads(model, text_plan(model, 4))
    calls = [0]

    def clock(_: Any, prompt: Any, tokens: int) -> list[float]:
        number, calls[0] = calls[0] // 2, calls[0] + 1
        return [2.0**number * (1.5 if model.get_submodule(FIRST).q_proj.out_features == 32 else 1.0)] * tokens

    monkeypatch.setattr(speed_module, "token_seconds", clock)
    ratio = measure_speed(probe, model, 5, 2).prefill_ratio
    assert (ratio.low, ratio.high) == pytest.approx((1.5, 1.5))


def speed_of(prefill: tuple[float, float], decode: tuple[float, float], expected: tuple[float, float]) -> Speed:
    """From intervals (low, high) and expected ratios."""
    ratios = [Interval((low + high) / 2, low, high) for low, high in (prefill, decode)]
    return Speed(5, 16, (1.0, 1.0), ratios[0], expected[0], (9, 8), (9, 8), (0.1, 0.1), ratios[1], expected[1], (9, 8))


@pytest.mark.parametrize(
    ("prefill", "decode", "expected", "worth", "words"),
    [
        ((1.05, 1.15), (0.95, 1.2), (1.1, 1.1), True, "Worth it for speed: prefill 1.10x [1.05, 1.15] (expected 1.10x"),
        ((0.9, 1.1), (1.01, 1.09), (1.1, 1.1), True, "decoding 1.05x [1.01, 1.09] (expected 1.10x)."),
        ((0.9, 1.2), (1.0, 1.3), (1.5, 1.5), False, "on this device, nothing is faster"),
        ((1.2, 1.3), (1.2, 1.3), (1.01, 1.019), False, "arithmetic promises less than 2%"),
        ((1.2, 1.3), (1.2, 1.3), (1.01, LEAST_GAIN), True, "Worth it"),
    ],
)
def test_the_verdict(prefill: Any, decode: Any, expected: Any, worth: bool, words: str) -> None:
    speed = speed_of(prefill, decode, expected)
    assert speed.worth is worth
    assert words in speed.verdict
    assert speed.verdict.startswith("Worth it" if worth else "Not worth it")


@pytest.mark.parametrize(
    ("rounds", "tokens", "words"), [(4, 16, "rounds=4"), (-1, 16, "rounds=-1"), (5, 1, "tokens=1")]
)
def test_options_that_give_no_interval(rounds: int, tokens: int, words: str) -> None:
    model = language_model()
    probe = take_probe(model, PLAIN)
    prune_heads(model, text_plan(model, 4))
    with pytest.raises(RecipeError, match=words):
        prune_receipt(probe, model, rounds, tokens)


def test_inputs_that_cannot_be_answered() -> None:
    model = language_model()
    probe = take_probe(model, {**PLAIN, "cache_position": torch.arange(9), "shift_labels": None})
    prune_heads(model, text_plan(model, 4))
    with pytest.raises(RecipeError, match="rounds=0"):
        prune_receipt(probe, model)
    assert prune_receipt(probe, model, rounds=0).largest_change > 0
