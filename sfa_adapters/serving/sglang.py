"""Plug-in for SGLang, found by the entry points `sglang.srt.plugins`: serves a model with a structural bias.

    SFA_ADAPTER=FOLDER python -m sglang.launch_server --model-path MODEL

SGLang lets plug-ins wrap functions of its own (`HookRegistry`). Three are wrapped: the constructor of
`VisionAttention`, which tells the layers of the tower and their heads; the forward of its attention backends, where phi
goes into further channels of q and k; and the forward of the tower, which tells the grids and runs the self-check at
its first call.

Unlike vLLM, SGLang starts although a plug-in of it has failed. So whatever is wrong is raised again in each forward of
the tower: no image is answered without its bias.

Read in SGLang 0.5.23. The tests play its side: it needs a GPU, and none was at hand.
"""

from __future__ import annotations

import inspect
import os
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
TOWERS = ("qwen2_vl.Qwen2VisionTransformer", "qwen2_5_vl.Qwen2_5_VisionTransformer", "qwen3_vl.Qwen3VLMoeVisionModel")
MOST = 256  # channels of a head that its flash kernels take


def register() -> None:
    """The entry point; does nothing unless `SFA_ADAPTER` names an adapter.

    Raises:
        ServingError: It names none.
    """
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        return
    from sglang.srt.plugins.hook_registry import (  # pyright: ignore[reportMissingImports]
        HookRegistry,
        HookType,
    )

    plugin = SGLangPlugin(folder, _served_model)
    for target, hook in plugin.hooks().items():
        HookRegistry.register(target, hook, HookType.AROUND)


def _served_model() -> str:
    from sglang.srt.server_args import get_global_server_args  # pyright: ignore[reportMissingImports]

    return str(get_global_server_args().model_path)


class SGLangPlugin:
    """The hooks of one process, and what they know.

    Args:
        folder: Of the adapter.
        model: Tells the folder or hub id of the model that is served, once it is known.

    Attributes:
        state: State of the tower; None until its first layer is built.
        layers: The layer of each attention backend object.
        error: What went wrong while the tower was built.
    """

    def __init__(self, folder: str, model: Callable[[], str]) -> None:
        self.folder, self.model = folder, model
        self.state: EngineTower | None = None
        self.layers: dict[int, EngineLayer] = {}
        self.error: SFAError | None = None
        self._checked = False
        self._built: list[nn.Module] = []
        adapter_folder(folder)

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """Each hooked function of SGLang, and the hook around it: `(original, *arguments)`."""
        hooks: dict[str, Callable[..., Any]] = {f"{VISION}.VisionAttention.__init__": self.build}
        hooks |= {f"{VISION}.{name}.forward": self.attend for name in BACKENDS}
        return hooks | {f"sglang.srt.models.{name}.forward": self.encode for name in TOWERS}

    def build(self, original: Callable[..., None], module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Around the constructor of `VisionAttention`: the layers of a tower are built in order."""
        original(module, *args, **kwargs)
        try:
            if self.state is None:
                self.state = EngineTower(read_adapter(self.folder, self.model()))
            built: Any = module
            backend = type(built.qkv_backend).__name__
            if backend not in BACKENDS:
                raise ServingError(f"The attention backend {backend} is not supported: --mm-attention-backend fa3.")
            rank, ranks = int(built.tp_rank), int(built.tp_size)
            heads = int(built.num_attention_heads_per_partition)
            layer = EngineLayer(self.state, len(self._built), heads, rank, ranks)
            self.layers[id(built.qkv_backend)] = layer
            self._built.append(built.qkv_backend)  # kept, so that no other object gets its id
        except SFAError as error:
            self.error = error
            raise

    def attend(self, original: Callable[..., Tensor], backend: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around the forward of an attention backend, of `[tokens, heads, width]`."""
        layer = self.layers.get(id(backend))
        if layer is None or not layer.acts:
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
        if not self._checked:
            patches = given.get("x", next((x for x in args if isinstance(x, Tensor)), None))
            assert isinstance(patches, Tensor)
            noise = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0)).to(patches)
            state.see_grids(grids.tolist())
            built = set(range(len(self._built)))
            line = check_bias_acts(state, built, patches.dtype, lambda: original(tower, noise, grids))
            _logger().info("%s", line)
            self._checked = True
        state.see_grids(grids.tolist())
        return original(tower, *args, **kwargs)


def _logger() -> Any:
    import logging

    return logging.getLogger("sglang.sfa_adapters")
