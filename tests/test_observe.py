"""`observe` on every tower and language model: outputs unchanged, statistics of dense attention, no silent gaps."""

from __future__ import annotations

import gc
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from sfa_adapters import inject_sfa, observe
from sfa_adapters.adat import PatchPolicy, inject_adat
from sfa_adapters.attention_call import AttentionCall
from sfa_adapters.choices import DEFAULT_TERMS, TERMS
from sfa_adapters.errors import LayoutError, ObservationError
from sfa_adapters.observe import attention_modules
from sfa_adapters.readers import KeyMass, MeanPerKey, RowEntropy, RowProbabilities, TopKeys
from tests.support import compare
from tests.support.hosts import HostCase, every_host
from tests.support.towers import SMALL, TowerCase, every_tower, lively, set_eager
from tests.support.triton import interpret

LANGUAGE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LANGUAGE_CONFIGS = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
every_language = pytest.mark.parametrize("config", LANGUAGE_CONFIGS, ids=lambda kind: kind.model_type)
IMPLEMENTATIONS = ("sdpa", "eager")


def language(config: Any, implementation: str = "sdpa", **options: Any) -> Any:
    return lively(
        lambda: AutoModelForCausalLM.from_config(config(**LANGUAGE, **options), attn_implementation=implementation)
    )()


def prompts(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = 0
    elif padding == "right":
        mask[0, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def entropy_of(weights: Tensor) -> Tensor:
    return -torch.where(weights > 0, weights * weights.clamp(min=1e-30).log(), 0.0).sum(-1)


def dense_attention(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """What `output_attentions` of eager attention gives."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    return list(weights)


# -- language models --


@every_language
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_language_models(config: Any, implementation: str, padding: str) -> None:
    model, inputs = language(config, implementation), prompts(padding)
    with torch.no_grad():
        plain = model(**inputs).logits
        entropy, rows, mean = RowEntropy(), RowProbabilities(), MeanPerKey(queries=inputs["attention_mask"].bool())
        with observe(model, [entropy, rows, mean], block_bytes=400) as seen:
            watched = model(**inputs).logits
    assert torch.equal(plain, watched)
    assert list(seen.calls) == [f"model.layers.{i}.self_attn" for i in range(3)]
    real = inputs["attention_mask"].bool()
    for layer, wanted in zip(seen.layers, dense_attention(model, inputs), strict=True):
        (probabilities,), (found_entropy,), (found_mean,) = (r.results[layer] for r in (rows, entropy, mean))
        compare.assert_close(probabilities.transpose(1, 2)[real], wanted.transpose(1, 2)[real])
        compare.assert_close(found_entropy.transpose(1, 2)[real], entropy_of(wanted).transpose(1, 2)[real])
        means = torch.stack([w[:, keep].mean(1) for w, keep in zip(wanted, real, strict=True)])
        compare.assert_close(found_mean, means)


@every_language
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_steps_read_the_rows_that_a_whole_forward_has(config: Any, implementation: str, cache: str) -> None:
    """At a decoding step under grouped-query attention, transformers packs heads into the query axis."""
    model, inputs = language(config, implementation), prompts("left")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    options["cache_implementation"] = cache
    plain = model.generate(**inputs, **options)
    rows, prompt_rows = RowProbabilities(queries="generated"), RowProbabilities(queries=[9])
    with observe(model, [rows, prompt_rows]):
        watched = model.generate(**inputs, **options)
    assert torch.equal(plain, watched)
    whole = {"input_ids": plain, "attention_mask": torch.cat((inputs["attention_mask"], torch.ones(2, 5).long()), 1)}
    for layer, wanted in zip(rows.results, dense_attention(model, whole), strict=True):
        steps = rows.results[layer]
        assert len(steps) == 4  # the last generated token is never a query
        for step, probabilities in enumerate(steps):
            visible = 11 + step
            assert probabilities.shape[:3] == (2, 4, 1)
            compare.assert_close(probabilities[..., 0, :visible], wanted[:, :, 10 + step, :visible])
            assert probabilities[..., visible:].abs().max().item() == 0 if probabilities.shape[-1] > visible else True
        compare.assert_close(prompt_rows.results[layer][0][..., 0, :10], wanted[:, :, 9, :10])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_fell_out_of_a_sliding_window_keep_their_places(implementation: str) -> None:
    model, inputs = language(MistralConfig, implementation, sliding_window=6), prompts("none")
    parity = torch.arange(10) % 2
    mass, entropy = KeyMass(parity, queries="generated"), RowEntropy(queries="generated", keys=parity == 1)
    top = TopKeys(2, queries="generated")
    with observe(model, [mass, entropy, top]):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    whole = {"input_ids": out, "attention_mask": torch.ones_like(out)}
    for layer, wanted in zip(mass.results, dense_attention(model, whole), strict=True):
        for step, masses in enumerate(mass.results[layer]):
            row = wanted[:, :, 10 + step]
            compare.assert_close(
                masses[:, :, 0], torch.stack([row[..., :10][..., parity == g].sum(-1) for g in (0, 1)], -1)
            )
            odd = row[..., :10][..., parity == 1]
            compare.assert_close(entropy.results[layer][step][..., 0], entropy_of(odd / odd.sum(-1, keepdim=True)))
            values, places = row.topk(2)
            assert torch.equal(top.results[layer][step][:, :, 0].long(), places)
            compare.assert_close(top.results[layer][step][:, :, 1], values)


def test_beams_and_half_precision_are_left_alone() -> None:
    model, inputs = language(Qwen2Config).bfloat16(), prompts("left")
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    plain = model.generate(**inputs, **options)
    entropy = RowEntropy()
    with observe(model, entropy):
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert all(tensor.dtype == torch.float32 for tensors in entropy.results.values() for tensor in tensors)


def test_gradients_are_those_of_the_unobserved_model() -> None:
    inputs, grads = prompts("right"), []
    for watch in (False, True):
        model = language(LlamaConfig).train()
        if watch:
            with observe(model, RowEntropy()):
                loss = model(**inputs, labels=inputs["input_ids"]).loss
        else:
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# -- towers --

DENSE_TOWERS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {"vision_use_head": False}),
    "clip": (CLIPVisionModel, CLIPVisionConfig, {}),
    "internvit": (InternVLVisionModel, InternVLVisionConfig, {}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backend", [None, "dense", "folded", "blocked", "lines", "triton"])
@pytest.mark.parametrize("tower", DENSE_TOWERS)
def test_towers_equal_their_dense_attention(
    tower: str, backend: str | None, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        interpret(monkeypatch)
    kind, config, options = DENSE_TOWERS[tower]
    size = {"image_size": 28, "patch_size": 7, **options}
    model = lively(lambda: kind(config(**SMALL, **size, attn_implementation=implementation)))()
    pixels = {"pixel_values": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    if backend is not None:
        torch.manual_seed(3)
        terms = DEFAULT_TERMS if backend == "lines" else TERMS
        inject_sfa(model, compare.strong_config(backend=backend, terms=list(terms)))
    entropy, rows = RowEntropy(), RowProbabilities()
    with torch.no_grad():
        plain = model(**pixels).last_hidden_state
        with observe(model, [entropy, rows]) as seen:
            watched = model(**pixels).last_hidden_state
    assert torch.equal(plain, watched)
    assert len(seen.layers) == 3
    for layer, wanted in zip(seen.layers, dense_attention(model, pixels), strict=True):
        compare.assert_close(rows.results[layer][0], wanted)
        compare.assert_close(entropy.results[layer][0], entropy_of(wanted))


@pytest.mark.parametrize("backend", ["blocked", "lines", "triton"])
def test_a_loss_on_observed_attention_reaches_everything_behind_it(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backends that no torch function computes give the same gradients of what was read as the matrix does."""
    if backend == "triton":
        interpret(monkeypatch)
    gradients: list[list[Tensor]] = []
    kind, config, options = DENSE_TOWERS["siglip"]
    for name in ("dense", backend):
        model = lively(lambda: kind(config(**SMALL, image_size=28, patch_size=7, **options)))().train()
        torch.manual_seed(3)
        inject_sfa(model, compare.strong_config(backend=name, terms=list(DEFAULT_TERMS)))
        pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        total: list[Tensor] = []

        def add(call: AttentionCall, total: list[Tensor] = total) -> None:
            total.append(call.logits(torch.arange(call.num_queries)).softmax(-1).square().sum())

        with observe(model, add):
            model(pixel_values=pixels)
        assert len(total) == 3
        sum(total).backward()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for mine, reference in zip(*gradients, strict=True):
        compare.assert_close(mine, reference, 2e-4)


@every_tower
@pytest.mark.parametrize("with_sfa", [False, True])
def test_every_tower_can_be_observed_and_stays_as_it_is(case: TowerCase, with_sfa: bool) -> None:
    model, inputs = compare.injected(case) if with_sfa else case.fresh()
    plain = compare.read(case, model, inputs)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    entropy = RowEntropy()
    with observe(model, entropy, modules="vision") as seen:
        assert torch.equal(compare.read(case, model, inputs), plain)
    assert len(seen.layers) == case.layers
    if case.eager_takes_bias:
        tower, _ = compare.injected(case) if with_sfa else case.fresh()
        set_eager(case, tower)
        dense = RowEntropy()
        with observe(tower, dense):
            compare.read(case, tower, inputs)
        for layer in seen.layers:
            observed, wanted = entropy.results[layer], dense.results[layer]
            for one, other in zip(observed, wanted, strict=True):
                compare.assert_close(one.nan_to_num(-1), other.nan_to_num(-1), 2e-5)
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}


@pytest.mark.parametrize("backend", [None, "auto", "triton"])
def test_images_packed_by_adaptive_tokens_are_read_one_by_one(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        interpret(monkeypatch)
    config = SiglipVisionConfig(**SMALL, image_size=56, patch_size=14, vision_use_head=False)
    model: Any = inject_adat(
        lively(lambda: SiglipVisionModel(config))(), PatchPolicy([(0.5, 7), (0.0, 28)], cell=28, scorer="edges")
    )
    if backend is not None:
        torch.manual_seed(3)
        inject_sfa(model, compare.strong_config(backend=backend))
    pages = torch.ones(2, 3, 56, 56)
    pages[0, :, ::4, :28] = -1.0
    together, alone = RowEntropy(), RowEntropy()
    with torch.no_grad():
        with observe(model, together):
            model(pages)
        with observe(model, alone):
            model(pages[:1])
            model(pages[1:])
    for layer, observed in together.results.items():
        assert [len(x[0, 0]) for x in observed] == [len(x[0, 0]) for x in alone.results[layer]]
        for one, other in zip(observed, alone.results[layer], strict=True):
            compare.assert_close(one, other)


# -- whole models --


@every_host
def test_tower_and_language_model_of_every_host(host: HostCase) -> None:
    model, inputs = host.build(), host.inputs()
    length = inputs["input_ids"].shape[1]
    image = (inputs["input_ids"][0] == inputs["input_ids"][0, 2]).long()
    mass, entropy = KeyMass(image), RowEntropy(heads="mean")
    with torch.no_grad():
        plain = model(**inputs).logits
        with observe(model, entropy, modules="vision") as vision, observe(model, mass, modules="language") as text:
            watched = model(**inputs).logits
    assert torch.equal(plain, watched)
    assert not set(vision.layers) & set(text.layers)
    last = mass.results[text.layers[-1]][0]
    assert last.shape == (2, 4, length, 2)
    compare.assert_close(last.sum(-1), torch.ones(2, 4, length))
    assert last[:, :, -1, 1].min() > 0


# -- what goes wrong is said --


class _Bypass(nn.Module):
    """Attention that computes its softmax by hand, as a fused kernel would: nothing passes the seam."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = self.k_proj = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        scores = (self.q_proj(hidden_states) @ self.k_proj(hidden_states).mT).exp()
        return scores / scores.sum(-1, keepdim=True) @ hidden_states


def test_a_backend_that_bypasses_the_seam_is_an_error() -> None:
    model = nn.Sequential(_Bypass())
    with (
        pytest.raises(ObservationError, match=r"0 \(_Bypass\) ran without scaled_dot_product_attention"),
        observe(model, RowEntropy()),
    ):
        model(torch.randn(1, 3, 4))
    assert not model[0]._forward_hooks
    model(torch.randn(1, 3, 4))


def test_an_observation_of_nothing_is_an_error() -> None:
    model = language(LlamaConfig)
    with (
        pytest.raises(ObservationError, match="3 of 3 observed attention modules never ran"),
        observe(model, RowEntropy()),
    ):
        pass
    with pytest.raises(ObservationError, match="No reader"), observe(model, []):
        pass
    with (
        pytest.raises(ObservationError, match=r"modules='\*layers.7\*' fits no attention module .* It has: 3"),
        observe(model, RowEntropy(), modules="*layers.7*"),
    ):
        pass
    with pytest.raises(ObservationError, match="modules='vision'"), observe(model, RowEntropy(), modules="vision"):
        pass
    with (
        pytest.raises(ObservationError, match=r"modules=None.*It has: none|It has: none"),
        observe(nn.Linear(2, 2), RowEntropy()),
    ):
        pass


def test_named_modules_that_do_not_run_are_an_error_others_are_not() -> None:
    model = nn.ModuleList([language(LlamaConfig), language(Qwen2Config)])
    with observe(model, RowEntropy()) as seen:
        model[0](**prompts("none"))
    assert len(seen.calls) == 3
    with (
        pytest.raises(ObservationError, match=r"1 of 2 observed attention modules never ran, e\.g\. 1\.model"),
        observe(model, RowEntropy(), modules=["0.*layers.1.*", "1.*layers.2.*"]) as seen,
    ):
        model[0](**prompts("none"))
    assert seen.layers == ("0.model.layers.1.self_attn", "1.model.layers.2.self_attn")


# torch 2.11 itself uses a decorator of torch.jit that it has deprecated, where torch.compile is first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_a_compiled_model_is_refused() -> None:
    with (
        pytest.raises(ObservationError, match="compiled"),
        observe(cast(nn.Module, torch.compile(language(LlamaConfig))), RowEntropy()),
    ):
        pass


def test_errors_of_the_model_come_through_and_leave_nothing_behind() -> None:
    config = SiglipVisionConfig(**SMALL, image_size=28, patch_size=7, vision_use_head=False)
    model: Any = inject_sfa(SiglipVisionModel(config).eval())
    with pytest.raises(LayoutError, match="got 9 tokens"), observe(model, RowEntropy()):
        attention_modules(model).popitem()[1](torch.randn(1, 9, 32))
    assert torch._C._len_torch_function_stack() == 0
    with observe(model, RowEntropy()):
        model(torch.randn(1, 3, 28, 28))


def test_nan_in_the_weights_is_named_with_its_layer() -> None:
    model = language(LlamaConfig)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with (
        pytest.raises(ObservationError, match=r"model\.layers\.1\.self_attn: attention logits are NaN"),
        observe(model, RowEntropy()),
    ):
        model(**prompts("none"))
    assert torch._C._len_torch_function_stack() == 0


def test_a_reader_of_ones_own_gets_the_call_with_gradients() -> None:
    model, calls = language(LlamaConfig), []
    with observe(model, calls.append, modules="*layers.1.*"):
        model(**prompts("none"))
    (call,) = calls
    assert isinstance(call, AttentionCall)
    assert (call.layer, call.index, call.segment, call.past) == ("model.layers.1.self_attn", 0, 0, 0)
    assert (call.batch_size, call.num_heads, call.num_queries, call.num_keys) == (2, 4, 10, 10)
    call.logits(slice(3, 5)).masked_fill(call.logits(slice(3, 5)) < -1e20, 0.0).sum().backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[2].self_attn.q_proj.weight.grad is None


def test_no_matrix_of_attention_is_kept_or_made() -> None:
    """The largest tensor alive in a reader is a block, however long the sequence is."""
    model = language(LlamaConfig)
    sizes: list[int] = []

    class Spy(RowEntropy):
        def block(self, state: Any, call: AttentionCall, rows: Any) -> None:
            sizes.append(rows.logits.numel())
            super().block(state, call, rows)

    ids = torch.randint(3, 50, (1, 400))
    with torch.no_grad(), observe(model, [Spy(), TopKeys(5)], block_bytes=4 * 4 * 400 * 10):
        model(ids)
    gc.collect()
    assert max(sizes) == 4 * 400 * 10
    assert len(sizes) == 3 * 40
