"""`SFAEncoderAttention`: vLLM's attention layer of vision towers, with phi in further channels of q and k.

Importing this module needs vLLM; `sfa_adapters.serving.vllm` does it when vLLM loads its plug-ins.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
)
from vllm.config import (  # pyright: ignore[reportMissingImports]
    get_current_vllm_config,
    get_current_vllm_config_or_none,
)
from vllm.distributed import (  # pyright: ignore[reportMissingImports]
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import MMEncoderAttention  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.vision import get_vit_attn_backend  # pyright: ignore[reportMissingImports]
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version  # pyright: ignore[reportMissingImports]

from sfa_adapters.errors import ServingError, SFAError
from sfa_adapters.folded import HEAD_WIDTHS
from sfa_adapters.serving.engine_tower import EngineLayer, EngineTower
from sfa_adapters.serving.self_check import check_bias_acts
from sfa_adapters.serving.vllm_options import adapter_of, check_image_tokens, folder_of, logger, refuse
from sfa_adapters.serving.vllm_towers import KNOWN, TowerCall, call_of

__all__ = ["SFAEncoderAttention", "parents"]


class _Parents:
    """Which module holds which, recorded while models are built: a layer of vLLM does not know its tower.

    A model whose tower has none of these layers would be served without its bias, and no layer would tell. So the first
    forward of any module ends in an error if an adapter was named and nothing took it.
    """

    def __init__(self) -> None:
        self._holder: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
        self._handles: list[Any] = []
        self._folder: str | None = None
        self._asked = False  # whether the configuration of a model was read

    def watch(self) -> None:
        """Records from now on, in a hook that torch calls when a module gets a child."""
        if not self._handles:
            self._handles = [
                register_module_module_registration_hook(self._note),
                register_module_forward_pre_hook(self._begins),
            ]

    def stop(self) -> None:
        """Records no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._holder.clear()

    def _note(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            self._holder[child] = ref(parent)
        if not self._asked and (config := get_current_vllm_config_or_none()) is not None:
            self._folder, self._asked = folder_of(config), True
            try:
                check_image_tokens(config)
            except ServingError as error:
                raise refuse(error, "leave out image tokens") from error

    def _begins(self, module: nn.Module, args: Any) -> None:
        """Called at the first forward of any module, after the model was built."""
        if self._folder is not None and SFAEncoderAttention._served is None:
            raise refuse(
                ServingError(
                    f"The model has no MMEncoderAttention layer that could take the adapter {self._folder}: its tower "
                    "computes attention otherwise (--model-impl transformers does), or it has no tower."
                )
            )
        if self._asked and self._folder is None:
            self.stop()  # hooks of all modules cost time, and get in the way of compilation

    def above(self, module: nn.Module) -> list[nn.Module]:
        """The modules that hold a module, from the inside out."""
        holders: list[nn.Module] = []
        while (holder := self._holder.get(module)) is not None and (parent := holder()) is not None:
            holders.append(parent)
            module = parent
        return holders


parents = _Parents()


class _Served:
    """What one model of this process has: the adapter, its layers, and the tower once it is known."""

    def __init__(self, config: Any) -> None:
        self.config = ref(config)
        adapter = adapter_of(config)
        self.state = None if adapter is None else EngineTower(adapter)
        self.layers: dict[int, SFAEncoderAttention] = {}
        self.elsewhere: list[str] = []
        self.loaded: set[int] = set()

    def towers(self) -> dict[int, TowerCall | None]:
        """The tower above each layer; None where it is none that the plug-in knows."""
        found: dict[int, TowerCall | None] = {}
        for number, layer in self.layers.items():
            calls = (call_of(module) for module in parents.above(layer))
            found[number] = next((call for call in calls if call is not None), None)
        return found


class SFAEncoderAttention(MMEncoderAttention):
    """As vLLM's layer; with an adapter it adds phi to the logits of the vision tower's heads.

    Arguments are those of `MMEncoderAttention`.

    Raises:
        ServingError: The adapter cannot be served.
    """

    _served: ClassVar[_Served | None] = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float | None = None,
        num_kv_heads: int | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(num_heads, head_size, scale, num_kv_heads, prefix)
        self.sfa: EngineLayer | None = None
        self._versions: dict[int, Any] = {}
        config = get_current_vllm_config()
        if folder_of(config) is None:
            return
        try:
            self._take_adapter(config)
        except SFAError as error:
            raise refuse(error) from None

    def _take_adapter(self, config: Any) -> None:
        served = SFAEncoderAttention._served
        if served is None or served.config() is not config:
            served = SFAEncoderAttention._served = _Served(config)
        state = served.state
        assert state is not None
        index = _index(self.layer_name)
        if index in served.layers:
            raise ServingError(
                f"{self.layer_name} and {served.layers[index].layer_name} are both layer {index}: the model has more "
                "than one tower of these layers, and the adapter belongs to one of them."
            )
        if self.num_kv_heads != self.num_heads:
            raise ServingError(f"{self.layer_name} shares keys between heads (grouped queries), which has no bias.")
        if self.attn_backend.name == "FLASHINFER":
            raise ServingError("The FlashInfer backend of the encoder is not supported: --mm-encoder-attn-backend.")
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.sfa = EngineLayer(state, index, self.num_heads, rank, ranks)
        served.layers[index] = self
        # Kernels are chosen by width, and the configuration is at hand only now.
        for width in (width for width in HEAD_WIDTHS if width > self.head_size):
            if get_vit_attn_backend(head_size=width, dtype=self.dtype) == self.attn_backend:
                flash = self.is_flash_attn_backend
                self._versions[width] = get_flash_attn_version(head_size=width) if flash else None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """As vLLM's, called for each layer when all weights are there; behind the last one runs the self-check."""
        super().process_weights_after_loading(act_dtype)
        served = SFAEncoderAttention._served
        if self.sfa is None or served is None:
            return
        served.loaded.add(self.sfa.index)
        if served.loaded == set(served.layers):
            try:
                _begin(served)
            except SFAError as error:
                raise refuse(error) from None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As vLLM's: `[B, N, heads * width]` or `[B, N, heads, width]`, and the result likewise."""
        layer = self.sfa
        if layer is None or not layer.acts:
            return super().forward(query, key, value, cu_seqlens, *args, **kwargs)
        batch, tokens = query.shape[:2]
        shape, width = query.shape, self.head_size
        states = [x.reshape(batch, tokens, self.num_heads, width) for x in (query, key, value)]
        most = max(self._versions, default=0)
        wide = layer.widen(states[0], states[1], states[2], cu_seqlens, self.scale, most)
        if wide is None or wide[0].shape[-1] not in self._versions:
            return layer.attend(states[0], states[1], states[2], cu_seqlens, self.scale).reshape(shape)
        version = self._fa_version
        self.head_size, self._fa_version = wide[0].shape[-1], self._versions[wide[0].shape[-1]]
        try:
            out = super().forward(wide[0], wide[1], wide[2], cu_seqlens, *args, **kwargs)
        finally:
            self.head_size, self._fa_version = width, version
        return out[..., :width].reshape(shape)


def _index(prefix: str) -> int:
    """The number of a layer in its tower, the last one in its prefix: `visual.blocks.3.attn.attn`."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", prefix)
    if not numbers:
        raise ServingError(f"{prefix or 'An attention layer'} has no number in its prefix: which layer it is, is lost.")
    return int(numbers[-1])


def _begin(served: _Served) -> None:
    """Hooks the tower and checks that the bias acts; the model is complete."""
    state = served.state
    assert state is not None
    calls = served.towers()
    towers = {call.tower: call for call in calls.values() if call is not None}
    unknown = [number for number, call in calls.items() if call is None]
    if unknown or len(towers) != 1:
        names = [type(module).__name__ for module in parents.above(next(iter(served.layers.values())))]
        raise ServingError(
            f"The attention layers stand in {' in '.join(names) or 'nothing'}; none of them is a tower that this "
            f"plug-in knows: {', '.join(sorted(KNOWN))}."
        )
    call = next(iter(towers.values()))
    parents.stop()

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.see(args, kwargs, state)

    call.tower.register_forward_pre_hook(see, with_kwargs=True)
    image = call.random_image(state)
    logger.info("%s", check_bias_acts(state, set(served.layers), call.dtype, lambda: call.tower(**image)))
