"""FastV against a plain dense reference: bit-exact when nothing is pruned, named errors for what cannot be pruned."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import StaticCache

from sfa_adapters import eject_sfa, features_of, inject_sfa
from sfa_adapters.adat import PatchPolicy, eject_adat, inject_adat
from sfa_adapters.compat import cache_of_output
from sfa_adapters.errors import InjectionError, PlanError, UnsupportedAttentionError
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.models import load_nano
from sfa_adapters.reduction.fastv.inject import FastVConfig, eject_fastv, inject_fastv
from sfa_adapters.reduction.kept_tokens import KEPT
from sfa_adapters.vlm.parts import find_decoder
from tests.reduction.fastv.test_selectors import SELECTORS, NoHostSync
from tests.support.compare import Snapshot, assert_close, passing
from tests.support.fastv_prompts import FAMILIES, Ask, Family, batched, prompt
from tests.support.hosts import IMAGE, HostCase, every_host, logits_of

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
LLAVA = FAMILIES[0]
# One image; two images of different sizes; text alone.
ASKS = (Ask((3, 5), seed=1), Ask((2, 3, 9), (2, 1), seed=2), Ask((6,), seed=3))


def kept_columns(model: nn.Module, inputs: dict[str, Any]) -> list[list[int]]:
    """Which columns of each sample layers behind the pruning hold."""
    with torch.no_grad():
        cache = cache_of_output(model(**inputs, use_cache=True))
    kept = getattr(cache, KEPT)
    return [row[live].tolist() for row, live in zip(kept.columns, kept.live, strict=True)]


# -- a plain dense reference: one prompt, no cache, the layers of the model called one after the other --------------


class Dense:
    """Runs one prompt through the language model of a host; the published rule with whole attention matrices."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model: Any = model
        self.decoder: Any = find_decoder(model).module
        given: dict[str, Any] = {}

        def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if "hidden_states" not in given:
                given.update(kwargs, hidden_states=args[0] if args else kwargs["hidden_states"])

        handle = self.decoder.layers[0].register_forward_pre_hook(see, with_kwargs=True)
        with torch.no_grad():
            model(**inputs, use_cache=False)
        handle.remove()
        self.states, self.positions = given["hidden_states"], given["position_embeddings"]
        self.image = inputs["input_ids"][0] == IMAGE

    def attention(self, states: Tensor, number: int) -> Tensor:
        """Whole attention matrix of a layer, `[heads, L, L]`, from an eager copy of it."""
        layer = copy.deepcopy(self.decoder.layers[number])
        layer.self_attn.config._attn_implementation = "eager"
        weights: list[Tensor] = []
        layer.self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
        self.call(layer, states, self.positions)
        return weights[0][0]

    @staticmethod
    def call(layer: Any, states: Tensor, positions: Any) -> Tensor:
        length = states.shape[1]
        mask = torch.full((length, length), torch.finfo(states.dtype).min).triu(1)[None, None]
        out = layer(states, attention_mask=mask, position_embeddings=positions, position_ids=None)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def run(self, config: FastVConfig, renumber: bool = False) -> tuple[list[int], Tensor]:
        """Kept columns, and the logits behind the last token."""
        states, positions, kept = self.states, self.positions, list(range(self.states.shape[1]))
        weights = torch.empty(0)
        for number, layer in enumerate(self.decoder.layers):
            if number == config.layer - 1:
                weights = self.attention(states, number)
            if number == config.layer:
                text = [i for i in kept if not self.image[i]]
                rows = [kept[-1]] if config.query == "last" else text
                score = weights[:, rows].mean((0, 1))
                images = [i for i in kept if self.image[i]]
                images.sort(key=lambda i: -float(score[i]))
                kept = sorted(text + images[: config.budget(len(images))])
                states = states[:, kept]
                places = list(range(len(kept))) if renumber else kept
                positions = tuple(part[..., places, :] for part in positions)
            states = self.call(layer, states, positions)
        return kept, self.model.lm_head(self.decoder.norm(states))[0, -1]


@every_family
@pytest.mark.parametrize("query", ["last", "mean"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_kept_tokens_and_logits_are_those_of_the_dense_rule(family: Family, query: Any, implementation: str) -> None:
    model: Any = family.build()
    prompts = [prompt(family, ask) for ask in ASKS[:2]]
    config = FastVConfig(layer=2, ratio=0.5, query=query)
    expected = [Dense(model, inputs).run(config) for inputs in prompts]
    model.set_attn_implementation(implementation)
    inject_fastv(model, config)
    for inputs, (kept, logits) in zip(prompts, expected, strict=True):
        assert kept_columns(model, inputs) == [kept]
        assert_close(logits_of(model, inputs)[0, -1], logits, 1e-5)


def test_kept_tokens_of_a_trained_model_are_those_of_the_dense_rule() -> None:
    host = load_nano()
    image = torch.randint(0, 255, (144, 144, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    inputs = dict(encode(host, [image], ["What is the value of A?"]))
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    dense = Dense(host.model, inputs)
    dense.image = inputs["input_ids"][0] == host.model.config.image_token_id
    for layer, ratio in ((2, 0.5), (1, 0.75)):
        config = FastVConfig(layer=layer, ratio=ratio)
        kept, logits = dense.run(config)
        inject_fastv(host.model, config)
        assert kept_columns(host.model, inputs) == [kept]
        assert_close(logits_of(host.model, inputs)[0, -1], logits, 1e-4)
        eject_fastv(host.model)


@every_family
def test_renumbered_positions_would_change_the_output(family: Family) -> None:
    model, inputs = family.build(), prompt(family, ASKS[1])
    config = FastVConfig(layer=1, ratio=0.5)
    dense = Dense(model, inputs)
    kept, renumbered = dense.run(config, renumber=True)
    assert (renumbered - dense.run(config)[1]).abs().max() > 1e-2
    inject_fastv(model, config)
    assert (logits_of(model, inputs)[0, -1] - renumbered).abs().max() > 1e-2
    assert kept_columns(model, inputs) == [kept]


@every_family
@pytest.mark.parametrize("prune_at", ["layer", "input"])
def test_text_stays_indices_ascend_and_the_budget_is_kept(family: Family, prune_at: Any) -> None:
    model = inject_fastv(family.build(), FastVConfig(layer=2, k=3, prune_at=prune_at))
    prompts = [prompt(family, ask) for ask in ASKS]
    inputs = batched(prompts)
    for row, columns in enumerate(kept_columns(model, inputs)):
        assert columns == sorted(set(columns))
        image = inputs["input_ids"][row] == IMAGE
        text = (~image & inputs["attention_mask"][row].bool()).nonzero()[:, 0].tolist()
        assert set(text) <= set(columns)
        assert len(columns) - len(text) == min(3, int(image.sum()))


def test_a_permuted_batch_gives_permuted_outputs() -> None:
    model = inject_fastv(LLAVA.build(), FastVConfig(layer=2))
    prompts = [prompt(LLAVA, ask) for ask in ASKS]
    order = [2, 0, 1]
    permuted = logits_of(model, batched([prompts[i] for i in order]))[:, -1]
    assert_close(permuted, logits_of(model, batched(prompts))[order, -1])


# -- nothing goes -----------------------------------------------------------------------------------------------------


@every_host
def test_without_pruning_and_after_ejecting_the_model_is_bit_exact(host: HostCase) -> None:
    model, inputs = host.build(), host.inputs()
    before, snapshot = logits_of(model, inputs), Snapshot(model)
    if host.name == "gemma3":
        with pytest.raises(InjectionError, match="see a window of tokens"):
            inject_fastv(model, FastVConfig(layer=1))
        snapshot.assert_unchanged(model)
        return
    for config in (FastVConfig(layer=1, ratio=0.0), FastVConfig(layer=1, k=host.image_tokens), FastVConfig(layer=1)):
        inject_fastv(model, config)
        after = logits_of(model, inputs)
        assert torch.equal(after, before) == (config.ratio != 0.5)
        assert after.shape == before.shape
        eject_fastv(model)
        snapshot.assert_unchanged(model)
        assert torch.equal(logits_of(model, inputs), before)


@pytest.mark.parametrize("selector", SELECTORS)
@every_family
def test_every_selector_runs_on_every_family_and_ejects_cleanly(family: Family, selector: Any) -> None:
    model, inputs = family.build(), batched([prompt(family, ask) for ask in ASKS])
    before, snapshot = logits_of(model, inputs), Snapshot(model)
    inject_fastv(model, FastVConfig(layer=1, ratio=0.5, selector=selector))
    columns = kept_columns(model, inputs)
    count = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    text = ((inputs["input_ids"] != IMAGE) & inputs["attention_mask"].bool()).sum(1).tolist()
    assert [len(row) for row in columns] == [t + FastVConfig().budget(c) for t, c in zip(text, count, strict=True)]
    eject_fastv(model)
    snapshot.assert_unchanged(model)
    assert torch.equal(logits_of(model, inputs), before)


def test_a_prompt_without_images_passes_as_it_is() -> None:
    model, inputs = LLAVA.build(), prompt(LLAVA, ASKS[2])
    before = logits_of(model, inputs)
    assert torch.equal(logits_of(inject_fastv(model), inputs), before)


# -- the hot path -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("prune_at", ["layer", "input"])
def test_fastv_never_waits_for_the_device(selector: Any, prune_at: Any) -> None:
    """At a prompt, the vision tower included, and while decoding."""
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=2, selector=selector, prune_at=prune_at))
    inputs = batched([prompt(LLAVA, ask) for ask in ASKS])
    token = torch.full((3, 1), 5)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(token)), 1)
    with torch.no_grad(), NoHostSync():
        cache = cache_of_output(model(**inputs, use_cache=True))
        model(input_ids=token, attention_mask=mask, **passing(model, cache))
    assert getattr(cache, KEPT).dropped > 0


def test_every_layer_keeps_its_kernel() -> None:
    """No attention weights come out, and without padding no pruned layer gets a mask."""
    model, inputs = inject_fastv(LLAVA.build(), FastVConfig(layer=2)), prompt(LLAVA, ASKS[0])
    masks: list[Any] = []
    for layer in find_decoder(model).layers:
        attention: Any = layer.self_attn
        attention.register_forward_pre_hook(lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True)
    logits_of(model, inputs)
    assert masks == [None] * 4


# -- with other methods, and training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prune_at", ["layer", "input"])
def test_with_sfa_adat_and_lora_in_any_order(prune_at: Any) -> None:
    config = FastVConfig(layer=2, ratio=0.5, prune_at=prune_at)
    inputs = batched([prompt(LLAVA, ask) for ask in ASKS[:2]])
    outputs = []
    for first in (True, False):
        model: Any = LLAVA.build()
        if first:
            inject_fastv(model, config)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj"))
        inject_sfa(model)
        inject_adat(model, PatchPolicy(scorer="reconstruction", budget=0.5))
        if not first:
            inject_fastv(model, config)
        outputs.append(logits_of(model.eval(), inputs))
        eject_fastv(model)
    assert torch.equal(*outputs)
    eject_adat(model)
    eject_sfa(model)
    assert torch.equal(logits_of(model, inputs), logits_of(LLAVA.build(), inputs))


def answered(ask: Ask, length: int = 4) -> dict[str, Any]:
    """A prompt with its answer, whose tokens are the targets."""
    inputs = prompt(LLAVA, ask)
    labels = inputs["input_ids"].clone()
    labels[:, :-length] = -100
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prune_at", ["layer", "input"])
def test_loss_and_gradients_are_those_of_the_answer_alone(checkpointing: bool, prune_at: Any) -> None:
    """Right padding, labels, gradients; the loss is the mean over both samples one at a time."""
    config = FastVConfig(layer=2, ratio=0.5, prune_at=prune_at)
    samples = [answered(Ask((3, 7), seed=5)), answered(Ask((2, 3, 9), seed=6))]

    def trained(inputs: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        model: Any = inject_fastv(LLAVA.build(), config).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        losses = []
        for one in inputs:
            loss = model(**one).loss
            (loss / len(inputs)).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean(), model.model.language_model.layers[3].mlp.up_proj.weight.grad.clone()

    together, alone = trained([batched(samples, side="right")]), trained(samples)
    assert_close(together[0], alone[0])
    assert float(alone[1].abs().max()) > 0
    assert_close(together[1], alone[1])


def test_teacher_forcing_chooses_as_generation_does() -> None:
    model, inputs = inject_fastv(LLAVA.build(), FastVConfig(layer=2)), answered(Ask((3, 12), seed=8), 4)
    prompt_only = {
        **inputs,
        "input_ids": inputs["input_ids"][:, :-4],
        "attention_mask": inputs["attention_mask"][:, :-4],
    }
    del prompt_only["labels"]
    [expected] = kept_columns(model, prompt_only)
    ids = inputs["input_ids"]
    assert kept_columns(model, inputs) == [[*expected, *range(ids.shape[1] - 4, ids.shape[1])]]


def test_copies_and_pickles_of_a_model_have_their_own_fastv() -> None:
    model, inputs = inject_fastv(LLAVA.build(), FastVConfig(layer=2)), prompt(LLAVA, ASKS[0])
    twin = copy.deepcopy(model)
    read = pickle.loads(pickle.dumps(model))
    expected = logits_of(model, inputs)
    eject_fastv(model)
    for other in (twin, read):
        assert torch.equal(logits_of(other, inputs), expected)
        assert "fastv" not in features_of(eject_fastv(other))


# -- what cannot be pruned --------------------------------------------------------------------------------------------


def test_injecting_errors_leave_the_model_as_it_was() -> None:
    model: Any = LLAVA.build()
    snapshot = Snapshot(model)
    with pytest.raises(InjectionError, match="has 4 layers, 0 to 3"):
        inject_fastv(model, FastVConfig(layer=4))
    with pytest.raises(InjectionError, match="has no FastV"):
        eject_fastv(model)
    with pytest.raises(InjectionError, match="no language model"):
        inject_fastv(model.model.vision_tower)
    with pytest.raises(InjectionError, match="no language model"):
        inject_fastv(model.model.language_model)
    inject_fastv(model)
    with pytest.raises(InjectionError, match="has FastV already"):
        inject_fastv(model)
    eject_fastv(model)
    model.config._attn_implementation = "sdpa"
    snapshot.assert_unchanged(model)


def test_flash_attention_is_refused_where_scores_are_needed() -> None:
    model: Any = LLAVA.build()
    text = model.model.language_model.config
    text._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedAttentionError, match="flash_attention_2"):
        inject_fastv(model)
    inject_fastv(model, FastVConfig(selector="diversity"))
    eject_fastv(model)
    text._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedAttentionError, match="flex_attention"):
        inject_fastv(model, FastVConfig(selector="diversity"))


def test_attention_that_shows_no_scores_is_told_at_the_forward() -> None:
    model: Any = inject_fastv(LLAVA.build())
    inputs = prompt(LLAVA, ASKS[0])
    attention = model.model.language_model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedAttentionError, match="reads the attention of layer 1"):
        logits_of(model, inputs)
    attention.forward = forward
    assert logits_of(model, inputs).isfinite().all()  # nothing of the failed forward is left


def test_embeddings_alone_do_not_tell_image_tokens() -> None:
    model: Any = inject_fastv(LLAVA.build())
    embeds = model.get_input_embeddings()(prompt(LLAVA, ASKS[2])["input_ids"])
    with pytest.raises(PlanError, match="inputs_embeds alone"):
        logits_of(model, {"inputs_embeds": embeds})
    assert model.model.language_model(inputs_embeds=embeds).last_hidden_state.shape == embeds.shape


def test_a_cache_of_another_batch_is_refused() -> None:
    model: Any = inject_fastv(LLAVA.build())
    inputs = batched([prompt(LLAVA, ask) for ask in ASKS[:2]])
    with torch.no_grad():
        cache = cache_of_output(model(**inputs, use_cache=True))
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(PlanError, match="filled with 2 samples and is used with 1"):
            model(input_ids=torch.tensor([[5]]), **passing(model, cache))


def test_a_cache_that_was_cut_into_its_prompt_is_refused() -> None:
    model: Any = inject_fastv(LLAVA.build())
    inputs = prompt(LLAVA, Ask((2, 3, 4), seed=9))
    with torch.no_grad():
        cache = cache_of_output(model(**inputs, use_cache=True))
        again = copy.deepcopy(cache)
        cache.crop(-5)
        with pytest.raises(PlanError, match="cut into its prompt"):
            model(input_ids=torch.tensor([[5]]), **passing(model, cache))
        again.crop(-3)  # text behind the last image may be taken back
        expected = model(**{**inputs, "input_ids": inputs["input_ids"][:, :-3], "attention_mask": None})
        last = int(inputs["input_ids"][0, -4])
        again.crop(-1)
        logits = model(input_ids=torch.tensor([[last]]), **passing(model, again)).logits[0, -1]
    assert logits.shape == expected.logits[0, -1].shape


def test_a_static_cache_that_was_reset_serves_the_next_prompt() -> None:
    model: Any = inject_fastv(LLAVA.build())
    first, second = (prompt(LLAVA, ask) for ask in (ASKS[1], ASKS[2]))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with torch.no_grad():
        model(**first, **passing(model, cache))
        cache.reset()
        logits = [model(**second, **passing(model, cache)).logits[:, -1]]
        logits.append(model(input_ids=torch.tensor([[5]]), **passing(model, cache)).logits[:, -1])
        fresh = model(**second, use_cache=True)
        expected = [fresh.logits[:, -1]]
        expected.append(model(input_ids=torch.tensor([[5]]), **passing(model, cache_of_output(fresh))).logits[:, -1])
    assert_close(torch.cat(logits), torch.cat(expected))


def test_density_needs_the_images_of_the_prompt() -> None:
    model: Any = inject_fastv(LLAVA.build(), FastVConfig(layer=1, selector="density"))
    inputs = prompt(LLAVA, ASKS[0])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
        model(**inputs)  # uses up what the tower saw
        with pytest.raises(PlanError, match="the tower has not run"):
            model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features})
