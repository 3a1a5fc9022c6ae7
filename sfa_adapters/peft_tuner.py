"""`SFAModel`: SFA as a PEFT method, for `get_peft_model(model, SFAConfig())` and the methods of a `PeftModel`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn

from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import AdapterMismatchError, InjectionError, MergeError
from sfa_adapters.layer import SFALayer
from sfa_adapters.peft_type import SFA_PEFT_TYPE
from sfa_adapters.state_fit import fit_scalars, watch_state_dicts
from sfa_adapters.state_keys import PEFT_PREFIX, match_paths, scalar_keys
from sfa_adapters.tower import TowerState
from sfa_adapters.tuner import (
    add_adapter,
    all_or_nothing,
    detach_all,
    injected_layers,
    plan_injection,
    prepare_tower,
    wrap_targets,
)

__all__ = ["SFAModel"]


class SFAModel(BaseTuner):
    """The PEFT tuner: `get_peft_model(model, SFAConfig())` builds it."""

    prefix: str = "sfa_"
    tuner_layer_cls = SFALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - declared so by PEFT

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds an adapter to the tower of a model; on any error the model is left unchanged.

        Args:
            model: The model.
            adapter_name: Name of the adapter.
            *args: As PEFT passes them.
            state_dict: The scalars that will be loaded; where given, they determine which layers get a bias.
            **kwargs: As PEFT passes them.

        Raises:
            SFAError: As `sfa_adapters.tuner.plan_injection`; or `state_dict` does not fit the tower.
        """
        config = copy.deepcopy(self.peft_config[adapter_name])  # the fields filled in below belong to this model
        assert isinstance(config, SFAConfig)
        from_file = config.tower is not None or state_dict is not None
        if state_dict is not None:
            config.layers_to_transform = _layers_of(model, config, state_dict)
        self._plan = plan_injection(model, config, adapter_name)
        self._state: TowerState | None = None
        before = {name: other for _, _, layer in injected_layers(model) for name, other in layer.configs.items()}
        given = self.peft_config[adapter_name]
        try:
            with all_or_nothing(model, adapter_name):
                self._state = prepare_tower(self._plan)
                self._plan = wrap_targets(model, self._plan)
                config.tower = self._plan.signature()
                config.tower_path = self._plan.tower_path
                self.peft_config[adapter_name] = config
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self.peft_config[adapter_name] = given
            raise
        finally:
            del self._plan, self._state
        watch_state_dicts(model)
        # Adapters of `inject_sfa` become PEFT's, which would otherwise mix their tensors into the file of this one.
        self.peft_config.update({name: other for name, other in before.items() if name not in self.peft_config})
        for _, _, layer in injected_layers(model):
            layer.saved_by_peft = True
            if from_file:
                layer.unloaded.update({adapter_name} & layer.configs.keys())

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        # A regular expression, because PEFT shortens long lists of names to suffixes, which text towers may share.
        peft_config.target_modules = "|".join(re.escape(name) for _, name, _ in self._plan.targets)  # pyright: ignore[reportAttributeAccessIssue]
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        return re.fullmatch(peft_config.target_modules, key)  # pyright: ignore[reportAttributeAccessIssue]

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: SFAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        index = next(number for number, name, _ in self._plan.targets if name == current_key)
        assert self._state is not None
        layer = add_adapter(target, index, current_key, self._plan, self._state, peft_config, adapter_name)
        layer.set_adapter(self.active_adapters)

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Maps keys of a file that another kind of model may have saved to those of this one; PEFT 0.21 and later."""
        keys = {key: parts for key, parts in scalar_keys(state_dict).items() if parts.adapter in (None, adapter_name)}
        try:
            fitted = fit_scalars(model, state_dict, adapter_name, keys, "The adapter file")
        except AdapterMismatchError:
            waiting = any(adapter_name in layer.unloaded for _, _, layer in injected_layers(model))
            if waiting:
                detach_all(model, adapter_name)
            raise
        return {**{key: value for key, value in state_dict.items() if key not in keys}, **fitted}

    # -- what SFA cannot do --------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        raise MergeError(
            "A structural bias adds to the attention scores of pairs of tokens; no change of q, k or v weights does "
            "that, so it cannot be merged. Keep the adapter attached, or call unload() to get the base model back."
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a structural bias cannot be merged into weights.

        Raises:
            MergeError: Always.
        """
        self._check_merge_allowed()

    def unmerge_adapter(self) -> None:
        """Refused: a structural bias is never merged.

        Raises:
            MergeError: Always.
        """
        raise MergeError("A structural bias is never merged into weights, so there is nothing to unmerge.")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: active adapters already add up.

        Raises:
            MergeError: Always.
        """
        raise MergeError(
            "SFA adapters are not combined into a new one. Adapters that are active together add up: call "
            "set_adapter([...]) on the base_model, with all their names."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise InjectionError(
                f"adapter_names={kwargs['adapter_names']}: SFA applies its active adapters to the whole batch; it "
                "cannot take another one for each sample. Call set_adapter(...), and run one batch per adapter."
            )
        yield

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        detach_all(self.model)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


def _layers_of(model: nn.Module, config: SFAConfig, state_dict: dict[str, Tensor]) -> list[int]:
    """Which attention layers of the tower a state dict has scalars for."""
    plan = plan_injection(model, copy.deepcopy(config))
    saved = sorted({key.path for key in scalar_keys(state_dict).values()})
    every = {name: index for index, name, _ in plan.targets}
    if len(saved) == len(every):
        return sorted(every[path] for path in match_paths(saved, sorted(every), "The state dict").values())
    # The file has some of the layers only, so its paths must be those of the model.
    named = [path.removeprefix(PEFT_PREFIX) for path in saved]
    if not named or not set(named) <= set(every):
        match_paths(saved, sorted(every), "The state dict")
    return sorted(every[path] for path in named)


register_peft_method(name="sfa", config_cls=SFAConfig, model_cls=SFAModel)
assert SFA_PEFT_TYPE == "SFA"
