"""Virtual unmerging: its formula, against the full sequence, with caches and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfa_adapters.compat import cache_of_output
from sfa_adapters.errors import InjectionError, UnsupportedAttentionError
from sfa_adapters.reduction.dymu.config import DyMUConfig
from sfa_adapters.reduction.dymu.inject import eject_dymu, inject_dymu
from sfa_adapters.reduction.dymu.logical_rope import latest_kept
from sfa_adapters.reduction.dymu.vtu import Unmerged, UnmergedMask, rotate, unmerged_logits
from tests.support.compare import Snapshot, assert_close
from tests.support.dymu import BY_NAME, GENERATE, NAMES, THRESHOLD, padded, single

VTU = DyMUConfig(thresholds=THRESHOLD, language="vtu")
every_host = pytest.mark.parametrize("name", NAMES)


def test_the_formula_is_rotary_attention_of_the_expanded_sequence() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    owner = torch.tensor([0, 1, 1, 2, 0, 3, 1])
    angles = torch.arange(7)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).double()
    cos, sin = (torch.cat((part, part), -1)[None, None] for part in (angles.cos(), angles.sin()))
    wide_query, wide_key = (rotate(states[None, :, owner], cos, sin)[0] for states in (query, key))
    logits = unmerged_logits(query, key, angles, owner, owner)
    assert_close(logits, wide_query @ wide_key.transpose(-1, -2), 1e-12)


def test_attention_is_the_mean_of_the_formulas_rows() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 3, 4, 8, dtype=torch.float64)
    owner = torch.tensor([[0, 1, 1, 2, 0, 3, 1]])
    angles = torch.arange(7)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).double()
    rotation = tuple(torch.cat((part, part), -1)[None] for part in (angles.cos(), angles.sin()))
    full = Unmerged(4, owner, torch.ones(1, 7), owner, 4, rotation)  # pyright: ignore[reportArgumentType]
    output = UnmergedMask(full, 4).attend(query, key, value, None, 0.0)
    logits = unmerged_logits(query[0], key[0], angles, owner[0], owner[0]) * 8**-0.5
    rows = logits.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf")).softmax(-1) @ value[0][:, owner[0]]
    wanted = torch.stack([rows[:, owner[0] == j].mean(1) for j in range(4)], 1)
    assert_close(output[0], wanted, 1e-12)


def expanded_logits(model: Any, inputs: dict[str, Any], config: DyMUConfig) -> Tensor:
    """All layers over the full sequence, from merged states: expand, attend in full, average over duplicates."""
    seen: dict[str, Any] = {}
    language: Any = model.model.language_model
    inject_dymu(model, config)
    with torch.no_grad():
        model(**inputs)
    kept = latest_kept(language)
    assert kept is not None
    eject_dymu(model)
    inject_dymu(model, DyMUConfig(thresholds=config.thresholds, language="off"))

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = language.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    eject_dymu(model)
    with torch.no_grad():
        embeds, positions, mask = seen["inputs_embeds"], seen.get("position_ids"), seen["attention_mask"]
        batch, length = embeds.shape[:2]
        if positions is None:
            positions = torch.arange(length)[None].expand(batch, -1)
        if positions.ndim == 2 and hasattr(language.rotary_emb, "mrope_section"):
            positions = positions[None].expand(3, -1, -1)
        rotary = language.rotary_emb(embeds, positions)
        place = torch.arange(length)
        allowed = (place <= place[:, None]) & mask[:, None, None].bool() | (place == place[:, None])
        owner = kept.owner[..., None].expand(-1, -1, embeds.shape[-1])
        states = embeds.gather(1, kept.index[..., None].expand(-1, -1, embeds.shape[-1]))
        count = torch.zeros(states.shape[:2]).scatter_add(1, kept.owner, torch.ones(batch, length)).clamp(min=1)
        for layer in language.layers:
            wide = layer.input_layernorm(states).gather(1, owner)
            out = layer.self_attn(hidden_states=wide, position_embeddings=rotary, attention_mask=allowed)[0]
            states = states + torch.zeros_like(states).scatter_add(1, owner, out) / count[..., None]
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return model.lm_head(language.norm(states).gather(1, owner))


@every_host
def test_vtu_is_the_expanded_full_computation_with_a_merged_cache(name: str) -> None:
    host = BY_NAME[name]
    model: Any = host.build()
    inputs = padded(host)
    with torch.no_grad():
        model(**inputs)  # transformers installs hooks of its own at the first forward
    before = Snapshot(model)
    wanted = expanded_logits(model, inputs, VTU)
    before.assert_unchanged(model)
    inject_dymu(model, VTU)
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    kept = latest_kept(model.model.language_model)
    assert kept is not None
    real = inputs["attention_mask"].bool()
    assert_close(output.logits[real], wanted[real], 1e-5)
    lengths = {layer.keys.shape[2] for layer in cache_of_output(output).layers}
    assert lengths == {kept.index.shape[1]}
    assert kept.index.shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])  # grouped queries in both; M-RoPE in one
def test_decoding_from_the_merged_cache_is_a_full_pass_at_every_step(name: str) -> None:
    host = BY_NAME[name]
    model: Any = inject_dymu(host.build(), VTU)
    inputs = padded(host)
    cached = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **GENERATE)
    uncached = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, use_cache=False, **GENERATE)
    static = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, cache_implementation="static", **GENERATE)
    for one, other, third in zip(cached.logits, uncached.logits, static.logits, strict=True):
        assert_close(one, other, 1e-4)
        assert_close(one, third, 1e-4)
    for number in range(2):
        alone = model.generate(**single(inputs, number), max_new_tokens=8, min_new_tokens=8, **GENERATE)
        for one, other in zip(cached.logits, alone.logits, strict=True):
            assert_close(one[number], other[0], 1e-4)


def test_it_differs_from_logical_rope() -> None:
    host = BY_NAME["llava_onevision"]
    inputs = host.inputs()
    logits = []
    for language in ("vtu", "logical_rope"):
        model = inject_dymu(host.build(), DyMUConfig(thresholds=THRESHOLD, language=language))
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_eager_attention_is_refused_before_and_after() -> None:
    host = BY_NAME["llava"]
    model: Any = host.build()
    model.set_attn_implementation("eager")
    before = Snapshot(model)
    with pytest.raises(UnsupportedAttentionError, match="needs sdpa"):
        inject_dymu(model, VTU)
    before.assert_unchanged(model)
    model.set_attn_implementation("sdpa")
    inject_dymu(model, VTU)
    model.set_attn_implementation({"text_config": "eager"})
    with pytest.raises(UnsupportedAttentionError, match="needs sdpa"):
        model(**host.inputs())


def test_a_mask_of_ones_own_is_refused() -> None:
    host = BY_NAME["llava"]
    model = inject_dymu(host.build(), VTU)
    inputs = host.inputs()
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(2, 1, length, length).tril().bool()
    with pytest.raises(UnsupportedAttentionError, match="batch, tokens"):
        model(**inputs)


def test_an_unknown_rotary_embedding_is_refused() -> None:
    host = BY_NAME["llava"]
    model: Any = host.build()
    language = model.model.language_model
    foreign = type("StrangeModel", (nn.Module,), {})()
    foreign.config = language.config
    model.model.language_model = foreign
    with pytest.raises(InjectionError, match="StrangeModel"):
        inject_dymu(model, VTU)
