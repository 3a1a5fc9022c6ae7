"""Makes a `PeftModel` of another method (LoRA) save and load the SFA that was injected into it as well.

PEFT writes and reads only the tensors of its own method, so those of SFA would be lost, or saved and never loaded.
`inject_sfa` therefore gives this one object a `save_pretrained` that also writes the folder `sfa/`, and a
`load_adapter` that also reads it (trainers resume with it); `eject_sfa` removes both. No class is changed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from sfa_adapters.compat import resume_skips_outer_adapter
from sfa_adapters.saved import folder_beside, read_scalars, write_scalars
from sfa_adapters.state_fit import fit_scalars, sfa_configs
from sfa_adapters.state_record import check_same_meaning
from sfa_adapters.tuner import METHODS, injected_layers

__all__ = ["LoadBoth", "SaveBoth", "cover_both"]

logger = logging.getLogger(__name__)


def cover_both(model: nn.Module) -> None:
    """Makes the PEFT models of other methods in `model` save and load SFA as well."""
    for part in model.modules():
        if isinstance(part, PeftModel) and not METHODS & part.__dict__.keys() and injected_layers(part):
            part.__dict__.update(save_pretrained=SaveBoth(part), load_adapter=LoadBoth(part))


def _names(model: nn.Module) -> list[str]:
    return sorted({name for _, _, layer in injected_layers(model) for name in layer.configs})


class SaveBoth:
    """`save_pretrained` of one PEFT model, for both adapters; takes the arguments of PEFT's.

    Args:
        model: A `PeftModel` whose method is not SFA.
    """

    belongs_to_sfa = True

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.notified = False

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves as PEFT does, then each SFA adapter in `sfa/`, or in `sfa-NAME/` if its name is not `default`."""
        written = type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        names = _names(self.model)
        for name in names if kwargs.get("is_main_process", True) else []:
            write_scalars(self.model, folder_beside(save_directory, name), name, kwargs.get("state_dict"))
        if names and not self.notified:
            self.notified = True
            method = self.model.active_peft_config.peft_type
            logger.warning(
                "%s holds the SFA adapter. PEFT's loader reads the %s adapter only; load both with: "
                "load_sfa(PeftModel.from_pretrained(base_model, folder), folder)",
                folder_beside(save_directory, names[0]),
                getattr(method, "value", method),
            )
        return written


class LoadBoth:
    """`load_adapter` of one PEFT model, for both adapters; takes the arguments of PEFT's.

    Args:
        model: A `PeftModel` whose method is not SFA, with SFA in it.
    """

    belongs_to_sfa = True

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Loads as PEFT does, then the values of the SFA adapters that the model has and the folder holds.

        A trainer that resumes treats every folder in a checkpoint as an adapter of PEFT's method, and loads `sfa/` too;
        then only the values of SFA are loaded, and with them PEFT's adapter beside that folder where the trainer would
        leave it out.

        Raises:
            AdapterMismatchError: The SFA adapter in the folder belongs to another tower.
            WeightsError: It cannot be read.
        """
        names = _names(self.model)
        for name in names:
            if Path(model_id) == folder_beside(Path(model_id).parent, name):
                if resume_skips_outer_adapter():
                    self._load_outer(Path(model_id).parent)
                return self._load(name, Path(model_id))
        loaded = type(self.model).load_adapter(self.model, model_id, adapter_name, *args, **kwargs)
        for name in names:
            if folder_beside(model_id, name).is_dir():
                self._load(name, folder_beside(model_id, name))
        return loaded

    def _load_outer(self, folder: Path) -> None:
        """PEFT writes the adapter `default` into the folder itself, and every other one into a folder of its name."""
        if any((folder / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            trains = self.model.active_adapter == "default"
            type(self.model).load_adapter(self.model, str(folder), "default", is_trainable=trains)

    def _load(self, name: str, folder: Path) -> None:
        saved = read_scalars(folder)
        fitted = fit_scalars(self.model, saved.tensors, name, saved.keys, saved.source)
        check_same_meaning({name: saved.config}, sfa_configs(self.model), saved.source)
        sfa_configs(self.model)[name].init_warmup_done = saved.config.init_warmup_done
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for key, value in fitted.items():
                parameters[key].copy_(value)
