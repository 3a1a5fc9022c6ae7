"""`ScalarLayer`: holds the structural scalars of one attention layer: as PEFT needs it, in casts, in state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sfa_adapters.axial import start_values
from sfa_adapters.bias import TERMS, StructuralWeights, parameter_shapes
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import WeightsError
from sfa_adapters.scalars import ScalarDict, keeping_float32
from sfa_adapters.state_record import check_same_meaning, read_record, write_record

__all__ = ["ScalarLayer"]


class ScalarLayer(nn.Module, BaseTunerLayer):
    """The structural scalars of one attention layer, for any number of named adapters.

    Args:
        num_heads: Heads of the attention layer.
        index: Number of the layer in its tower.
        name: Path of the attention module in the model.
    """

    adapter_layer_names = tuple(f"sfa_{term}" for term in TERMS)
    other_param_names = ()

    def __init__(self, num_heads: int, index: int, name: str) -> None:
        super().__init__()
        self.num_heads, self.index, self.name = num_heads, index, name
        self.configs: dict[str, SFAConfig] = {}
        self.cache_bytes: dict[str, float] = {}
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, ScalarDict())
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self.device = torch.device("cpu")
        # Adapters whose values are still to be loaded; a forward before that is an error.
        self.unloaded: set[str] = set()

    def update_layer(self, adapter_name: str, config: SFAConfig, num_layers: int, device: torch.device) -> None:
        """Adds newly initialised float32 scalars of one adapter; other adapters stay active.

        Args:
            adapter_name: Name of the adapter.
            config: Its configuration.
            num_layers: Layers that share its `mask_cache_mb`.
            device: Device of the scalars.
        """
        assert config.num_blocks is not None
        self.device = device
        shapes = parameter_shapes(self.num_heads, config.num_blocks, config.terms)
        # With a warm-up the chosen scalars start at zero, and `AxialRamp` raises them.
        strength = 0.0 if config.init_warmup_steps else config.init_strength
        heads = config.strong_heads(self.index, self.num_heads)
        for term, values in start_values(shapes, config.init_std, heads, strength, device).items():
            getattr(self, f"sfa_{term}")[adapter_name] = nn.Parameter(values)
        self.configs[adapter_name] = config
        self.cache_bytes[adapter_name] = config.mask_cache_mb * 2**20 / max(num_layers, 1)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes one adapter from the layer; if no other was active, the first remaining one becomes active."""
        if adapter_name in self.active_adapters:  # chosen here, because PEFT warns once per layer when it chooses
            others = [name for name in self.configs if name != adapter_name]
            active = [name for name in self.active_adapters if name != adapter_name]
            self.set_adapter(active or others[:1])
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self.cache_bytes.pop(adapter_name, None)
        self.unloaded.discard(adapter_name)

    @property
    def active(self) -> list[str]:
        """Names of the adapters that are active in this layer."""
        return [] if self._disable_adapters else [name for name in self.active_adapters if name in self.configs]

    @property
    def trains(self) -> bool:
        """Whether an active adapter of this layer has trainable scalars."""
        return any(tensor.requires_grad for name in self.active for tensor in self.tensors(name).values())

    def weights(self, adapter_name: str, device: torch.device | None = None) -> StructuralWeights:
        """The scalars of one adapter, on `device` if one is given.

        Raises:
            WeightsError: The adapter was made to be loaded from a file, and its values were not loaded.
        """
        values = [getattr(self, attribute)(adapter_name) for attribute in self.adapter_layer_names]
        if adapter_name in self.unloaded or any(v is not None and v.is_meta for v in values):
            raise WeightsError(
                f"{self.name}: the configuration of SFA adapter {adapter_name!r} was read from a folder, but its "
                "scalars were never loaded. Load them (load_sfa, PeftModel.from_pretrained, "
                "set_peft_model_state_dict); to train anew instead, use a fresh SFAConfig()."
            )
        return StructuralWeights(*(v if v is None or device is None else v.to(device) for v in values))

    def tensors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by attribute (`sfa_row`, ...)."""
        parts = {attribute: getattr(self, attribute) for attribute in self.adapter_layer_names}
        return {attribute: part[adapter_name] for attribute, part in parts.items() if adapter_name in part}

    # -- what PEFT requires of every layer of an adapter ---------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: a bias stays beside the weights when an adapter of another method (LoRA) merges into them.

        A merge of SFA itself is refused by the tuner (`SFAModel.merge_adapter`).
        """

    def unmerge(self) -> None:
        """Does nothing: a bias is never merged."""

    def get_base_layer(self) -> nn.Module:
        """This layer itself: it stands beside the attention's layers and wraps none."""
        return self

    @property
    def weight(self) -> NoReturn:
        """Always missing: the property of PEFT's base class would recurse, because this layer wraps none."""
        raise AttributeError("SFALayer has no weight of its own")

    @property
    def bias(self) -> NoReturn:
        """Always missing, as `weight`."""
        raise AttributeError("SFALayer has no bias of its own")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for attribute, parameter in self.tensors(adapter_name).items():
            if not parameter.is_meta:
                moved = parameter.to(device or self.device)
                getattr(self, attribute)[adapter_name] = nn.Parameter(moved.detach(), parameter.requires_grad)

    # -- casts, state dicts --------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = [p for name, config in self.configs.items() if config.keep_float32 for p in self.tensors(name).values()]
        kept += [parameter.grad for parameter in kept if parameter.grad is not None]
        super()._apply(keeping_float32(fn, kept), recurse)
        self.device = next((p.device for p in self.parameters() if not p.is_meta), self.device)
        return self

    def get_extra_state(self) -> Tensor:
        """The configurations, for the state dict; see `sfa_adapters.state_record`."""
        return write_record(self.configs)

    def set_extra_state(self, state: Tensor) -> None:
        """Checks that the configurations in a state dict have the same blocks and terms as those here.

        The warm-up steps taken (`AxialRamp`) are loaded with the scalars; no other option is.

        Raises:
            AdapterMismatchError: They differ.
            WeightsError: `state` was not written by `get_extra_state`.
        """
        saved = read_record(state, self.name)
        check_same_meaning(saved, self.configs, self.name)
        for name in saved.keys() & self.configs.keys():
            self.configs[name].init_warmup_done = saved[name].init_warmup_done

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        record = f"{prefix}_extra_state"
        if record in missing_keys:  # state dicts that were saved before there was a record
            missing_keys.remove(record)
        for name in self.configs:
            if all(f"{prefix}{attribute}.{name}" in state_dict for attribute in self.tensors(name)):
                self.unloaded.discard(name)
