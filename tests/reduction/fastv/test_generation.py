"""FastV in generation: batches equal single prompts, for every host, cache and way of decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from sfa_adapters.compat import cache_of_output
from sfa_adapters.errors import PlanError
from sfa_adapters.reduction.dymu.config import DyMUConfig
from sfa_adapters.reduction.dymu.inject import inject_dymu
from sfa_adapters.reduction.fastv.inject import FastVConfig, inject_fastv
from sfa_adapters.vlm.parts import find_decoder
from tests.support.compare import assert_close, passing
from tests.support.fastv_prompts import DEEP, FAMILIES, Ask, Family, batched, prompt
from tests.support.hosts import IMAGE

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
both_places = pytest.mark.parametrize("prune_at", ["layer", "input"])
LLAVA = FAMILIES[0]
# One image; two of different sizes; text alone: samples of a batch keep 8, 16 and 0 tokens and are padded.
ASKS = (Ask((3, 5), seed=1), Ask((2, 3, 9), (2, 1), seed=2), Ask((6,), seed=3))
GREEDY: dict[str, Any] = {"do_sample": False, "suppress_tokens": list(range(IMAGE, IMAGE + 4))}


def lengths(cache: Any) -> list[int]:
    return [int(layer.get_seq_length()) for layer in cache.layers]


def generated(model: Any, inputs: dict[str, Any], count: int, **options: Any) -> tuple[Tensor, Tensor, list[int]]:
    """New tokens, the logits of every step, and how many tokens each layer holds."""
    settings = {**GREEDY, "max_new_tokens": count, "return_dict_in_generate": True, "output_logits": True, **options}
    out = model.generate(**inputs, **settings)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(out.logits, 1), lengths(cache_of_output(out))


@every_family
@both_places
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_padded_batch_is_its_prompts_one_at_a_time(
    family: Family, prune_at: Any, implementation: str, static: bool
) -> None:
    """The prompt and 32 decoded tokens."""
    model: Any = family.build()
    model.set_attn_implementation(implementation)
    inject_fastv(model, FastVConfig(layer=2, ratio=0.5, prune_at=prune_at))
    prompts = [prompt(family, ask) for ask in ASKS]
    options = {"cache_implementation": "static"} if static else {}
    together = generated(model, batched(prompts), 33, **options)
    for row in (0, 1):
        new, logits, cached = generated(model, prompts[row], 33, **options)
        assert torch.equal(new[0], together[0][row])
        assert_close(together[1][row], logits[0], 1e-4)
        whole = prompts[row]["input_ids"].shape[1] + 32
        less = whole - int((prompts[row]["input_ids"] == IMAGE).sum()) // 2
        assert cached == ([less] * 4 if prune_at == "input" else [whole, whole, less, less])


@every_family
@pytest.mark.parametrize("selector", ["random", "density", "importance+diversity"])
def test_other_selectors_in_a_padded_batch(family: Family, selector: Any) -> None:
    model = inject_fastv(family.build(), FastVConfig(layer=1, k=3, selector=selector, query="mean"))
    prompts = [prompt(family, ask) for ask in ASKS[:2]]
    together = generated(model, batched(prompts), 6)
    for row, inputs in enumerate(prompts):
        new, logits, _ = generated(model, inputs, 6)
        assert torch.equal(new[0], together[0][row])
        assert_close(together[1][row], logits[0], 1e-4)


@every_family
@both_places
@pytest.mark.parametrize("selector", ["attention", "random"])
def test_beam_search(family: Family, prune_at: Any, selector: Any) -> None:
    """Beams are reordered at every step; those of a padded batch are those of its prompts."""
    model: Any = inject_fastv(family.build(), FastVConfig(layer=2, prune_at=prune_at, selector=selector))
    prompts = [prompt(family, ask) for ask in ASKS[:2]]
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 2}
    together = model.generate(**batched(prompts), **options)[:, -8:]
    alone = torch.cat([model.generate(**inputs, **options)[:, -8:] for inputs in prompts])
    assert torch.equal(together, alone)
    assert not torch.equal(alone[0], alone[1])


class TextAssistant(LlamaForCausalLM):
    """A text model takes no images; the oldest supported transformers hands them to it, and this check refuses them."""

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        model_kwargs.pop("pixel_values", None)


@both_places
@pytest.mark.parametrize("query", ["last", "mean"])
def test_assisted_generation_is_greedy_generation(prune_at: Any, query: Any) -> None:
    """Candidates come behind the prompt in its first forward, and most of them are taken back."""
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2, prune_at=prune_at, query=query))
    inputs = prompt(LLAVA, ASKS[1])
    torch.manual_seed(1)
    assistant: Any = TextAssistant(LlamaConfig(**{**DEEP, "num_hidden_layers": 1})).eval()
    assistant.generation_config.eos_token_id = None
    assistant.generation_config.pad_token_id = 0
    expected = model.generate(**inputs, **GREEDY, max_new_tokens=12)
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].shape[1]), with_kwargs=True)
    assisted = model.generate(**inputs, **GREEDY, max_new_tokens=12, assistant_model=assistant)
    handle.remove()
    assert sizes[0] > inputs["input_ids"].shape[1]
    assert max(sizes[1:]) > 1
    assert torch.equal(assisted, expected)


@both_places
def test_behind_dymu_a_padded_batch_is_its_prompts_one_at_a_time(prune_at: Any) -> None:
    """Also beside a text-only prompt, whose padding is longer than what merging saves."""
    model: Any = inject_dymu(LLAVA.build(), DyMUConfig(thresholds=0.3))
    merged = generated(model, prompt(LLAVA, ASKS[1]), 2)[2]
    inject_fastv(model, FastVConfig(layer=2, ratio=0.5, prune_at=prune_at))
    prompts = [prompt(LLAVA, ask) for ask in ASKS]
    together = generated(model, batched(prompts), 6)
    for row, inputs in enumerate(prompts):
        new, logits, _ = generated(model, inputs, 6)
        assert torch.equal(new[0], together[0][row])
        assert_close(together[1][row], logits[0], 1e-4)
    cached = generated(model, prompts[1], 2)[2]
    assert cached[0] == (merged[0] if prune_at == "layer" else cached[-1])
    assert cached[-1] < merged[-1] < prompts[1]["input_ids"].shape[1]


# -- turns ------------------------------------------------------------------------------------------------------------


def new_cache(model: Any, static: bool) -> Any:
    text = model.config.get_text_config()
    return StaticCache(config=text, max_cache_len=160) if static else DynamicCache(config=text)


@both_places
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_a_later_turn_at_once_is_the_same_as_token_by_token(prune_at: Any, static: bool) -> None:
    """In a left-padded batch whose samples kept different numbers of tokens."""
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2, prune_at=prune_at))
    inputs = batched([prompt(LLAVA, ask) for ask in ASKS])
    turn = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(4))
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(turn)), 1)
    places = mask.cumsum(1) - 1
    length = inputs["input_ids"].shape[1]
    caches = [new_cache(model, static) for _ in range(2)]
    for cache in caches:
        model(**inputs, position_ids=places[:, :length].clamp(min=0), **passing(model, cache))
    at_once = model(input_ids=turn, attention_mask=mask, position_ids=places[:, length:], **passing(model, caches[0]))
    single = []
    for step in range(5):
        until = length + step + 1
        options = {"attention_mask": mask[:, :until], "position_ids": places[:, until - 1 : until]}
        single.append(model(input_ids=turn[:, step : step + 1], **passing(model, caches[1]), **options).logits)
    assert_close(at_once.logits, torch.cat(single, 1))
    assert lengths(caches[0]) == lengths(caches[1])


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_a_later_turn_prunes_its_own_images(static: bool) -> None:
    """`downsample` asks nobody: both turns keep what they would keep as one prompt."""
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2, ratio=0.5, selector="downsample"))
    first, second = prompt(LLAVA, ASKS[0]), prompt(LLAVA, Ask((4, 6), seed=7))
    whole = {name: torch.cat((first[name], second[name]), 0 if name == "pixel_values" else 1) for name in first}
    cache = new_cache(model, static)
    model(**first, **passing(model, cache))
    output = model(**{**second, "attention_mask": whole["attention_mask"]}, **passing(model, cache))
    one = model(**whole, use_cache=True)
    text = (second["input_ids"] != IMAGE)[0]
    assert_close(output.logits[:, text], one.logits[:, first["input_ids"].shape[1] :][:, text])
    assert lengths(cache) == lengths(cache_of_output(one))
    token = torch.tensor([[7]])
    followed = model(input_ids=token, **passing(model, cache)).logits
    assert_close(followed, model(input_ids=token, **passing(model, cache_of_output(one))).logits)


@torch.no_grad()
def test_before_layer_0_only_the_first_prompt_of_a_cache_is_pruned() -> None:
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2, ratio=0.5, prune_at="input"))
    first, second = prompt(LLAVA, ASKS[0]), prompt(LLAVA, Ask((4, 6), seed=7))
    cache = new_cache(model, static=False)
    model(**first, **passing(model, cache))
    mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1])
    model(**{**second, "attention_mask": mask}, **passing(model, cache))
    assert lengths(cache) == [mask.shape[1] - 8] * 4


def conversation(model: Any) -> tuple[dict[str, Any], Any, Tensor]:
    """A prompt, the cache behind its answer, and all ids so far with a question behind."""
    inputs = prompt(LLAVA, ASKS[0])
    out = model.generate(**inputs, **GREEDY, max_new_tokens=4, return_dict_in_generate=True)
    return inputs, cache_of_output(out), torch.cat((out.sequences, torch.tensor([[9, 8, 7]])), 1)


def test_generate_goes_on_from_a_cache() -> None:
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2))
    _, cache, ids = conversation(model)
    again = copy.deepcopy(cache)
    mask = torch.ones_like(ids)
    options = {**GREEDY, "max_new_tokens": 5}
    whole = model.generate(input_ids=ids, attention_mask=mask, **passing(model, cache), **options)[:, ids.shape[1] :]
    new = ids[:, -4:]  # the last token of the answer is not in the cache yet
    part = model.generate(input_ids=new, attention_mask=mask, **passing(model, again), **options)[:, 4:]
    assert torch.equal(whole, part)


def test_before_layer_0_a_later_turn_is_its_new_tokens_only() -> None:
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2, prune_at="input"))
    _, cache, ids = conversation(model)
    mask = torch.ones_like(ids)
    options = {**GREEDY, "max_new_tokens": 5}
    again = copy.deepcopy(cache)
    with pytest.raises(PlanError, match="give a later turn as its new tokens only"):
        model.generate(input_ids=ids, attention_mask=mask, **passing(model, cache), **options)
    out = model.generate(input_ids=ids[:, -4:], attention_mask=mask, **passing(model, again), **options)
    assert out.shape == (1, 9)


@both_places
@torch.no_grad()
def test_copies_of_a_cache_and_repeated_ones_go_on(prune_at: Any) -> None:
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2, prune_at=prune_at))
    inputs, token = prompt(LLAVA, ASKS[1]), torch.tensor([[7]])
    cache = cache_of_output(model(**inputs, use_cache=True))
    copied, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
    repeated.batch_repeat_interleave(3)
    expected = model(input_ids=token, **passing(model, cache)).logits
    assert torch.equal(model(input_ids=token, **passing(model, copied)).logits, expected)
    logits = model(input_ids=token.expand(3, -1), **passing(model, repeated)).logits
    assert_close(logits, expected.expand(3, -1, -1))


@both_places
@torch.no_grad()
def test_caches_of_several_conversations_do_not_mix(prune_at: Any) -> None:
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2, prune_at=prune_at))
    prompts, token = [prompt(LLAVA, ask) for ask in ASKS], torch.tensor([[7]])
    expected = []
    for inputs in prompts:
        cache = cache_of_output(model(**inputs, use_cache=True))
        expected.append(model(input_ids=token, **passing(model, cache)).logits)
    caches = [cache_of_output(model(**inputs, use_cache=True)) for inputs in prompts]
    for row in (2, 0, 1):
        assert torch.equal(model(input_ids=token, **passing(model, caches[row])).logits, expected[row])


@torch.no_grad()
def test_a_cache_of_before_goes_on_and_loses_images_from_then_on() -> None:
    """Filled before FastV came: nothing of it is pruned, images of later turns are."""
    model: Any = LLAVA.build()
    first, second = prompt(LLAVA, ASKS[0]), prompt(LLAVA, Ask((4, 6), seed=7))
    cache = cache_of_output(model(**first, use_cache=True))
    inject_fastv(model, FastVConfig(layer=2))
    mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1])
    model(**{**second, "attention_mask": mask}, **passing(model, cache))
    whole = mask.shape[1]
    assert lengths(cache) == [whole, whole, whole - 8, whole - 8]
    assert model(input_ids=torch.tensor([[5]]), **passing(model, cache)).logits.isfinite().all()


@torch.no_grad()
def test_hooks_see_the_whole_prompt_in_front_of_the_pruning_and_less_behind() -> None:
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2))
    sizes: list[int] = []
    layers: Any = find_decoder(model).layers
    for layer in layers:
        layer.mlp.register_forward_hook(lambda m, a, out: sizes.append(out.shape[1]))
    inputs = prompt(LLAVA, ASKS[0])
    logits = model(**inputs).logits
    assert sizes == [24, 24, 16, 16]
    assert logits.shape[1] == 24
