"""Plug-in for SGLang, found by the entry points `sglang.srt.plugins`: serves a model with a structural bias.

    SFA_ADAPTER=FOLDER python -m sglang.launch_server --model-path MODEL

SGLang lets plug-ins wrap functions of its own (`HookRegistry`). Three are wrapped: the constructor of
`VisionAttention`, which reads the adapter and refuses what cannot be served; the forward of its attention backends,
where phi goes into further channels of q and k; and the forward of the tower, which numbers its layers, tells the grids
and runs the self-check at its first call.

Unlike vLLM, SGLang starts although a plug-in of it has failed. So a wrong adapter ends the process, and whatever is
wrong later is raised again in each forward of the tower: no image is answered without its bias.

Made for SGLang 0.5.23. Its servers need a GPU; its towers are tested on a CPU (`scripts/test-sglang`).
"""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import ServingError, SFAError
from sfa_adapters.serving.adapter import adapter_folder, read_adapter
from sfa_adapters.serving.engine_tower import EngineLayer, EngineTower
from sfa_adapters.serving.self_check import check_bias_acts
from sfa_adapters.serving.vllm_options import ENVIRONMENT

__all__ = ["SGLangPlugin", "register"]

VISION = "sglang.srt.layers.attention.vision"
# Backends of its attention whose forward takes wider heads. Those left out (FlashInfer's cuDNN, CUDA graphs) are given
# offsets into buffers in place of segments.
BACKENDS = ("VisionSdpaAttention", "VisionTritonAttention", "VisionFlash3Attention", "VisionFlash4Attention")
# Towers that take patches of all images behind one another, with their grids.
TOWERS = (
    "qwen2_vl.Qwen2VisionTransformer",
    "qwen2_5_vl.Qwen2_5_VisionTransformer",
    "qwen3_vl.Qwen3VLMoeVisionModel",
)
MOST = 256  # channels of a head that its flash kernels take


def register() -> None:
    """The entry point; does nothing unless `SFA_ADAPTER` names an adapter.

    Raises:
        SystemExit: It names none, or SGLang has not what is hooked. An exception would not do: SGLang logs that of a
            plug-in, and serves the model without it.
    """
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        return
    from sglang.srt.plugins.hook_registry import (  # pyright: ignore[reportMissingImports]
        HookRegistry,
        HookType,
    )

    try:
        plugin = SGLangPlugin(folder, _served_model)
        hooks = plugin.hooks()
        for target in hooks:
            pkgutil.resolve_name(target)
    except (SFAError, ImportError, AttributeError) as error:
        raise SystemExit(f"SFA: the server is not started, since it would answer without the bias. {error}") from error
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def _served_model() -> str:
    from sglang.srt.runtime_context import get_server_args  # pyright: ignore[reportMissingImports]

    return str(get_server_args().model_path)


class SGLangPlugin:
    """The hooks of one process, and what they know.

    Args:
        folder: Of the adapter.
        model: Tells the folder or hub id of the model that is served, once it is known.

    Attributes:
        state: State of the tower; None until an attention layer is built.
        layers: The layer of each attention backend object; empty until the tower is called.
        error: What went wrong while the tower was built.
    """

    def __init__(self, folder: str, model: Callable[[], str]) -> None:
        self.folder, self.model = folder, model
        self.state: EngineTower | None = None
        self.layers: dict[int, EngineLayer] = {}
        self.error: SFAError | None = None
        self._tower: nn.Module | None = None  # the one whose layers are numbered
        adapter_folder(folder)

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """Each hooked function of SGLang, and the hook around it: `(original, *arguments)`."""
        hooks: dict[str, Callable[..., Any]] = {f"{VISION}.VisionAttention.__init__": self.build}
        hooks |= {f"{VISION}.{name}.forward": self.attend for name in BACKENDS}
        return hooks | {f"sglang.srt.models.{name}.forward": self.encode for name in TOWERS}

    def build(self, original: Callable[..., None], module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Around the constructor of `VisionAttention`: reads the adapter, and refuses what cannot be served.

        Raises:
            ServingError: The adapter does not fit the model, or the attention backend is none of `BACKENDS`.
        """
        original(module, *args, **kwargs)
        try:
            if self.state is None:
                self.state = EngineTower(read_adapter(self.folder, self.model()))
            built: Any = module
            backend = type(built.qkv_backend).__name__
            if backend not in BACKENDS:
                raise ServingError(f"The attention backend {backend} is not supported: --mm-attention-backend fa3.")
        except SFAError as error:
            self.error = error
            raise

    def attend(self, original: Callable[..., Tensor], backend: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around the forward of an attention backend, of `[tokens, heads, width]`.

        Raises:
            ServingError: It is of a tower that is none of `TOWERS`, or is called with what has no bias.
        """
        layer = self.layers.get(id(backend))
        if layer is None:
            names = ", ".join(name.rpartition(".")[2] for name in TOWERS)
            raise ServingError(f"An attention layer ran outside the towers that can be served with a bias: {names}.")
        if not layer.acts:
            return original(backend, *args, **kwargs)
        given = inspect.signature(type(backend).forward).bind(backend, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        del given[next(iter(given))]  # the backend itself
        states = [given.pop(name).unsqueeze(0) for name in ("q", "k", "v")]
        width = states[0].shape[-1]
        if given.get("attention_mask") is not None or given.get("s_aux") is not None:
            raise ServingError("The attention layer was given a mask or sinks beside its segments; that has no bias.")
        bounds = given.get("cu_seqlens")
        metadata = given.get("forward_metadata")
        bounds = metadata.cu_seqlens if metadata is not None else bounds
        if not isinstance(bounds, Tensor):
            raise ServingError("The attention layer was called without the bounds of its segments (CUDA graphs?).")
        scale = given.get("softmax_scale") or width**-0.5
        wide = layer.widen(states[0], states[1], states[2], bounds, scale, MOST)
        if wide is None:
            return layer.attend(states[0], states[1], states[2], bounds, scale)[0]
        query, key, value = (x[0] for x in wide)
        given["softmax_scale"] = scale  # by default kernels take the width for it
        before = getattr(backend, "head_size", None)
        try:
            if before is not None:
                backend.head_size = query.shape[-1]
            return original(backend, query, key, value, **given)[..., :width].contiguous()
        finally:
            if before is not None:
                backend.head_size = before

    def encode(self, original: Callable[..., Any], tower: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Around the forward of the tower: tells its grids, and checks at the first call that the bias acts.

        Raises:
            ServingError: It does not, or an earlier error keeps it from acting.
        """
        if self.error is not None or self.state is None:
            raise ServingError(f"The bias is not there: {self.error or 'no layer of the tower was seen'}")
        given = inspect.signature(type(tower).forward).bind(tower, *args, **kwargs).arguments
        grids = given.get("grid_thw")
        if grids is None:
            raise ServingError(f"{type(tower).__name__} was called without the grids of its images.")
        state = self.state
        if self._tower is not tower:
            self._number(tower, state)
            patches = given.get("x", next((x for x in args if isinstance(x, Tensor)), None))
            assert isinstance(patches, Tensor)
            noise = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0)).to(patches)
            state.see_grids(grids.tolist())
            built = set(range(len(self.layers)))
            line = check_bias_acts(state, built, patches.dtype, lambda: original(tower, noise, grids))
            _logger().info("%s", line)
            self._tower = tower
        state.see_grids(grids.tolist())
        return original(tower, *args, **kwargs)

    def _number(self, tower: nn.Module, state: EngineTower) -> None:
        """Numbers the layers of a tower by their order in it. Some models of SGLang build layers that they replace."""
        self.layers = {}
        attentions: list[Any] = [module for module in tower.modules() if hasattr(module, "qkv_backend")]
        for number, module in enumerate(attentions):
            heads, rank, ranks = module.num_attention_heads_per_partition, module.tp_rank, module.tp_size
            layer = EngineLayer(state, number, int(heads), int(rank), int(ranks))
            self.layers[id(module.qkv_backend)] = layer  # lives as long as the tower, which is kept


def _logger() -> Any:
    import logging

    return logging.getLogger("sglang.sfa_adapters")
