"""The lazy mask: accepted wherever a tensor mask is, it records that it was used, and its cache keeps a budget."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters import SFAAttention, SFAConfig, StructuralBias, TokenLayout, attend, inject_sfa
from sfa_adapters.attention import Backend
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import InjectionError
from sfa_adapters.mask import SegmentedMask, StructuralMask
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.reference import softmax_attention
from tests.support.towers import CASES

LAYOUT = TokenLayout.regular(3, 4, 1)


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor, StructuralBias]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 13, 8).unbind(0)
    return query, key, value, StructuralBias(2, init_std=1.0, terms=TERMS)


def test_sdpa_asks_the_mask_by_position_and_by_keyword(parts):
    query, key, value, bias = parts
    expected = attend(query, key, value, bias.factors(LAYOUT))
    for call in (
        lambda mask: F.scaled_dot_product_attention(query, key, value, mask),
        lambda mask: F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
        lambda mask: F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask, dropout_p=0.0),
        lambda mask: F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=8**-0.5),
    ):
        mask = StructuralMask(bias.factors(LAYOUT))
        assert not mask.used
        assert torch.equal(call(mask), expected)
        assert mask.used


def test_eager_attention_adds_the_mask(parts):
    query, key, value, bias = parts
    scores = query @ key.transpose(-2, -1) * 8**-0.5
    for add in (lambda mask: scores + mask, lambda mask: mask + scores, lambda mask: torch.add(scores, mask)):
        mask = StructuralMask(bias.factors(LAYOUT))
        biased = add(mask)
        assert mask.used
        compare.assert_close(biased, scores + bias(LAYOUT))
    expected = softmax_attention(query.double(), key.double(), value.double(), bias(LAYOUT).double())
    compare.assert_close(((scores + StructuralMask(bias.factors(LAYOUT))).softmax(-1) @ value).double(), expected)


def test_looking_at_a_mask_is_not_using_it(parts):
    mask = StructuralMask(parts[3].factors(LAYOUT))
    assert mask.shape == (1, 2, 13, 13)
    assert (mask.size(-1), mask.dim(), mask.ndim, mask.dtype) == (13, 4, 4, torch.float32)
    assert mask.contiguous() is mask
    assert mask.to(torch.bfloat16) is mask
    assert not mask.used


@pytest.mark.parametrize("backend", ["dense", "folded", "auto"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_models_own_mask_is_kept(parts, kind: str, backend: Any):
    query, key, value, bias = parts
    allowed = torch.rand(2, 1, 13, 13) < 0.7
    allowed[..., 0] = True
    model_mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    expected = softmax_attention(query.double(), key.double(), value.double(), bias(LAYOUT).double(), allowed)
    mask: Any = StructuralMask(bias.factors(LAYOUT), model_mask, backend)
    fused = F.scaled_dot_product_attention(query, key, value, mask)
    compare.assert_close(fused.double(), expected)
    scores = query @ key.transpose(-2, -1) * 8**-0.5 + StructuralMask(bias.factors(LAYOUT), model_mask, backend)
    compare.assert_close((scores.softmax(-1) @ value).double(), expected)


def test_grouped_keys_are_repeated(parts):
    _, key, value, _ = parts
    query, bias = torch.randn(2, 4, 13, 8), StructuralBias(4, init_std=1.0, terms=TERMS)
    mask: Any = StructuralMask(bias.factors(LAYOUT))
    out = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    expected = attend(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), bias.factors(LAYOUT))
    assert torch.equal(out, expected)


def test_segments_are_served_in_order_and_all_must_be(parts):
    query, key, value, bias = parts
    layouts = [TokenLayout.regular(3, 4, 1), TokenLayout.regular(2, 2)]
    mask: Any = SegmentedMask([bias.factors(layout) for layout in layouts])
    first = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert not mask.used
    short = [states[:, :, :4] for states in (query, key, value)]
    second = F.scaled_dot_product_attention(short[0], short[1], short[2], attn_mask=mask)
    assert mask.used
    assert torch.equal(first, attend(query, key, value, bias.factors(layouts[0])))
    assert torch.equal(second, attend(short[0], short[1], short[2], bias.factors(layouts[1])))


@pytest.mark.parametrize("backend", ["dense", "folded", "auto"])
def test_attention_layer(backend):
    torch.manual_seed(0)
    layer = SFAAttention(32, num_heads=4, grid=(3, 4), prefix_tokens=1, backend=backend, init_std=1.0, terms=TERMS)
    states = torch.randn(2, 13, 32, requires_grad=True)
    out = layer(states)
    query, key, value = (t.unflatten(-1, (4, 8)).transpose(1, 2).double() for t in layer.qkv(states).chunk(3, -1))
    expected = softmax_attention(query, key, value, layer.structural_bias(LAYOUT).double()).transpose(1, 2).flatten(2)
    compare.assert_close(out.double(), F.linear(expected, layer.proj.weight.double(), layer.proj.bias.double()))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    other = layer(states[:, :5], layout=TokenLayout.regular(2, 2, 1))
    assert other.shape == (2, 5, 32)


# -- the cache of dense masks ---------------------------------------------------------------------------------------


def cached(tower: torch.nn.Module) -> list[bool]:
    return [layer._dense is not None for _, _, layer in injected_layers(tower)]


@pytest.mark.parametrize(("megabytes", "kept"), [(0, False), (256, True), (1e-4, False)])
def test_the_budget_decides_what_is_kept(megabytes: float, kept: bool):
    case = CASES[0]
    tower, inputs = case.fresh()
    inject_sfa(tower, SFAConfig(backend="dense", mask_cache_mb=megabytes))
    compare.read(case, tower, inputs)
    assert cached(tower) == [kept] * 3


def test_nothing_is_kept_with_gradients_or_by_folding():
    case = CASES[0]
    tower, inputs = compare.injected(case, backend="dense")
    case.hidden(tower, inputs)
    assert cached(tower) == [False] * 3
    folded, _ = compare.injected(case, backend="folded")
    compare.read(case, folded, inputs)
    assert cached(folded) == [False] * 3


def test_the_default_budget_says_no_to_internvit():
    """24 layers of 16 heads at 1025 tokens would take 1.6 GB in fp32."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(image_size=448, patch_size=14, attention_bias=True)
    with torch.device("meta"):
        tower = InternVLVisionModel(config)
    for megabytes, allowed in ((SFAConfig().mask_cache_mb, False), (1700.0, True)):
        inject_sfa(tower, SFAConfig(mask_cache_mb=megabytes), adapter_name=f"budget{megabytes:g}")
        for _, _, layer in injected_layers(tower):
            assert (layer.cache_bytes[f"budget{megabytes:g}"] >= 16 * 1025**2 * 4) is allowed


@pytest.mark.parametrize("backend", ["auto", "dense", "folded"])
@pytest.mark.parametrize("given", [False, True])
def test_sfa_attention_compiles_into_one_graph(backend: Backend, given: bool) -> None:
    torch.manual_seed(0)
    layer = SFAAttention(32, num_heads=4, grid=(3, 4), prefix_tokens=1, backend=backend, init_std=1.0, terms=TERMS)
    layout = TokenLayout.regular(4, 3, 1) if given else None
    results = []
    for program in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        tokens = torch.linspace(-1, 1, 2 * 13 * 32).reshape(2, 13, 32).requires_grad_()
        layer.zero_grad()
        out = program(tokens, layout)
        out.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        assert gradients.keys() == dict(layer.named_parameters()).keys()
        results.append({"out": out.detach(), "tokens": tokens.grad, **gradients})
    eager, compiled = results
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_block_without_a_scalar_is_refused_in_a_compiled_layer_too() -> None:
    layer = SFAAttention(32, num_heads=4, grid=(2, 2), block_grid=(1, 1), terms=TERMS)
    layout = TokenLayout.regular(2, 2)  # 16 blocks
    for program in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with pytest.raises(Exception, match=r"block id 15|index|out of (range|bounds)"):
            program(torch.zeros(1, 4, 32), layout)


@pytest.mark.parametrize("backend", ["nonsense", None, ["dense"], 1])
def test_a_backend_that_is_none_is_named(backend: Any) -> None:
    tokens = torch.zeros(1, 4, 4, 8)
    bias = StructuralBias(4).factors(TokenLayout.regular(2, 2))
    for factors in (bias, None):
        with pytest.raises(InjectionError, match=r"must be one of \['auto', 'dense', .*, 'lines', 'triton'\]"):
            attend(tokens, tokens, tokens, factors, backend=backend)
    with pytest.raises(InjectionError, match=r"must be one of \['auto', 'dense', .*, 'lines', 'triton'\]"):
        SFAAttention(32, num_heads=4, backend=backend)
    with pytest.raises(InjectionError, match=r"must be one of \['auto', 'dense', .*, 'lines', 'triton'\]"):
        SFAConfig(backend=backend)
