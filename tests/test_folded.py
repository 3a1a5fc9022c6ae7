"""Phi folded into q and k: how wide q, k and v become. That the result is exact: `test_attention`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters import StructuralBias, TokenLayout, folded
from sfa_adapters.choices import TERMS
from sfa_adapters.folded import folded_attention, native_width
from tests.support.compare import assert_close

HEADS, WIDTH = 2, 8


def states(tokens: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, tokens, WIDTH, device=device).unbind(0)
    return query, key, value


@pytest.mark.parametrize(("width", "native"), [(1, 32), (32, 32), (65, 96), (128, 128), (200, 256), (257, 264)])
def test_native_widths(width: int, native: int) -> None:
    assert native_width(width) == native


@pytest.mark.parametrize("narrow", [False, True])
def test_values_are_padded_unless_a_kernel_takes_them_narrow(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout.regular(6, 5, 1)
    query, key, value = states(31)
    bias = StructuralBias(HEADS, init_std=1.0, terms=TERMS).factors(layout)
    expected = F.scaled_dot_product_attention(query, key, value, bias.dense())
    widths: list[tuple[int, int]] = []
    original = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *rest: object, **options: object) -> Tensor:
        widths.append((query.shape[-1], value.shape[-1]))
        return original(query, key, value, *rest, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    if narrow:
        monkeypatch.setattr(folded, "_takes_narrow_values", lambda *_: True)
    assert_close(folded_attention(query, key, value, bias), expected, what="outputs")
    assert widths == [(32, 8 if narrow else 32)]  # 8 + 5 + 4 + prefix + block, rounded up


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "side", "narrow"), [("float32", 6, True), ("bfloat16", 6, False)])
def test_on_cuda_only_what_flash_takes_is_padded(
    dtype: str, side: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = TokenLayout.regular(side, side, device="cuda")
    query, key, value = (part.to(getattr(torch, dtype)) for part in states(side * side, "cuda"))
    answers: list[bool] = []
    original = folded._takes_narrow_values

    def watched(*arguments: object) -> bool:
        answers.append(original(*arguments))  # pyright: ignore[reportArgumentType]
        return answers[-1]

    monkeypatch.setattr(folded, "_takes_narrow_values", watched)
    bias = StructuralBias(HEADS, init_std=1.0, device="cuda").factors(layout)
    out = folded_attention(query, key, value, bias)
    expected = F.scaled_dot_product_attention(query, key, value, bias.dense().to(query.dtype))
    torch.testing.assert_close(out, expected, atol=2e-2 if dtype == "bfloat16" else 1e-5, rtol=1e-2)
    assert answers == [narrow]
