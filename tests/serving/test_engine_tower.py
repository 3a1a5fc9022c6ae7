"""Whole towers, with the attention of an engine in their layers: features equal to those of the injected model.

An engine's tower is played by that of transformers: each of its attention modules asks an `EngineLayer` for wider
heads, and `scaled_dot_product_attention` without a mask plays the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sfa_adapters import load_sfa
from sfa_adapters.errors import LayoutError, ServingError
from sfa_adapters.pixel_grids import pair
from sfa_adapters.recipes import qwen2_5_vl_7b
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.recipes.nano.served import wide_host, write_served
from sfa_adapters.serving.adapter import read_adapter
from sfa_adapters.serving.engine_tower import EngineLayer, EngineTower
from sfa_adapters.serving.self_check import check_bias_acts
from sfa_adapters.tower_search import find_tower

FAMILIES = ("internvl", "llava_onevision", "llava", "smolvlm", "qwen2_5_vl", "qwen3_vl", "glm_ocr", "paddleocr_vl")
GRIDS = [[1, 6, 10], [1, 4, 4]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes each host once."""
    written: dict[str, tuple[Path, Path]] = {}

    def write(family: str) -> tuple[Path, Path]:
        if family not in written:
            written[family] = write_served(family, tmp_path_factory.mktemp(family))
        return written[family]

    return write


def _host(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def _images(tower: nn.Module, grids: list[list[int]] | None = None) -> dict[str, Any]:
    """What a tower is called with: images, or patches with their grids."""
    config: Any = tower.config
    generator = torch.Generator().manual_seed(5)
    if not hasattr(config, "spatial_merge_size"):
        return {"pixel_values": torch.randn(2, 3, *pair(config.image_size), generator=generator)}
    grids = grids or GRIDS
    count = sum(t * h * w for t, h, w in grids)
    if type(tower).__name__ == "PaddleOCRVisionModel":
        pixels = torch.randn(1, count, 3, config.patch_size, config.patch_size, generator=generator)
        bounds = torch.tensor([0, *torch.tensor([h * w for _, h, w in grids]).cumsum(0).tolist()], dtype=torch.int32)
        return {"pixel_values": pixels, "cu_seqlens": bounds, "grid_thw": torch.tensor(grids)}
    width = 3 * config.temporal_patch_size * config.patch_size**2
    return {"hidden_states": torch.randn(count, width, generator=generator), "grid_thw": torch.tensor(grids)}


@contextmanager
def as_engine(
    tower: nn.Module, state: EngineTower, most: int = 256, seen: Callable[[], None] | None = None
) -> Iterator[None]:
    """Lets the attention modules of a tower run as an engine's, as long as it is open.

    Args:
        tower: The tower.
        state: Its state as an engine's tower.
        most: The largest head width of the engine's kernel.
        seen: Tells the state what the tower is given; by default it reads the arguments of the forward.
    """
    located = find_tower(tower)
    numbers = {module: number for number, (_, module) in enumerate(located.attentions)}
    heads = {n: state.adapter.heads[n] for n in state.adapter.layers}
    layers = {module: EngineLayer(state, n, heads.get(n, 4)) for module, n in numbers.items()}
    bounds: list[Tensor | None] = [None]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Of `[B, H, N, D]`; of a flat sequence all segments at once."""
        ends = [kwargs.get("cu_seq_lens_q", kwargs.get("cu_seqlens"))]
        cuts = ends[0] if ends[0] is not None else bounds[0]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        width, layer = query.shape[-1], layers[module]
        if layer.acts:
            wide = layer.widen(q, k, v, cuts, scaling, most)
            if wide is None:
                return layer.attend(q, k, v, cuts, scaling), None
            q, k, v = wide
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        stops = [0, query.shape[2]] if cuts is None else cuts.tolist()
        parts = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], scale=scaling)
            for a, b in itertools.pairwise(stops)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)[..., :width], None

    AttentionInterface.register("engine_flash", attention)  # the name makes transformers pass segments at once

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        grids = kwargs.get("grid_thw", kwargs.get("image_grid_thw"))
        if seen is not None:
            seen()
        elif grids is None:
            state.see_images(kwargs["pixel_values"].shape)
        else:
            state.see_grids(grids.tolist())

    handle = tower.register_forward_pre_hook(see, with_kwargs=True)
    config: Any = tower.config
    before = config._attn_implementation
    config._attn_implementation = "engine_flash"
    try:
        yield
    finally:
        config._attn_implementation = before
        handle.remove()


def _features(tower: nn.Module, images: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = tower(**images)
    return out if isinstance(out, Tensor) else out.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_injected_model(family: str, served: Any) -> None:
    host, adapter = served(family)
    # In double precision: in single, two orders of the same sums differ by 2e-5 in the largest of these towers.
    injected = find_tower(load_sfa(_host(host), adapter)).tower.double()
    tower = find_tower(_host(host)).tower.double()
    images = {k: v.double() if v.is_floating_point() else v for k, v in _images(tower).items()}
    expected, plain = _features(injected, images), _features(tower, images)
    state = EngineTower(read_adapter(adapter, host))
    for most in (256, 0):  # with wider heads, and by this library where those are too wide
        with as_engine(tower, state, most):
            got = _features(tower, images)
        assert (got - expected).norm() < 1e-6 * expected.norm()
    assert (plain - expected).norm() > 1e-4 * expected.norm()


def test_the_self_check(served: Any) -> None:
    host, adapter = served("internvl")
    tower, state = find_tower(_host(host)).tower, EngineTower(read_adapter(adapter, host))
    images = _images(tower)
    with as_engine(tower, state):
        line = check_bias_acts(state, {0, 1, 2}, torch.float32, lambda: tower(**images))
        assert "acts in 3 of 3 layers" in line
        assert state.mode == "bias"
        with pytest.raises(ServingError, match=r"layers \[2\], which the engine has not built"):
            check_bias_acts(state, {0, 1}, torch.float32, lambda: tower(**images))


def test_an_adapter_that_does_nothing_is_an_error(served: Any) -> None:
    host, adapter = served("qwen2_5_vl")
    tower, state = find_tower(_host(host)).tower, EngineTower(read_adapter(adapter, host))
    for weights in state.adapter.layers.values():
        for values in vars(weights).values():
            values.zero_()
    images = _images(tower)
    with as_engine(tower, state), pytest.raises(ServingError, match="changes nothing: a random image"):
        check_bias_acts(state, {0, 1, 2}, torch.float32, lambda: tower(**images))


def test_an_engine_that_drops_the_bias_is_an_error(served: Any) -> None:
    host, adapter = served("qwen2_5_vl")
    tower, state = find_tower(_host(host)).tower, EngineTower(read_adapter(adapter, host))
    images = _images(tower)
    with pytest.raises(ServingError, match=r"layers \[0, 1, 2\] ran without their bias"):
        check_bias_acts(state, {0, 1, 2}, torch.float32, lambda: tower(**images))


def test_a_kernel_that_is_wrong_for_wide_heads_is_an_error(served: Any) -> None:
    host, adapter = served("internvl")
    tower, state = find_tower(_host(host)).tower, EngineTower(read_adapter(adapter, host))
    images = _images(tower)
    with as_engine(tower, state):

        def encode() -> Any:
            out = tower(**images).last_hidden_state
            return out if state.mode == "off" else out * 1.5

        with pytest.raises(ServingError, match="wrong for wide heads"):
            check_bias_acts(state, {0, 1, 2}, torch.float32, encode)


def test_layers_without_a_forward_of_the_tower_are_refused(served: Any) -> None:
    host, adapter = served("internvl")
    state = EngineTower(read_adapter(adapter, host))
    states = torch.randn(1, 65, 4, 16)
    with pytest.raises(LayoutError, match="the tower itself was not called"):
        EngineLayer(state, 0, 4).widen(states, states, states, None, 0.25, 256)
    with pytest.raises(ServingError, match="takes no grids"):
        state.see_grids([[1, 4, 4]])


def test_the_wide_host_has_the_layers_of_the_whole_model() -> None:
    """Of the benchmark of servers; on the meta device, since its weights take 2.4 GB."""
    full: Any = qwen2_5_vl_7b.architecture()
    with torch.device("meta"):
        model: Any = wide_host()[0]
    config = model.config
    assert (config.vision_config.depth, config.vision_config.fullatt_block_indexes) == (4, [3])
    assert config.text_config.num_hidden_layers == 2
    for part, names in (
        ("vision_config", ("hidden_size", "intermediate_size", "num_heads", "window_size", "out_hidden_size")),
        ("text_config", ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")),
    ):
        for name in names:
            assert getattr(getattr(config, part), name) == getattr(getattr(full, part), name), name
    assert model.get_input_embeddings().weight.shape == (
        build_host("qwen2_5_vl")[0].config.text_config.vocab_size,
        3584,
    )
