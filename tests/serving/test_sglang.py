"""The hooks for SGLang, with its side played: layers that call a backend as `VisionAttention` of SGLang 0.5.23 does."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForImageTextToText

from sfa_adapters import load_sfa
from sfa_adapters.errors import ServingError
from sfa_adapters.recipes.nano.served import write_served
from sfa_adapters.serving.sglang import BACKENDS, TOWERS, SGLangPlugin, register
from sfa_adapters.tower_search import find_tower

GRIDS = torch.tensor([[1, 6, 10], [1, 4, 4]])


class VisionSdpaAttention(nn.Module):
    """As SGLang's: it knows its head size, and its kernel takes the width for the scale unless it is told one."""

    def __init__(self, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, head_size

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bsz: int, cu_seqlens: Tensor | None = None, attention_mask: Any = None,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        q, k, v = (x.reshape(bsz, -1, self.num_heads, self.head_size).transpose(1, 2) for x in (q, k, v))
        assert cu_seqlens is not None
        parts = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], scale=kwargs["softmax_scale"])
            for a, b in itertools.pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, dim=2).transpose(1, 2).reshape(-1, self.num_heads, self.head_size)


class VisionAttention(nn.Module):
    tp_rank, tp_size = 0, 1

    def __init__(self, heads: int, width: int, kind: type = VisionSdpaAttention) -> None:
        super().__init__()
        self.num_attention_heads_per_partition = heads
        self.qkv_backend = kind(heads, width)


class Tower(nn.Module):
    """The tower of transformers with its attention computed by backends as above."""

    def __init__(self, inner: Any, attend: Any, layers: list[VisionAttention]) -> None:
        super().__init__()
        self.inner = inner
        self.layers = nn.ModuleList(layers)
        backends = [layer.qkv_backend for layer in layers]
        numbers = {module: n for n, (_, module) in enumerate(find_tower(inner).attentions)}

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kw: Any
        ) -> tuple[Tensor, None]:
            backend = backends[numbers[module]]
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            bounds = kw["cu_seq_lens_q"]
            call = {"q": q, "k": k, "v": v, "bsz": 1, "seq_len": len(q), "cu_seqlens": bounds, "attention_mask": None}
            call |= {"forward_metadata": None, "softmax_scale": scaling, "window_size": (-1, -1), "s_aux": None}
            return attend(type(backend).forward, backend, **call).unsqueeze(0), None

        AttentionInterface.register("sglang_flash", attention)
        inner.config._attn_implementation = "sglang_flash"

    def forward(self, x: Tensor, grid_thw: Tensor) -> Tensor:
        return self.inner(hidden_states=x, grid_thw=grid_thw).last_hidden_state


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_served("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


def _inner(host: Path) -> Any:
    model: Any = AutoModelForImageTextToText.from_pretrained(host, dtype=torch.float32).eval()
    return find_tower(model).tower


def _build(plugin: SGLangPlugin, count: int = 3) -> list[VisionAttention]:
    layers = [VisionAttention.__new__(VisionAttention) for _ in range(count)]
    for layer in layers:
        plugin.build(VisionAttention.__init__, layer, 4, 16)
    return layers


def _patches() -> Tensor:
    return torch.randn(76, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(3))


def test_features_are_those_of_the_injected_model(written: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    host, adapter = written
    plugin = SGLangPlugin(str(adapter), lambda: str(host))
    tower = Tower(_inner(host), plugin.attend, _build(plugin))
    model: Any = load_sfa(AutoModelForImageTextToText.from_pretrained(host, dtype=torch.float32).eval(), adapter)
    with torch.no_grad(), caplog.at_level("INFO", logger="sglang.sfa_adapters"):
        expected = find_tower(model).tower(hidden_states=_patches(), grid_thw=GRIDS).last_hidden_state
        got = plugin.encode(Tower.forward, tower, _patches(), grid_thw=GRIDS)
        plain = Tower(_inner(host), lambda f, b, **call: f(b, **call), _plain())(_patches(), GRIDS)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert (plain - expected).norm() > 1e-4 * expected.norm()
    assert "acts in 3 of 3 layers" in caplog.text


def _plain() -> list[VisionAttention]:
    return [VisionAttention(4, 16) for _ in range(3)]


def test_a_tower_that_was_built_without_its_bias_answers_nothing(written: tuple[Path, Path], tmp_path: Path) -> None:
    host, adapter = written
    plugin = SGLangPlugin(str(adapter), lambda: str(tmp_path))  # no model there
    with pytest.raises(ServingError, match="cannot be read"):
        _build(plugin, 1)
    tower = Tower(_inner(host), plugin.attend, [])
    with pytest.raises(ServingError, match="The bias is not there: The configuration of"):
        plugin.encode(Tower.forward, tower, _patches(), GRIDS)
    late = SGLangPlugin(str(adapter), lambda: str(host))
    with pytest.raises(ServingError, match="no layer of the tower was seen"):
        late.encode(Tower.forward, tower, _patches(), GRIDS)


def test_layers_that_are_missing_are_an_error(written: tuple[Path, Path]) -> None:
    host, adapter = written
    plugin = SGLangPlugin(str(adapter), lambda: str(host))
    tower = Tower(_inner(host), plugin.attend, _build(plugin, 2))
    with pytest.raises(ServingError, match=r"layers \[2\], which the engine has not built"):
        plugin.encode(Tower.forward, tower, _patches(), GRIDS)


def test_layers_are_numbered_by_their_place_in_the_tower(written: tuple[Path, Path]) -> None:
    """Some models of SGLang build layers that they replace, and then build the tower."""
    host, adapter = written
    plugin = SGLangPlugin(str(adapter), lambda: str(host))
    replaced = _build(plugin, 4)
    layers = _build(plugin)[::-1]
    tower = Tower(_inner(host), plugin.attend, layers)
    model: Any = load_sfa(AutoModelForImageTextToText.from_pretrained(host, dtype=torch.float32).eval(), adapter)
    with torch.no_grad():
        expected = find_tower(model).tower(hidden_states=_patches(), grid_thw=GRIDS).last_hidden_state
        got = plugin.encode(Tower.forward, tower, _patches(), grid_thw=GRIDS)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    states = {name: torch.zeros(4, 4, 16) for name in ("q", "k", "v")}
    with pytest.raises(ServingError, match=r"outside the towers that can be served with a bias: .*Qwen3VLMoe"):
        plugin.attend(VisionSdpaAttention.forward, replaced[0].qkv_backend, **states, bsz=1)


def test_the_entry_point_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang logs an exception of a plug-in, and would serve the model without its bias."""
    registry = SimpleNamespace(HookRegistry=None, HookType=None)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", registry)  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("SFA_ADAPTER", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"SFA: the server is not started.*nowhere is no folder"):
        register()


def test_a_release_without_what_is_hooked_ends_the_process(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = SimpleNamespace(HookRegistry=None, HookType=None)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", registry)  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("SFA_ADAPTER", str(written[1]))
    monkeypatch.setattr(SGLangPlugin, "hooks", lambda _: {"sglang.srt.models.no_longer_there.Tower.forward": None})
    with pytest.raises(SystemExit, match=r"SFA: the server is not started.*No module named 'sglang"):
        register()


def test_what_is_refused(written: tuple[Path, Path], tmp_path: Path) -> None:
    host, adapter = written

    class VisionFlashInferAttention(VisionSdpaAttention):
        pass

    plugin = SGLangPlugin(str(adapter), lambda: str(host))
    layer = VisionAttention.__new__(VisionAttention)
    with pytest.raises(ServingError, match="VisionFlashInferAttention is not supported"):
        plugin.build(VisionAttention.__init__, layer, 4, 16, VisionFlashInferAttention)
    with pytest.raises(ServingError, match="is no folder"):
        SGLangPlugin(str(tmp_path / "nowhere"), lambda: "")


def test_what_is_hooked(written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    targets = SGLangPlugin(str(written[1]), lambda: "").hooks()
    assert len(targets) == 1 + len(BACKENDS) + len(TOWERS)
    assert all(target.startswith("sglang.srt.") for target in targets)
    monkeypatch.delenv("SFA_ADAPTER", raising=False)
    register()  # without SGLang: off
