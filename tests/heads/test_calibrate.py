"""`calibrate_heads` against slow references."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads.layers import head_layers
from tests.support.head_scoring import BY_NAME, LLAVA, NAMES, assert_scores, calibrated, eager_s4, padded
from tests.support.hosts import IMAGE, logits_of


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_s4_is_variance_and_mean_of_text_to_image_attention(name: str, implementation: str) -> None:
    host = BY_NAME[name]
    model: Any = host.build()
    batches = [host.inputs(0), host.inputs(1)]
    model.set_attn_implementation(implementation)
    scores = calibrated(model, batches, gamma=0.4)
    assert scores.data["samples"] == 4
    assert_scores(scores, eager_s4(model, batches, 0.4))
    assert calibrated(model, batches, gamma=0.0).values != scores.values


@pytest.mark.parametrize("method", ["s4", "gate", "flap"])
def test_padding_and_the_size_of_batches_change_nothing(method: str) -> None:
    model = LLAVA.build()
    batch = LLAVA.inputs(0)
    alone = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(2)]
    whole = calibrated(model, [batch], method)
    for others in (alone, [padded(batch, 3)]):
        assert_scores(calibrated(model, others, method), [torch.tensor(v) for v in whole.values.values()], 1e-4)


def test_gate_is_the_slope_of_the_loss_by_finite_differences() -> None:
    model: Any = LLAVA.build().double()
    batch = LLAVA.inputs(0)
    batch["pixel_values"] = batch["pixel_values"].double()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    labels[:, :4] = -100
    scores = calibrated(model, [{**batch, "labels": labels}], "gate")

    def loss(output: Any, head: int, factor: float, row: int) -> float:
        def scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            states = args[0].clone()
            states[..., head * 8 : (head + 1) * 8] *= factor
            return (states,)

        handle = output.register_forward_pre_hook(scale)
        sample = {name: value[row : row + 1] for name, value in batch.items()}
        with torch.no_grad():
            logits = model(**sample).logits[0, :-1]
            loss_of_row = float(torch.nn.functional.cross_entropy(logits, labels[row, 1:]))
        handle.remove()
        return loss_of_row

    step = 1e-2  # wide: norms compute in fp32 even in a model of fp64
    expected = []
    for layer in head_layers(model).values():
        slopes = [
            [abs(loss(layer.output, h, 1 + step, r) - loss(layer.output, h, 1 - step, r)) / (2 * step) for r in (0, 1)]
            for h in range(4)
        ]
        expected.append(torch.tensor(slopes).mean(1))
    assert_scores(scores, expected, 2e-3)


def test_flap_is_the_standardised_fluctuation_of_the_channels() -> None:
    model = LLAVA.build()
    batches = [LLAVA.inputs(seed) for seed in range(3)]
    seen: dict[str, list[torch.Tensor]] = {}
    layers = head_layers(model)

    def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(name, []).append(args[0])

    for name, layer in layers.items():
        layer.output.register_forward_pre_hook(partial(keep, name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    expected = []
    for name, layer in layers.items():
        tokens = torch.cat([states.flatten(0, 1) for states in seen[name]]).double()
        weight: Any = layer.output.weight
        channels = tokens.var(0) * weight.detach().double().square().sum(0)
        expected.append(((channels - channels.mean()) / channels.std()).view(4, 8).mean(1))
    assert_scores(calibrated(model, batches, "flap"), expected)


def test_towers_have_scores_too() -> None:
    for name in ("llava", "qwen2_5_vl"):
        host = BY_NAME[name]
        scores = calibrated(host.build(), [host.inputs()], "flap", modules="vision")
        assert len(scores.values) == host.layers
        assert set(scores.num_heads.values()) == {4}
    with pytest.raises(RecipeError, match="a tower has no text"):
        calibrated(LLAVA.build(), [LLAVA.inputs()], modules="vision")


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


def test_the_model_is_left_as_it_was() -> None:
    model = LLAVA.build().train()
    logits_of(model, LLAVA.inputs())  # transformers leaves hooks of its own at the first forward
    hooks = hooks_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in ("s4", "gate", "flap", "random"):
        calibrated(model, [LLAVA.inputs()], method)
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("method", ["s4", "gate", "flap"])
def test_lora_and_sfa_that_say_nothing_yet_change_no_score(method: str) -> None:
    import peft

    expected = calibrated(LLAVA.build(), [LLAVA.inputs()], method)
    lora = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|o_proj)")
    adapted = inject_sfa(peft.get_peft_model(LLAVA.build(), lora), SFAConfig(init_std=0.0, terms=list(TERMS)))  # pyright: ignore[reportArgumentType]
    scores = calibrated(adapted, [LLAVA.inputs()], method)
    assert all(name.startswith("base_model.model.") for name in scores.values)
    assert scores.num_kv_heads == {f"base_model.model.{name}": 2 for name in expected.values}
    assert_scores(scores, [torch.tensor(v) for v in expected.values.values()], 1e-4)


def test_random_is_reproducible() -> None:
    model = LLAVA.build()
    one, same, other = (calibrated(model, method="random", seed=seed).values for seed in (1, 1, 2))
    assert one == same != other


def test_samples_without_image_or_text_are_skipped_and_counted() -> None:
    model = LLAVA.build()
    good = LLAVA.inputs(0)
    ids = torch.randint(3, 50, (1, 6))
    blind = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mute = {name: value[:, :18] if value.ndim == 2 else value for name, value in good.items()}
    scores = calibrated(model, [blind, good, mute])
    assert scores.data["skipped"] == {"no image tokens": 1, "no text behind the image": 2}
    assert scores.data["samples"] == 2
    assert scores.values == calibrated(model, [good]).values
    with pytest.raises(DataError, match="no image tokens"):
        calibrated(model, [blind])
    with pytest.raises(DataError, match="None of the 0 samples"):
        calibrated(model, [])
    with pytest.raises(DataError, match="input_ids"):
        calibrated(model, [{"pixel_values": good["pixel_values"]}])


@pytest.mark.parametrize("method", ["s4", "gate", "flap"])
def test_a_batch_without_room_is_tried_again_and_then_skipped(method: str) -> None:
    model = LLAVA.build()
    good, large = LLAVA.inputs(0), LLAVA.inputs(1)
    refused = 0

    def full(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal refused
        if kwargs["pixel_values"] is large["pixel_values"]:
            refused += 1
            raise torch.OutOfMemoryError("no room")

    expected = calibrated(model, [good], method).values
    handle = model.register_forward_pre_hook(full, with_kwargs=True)
    scores = calibrated(model, [large, good], method)
    handle.remove()
    assert refused == 2
    assert scores.values == expected
    assert list(scores.data["skipped"].values()) == [2]
    assert "no room" in next(iter(scores.data["skipped"]))


def test_bad_options_and_shared_weights_are_named() -> None:
    model: Any = LLAVA.build()
    for options, message in (
        ({"method": "best"}, "method='best'"),
        ({"gamma": -1}, "gamma=-1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"modules": "audio"}, "modules='audio'"),
    ):
        with pytest.raises(RecipeError, match=message):
            calibrated(model, [LLAVA.inputs()], **options)
    with pytest.raises(DataError, match="labels must be"):
        calibrated(model, [{**LLAVA.inputs(), "labels": torch.zeros(2, 3)}], "gate")
    layers = model.get_decoder().layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight
    with pytest.raises(RecipeError, match="share a weight"):
        calibrated(model, [LLAVA.inputs()])
    layers[1].self_attn = layers[0].self_attn
    with pytest.raises(RecipeError, match="share one module"):
        calibrated(model, [LLAVA.inputs()])
