"""SFA in a model that PEFT wraps for another method (LoRA): `save_pretrained` must write both.

PEFT writes the tensors of its own method. SFA was injected beside it, so its tensors would be lost, or be in the file
and never be loaded. `inject_sfa` therefore gives this one model a `save_pretrained` that also writes the folder `sfa/`;
`eject_sfa` takes it away. No class is changed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from sfa_adapters.saved import BESIDE, write_scalars
from sfa_adapters.tuner import SAVE_METHOD, injected_layers

__all__ = ["SaveBoth", "save_beside"]

logger = logging.getLogger(__name__)


def save_beside(model: nn.Module) -> None:
    """Makes the PEFT models of other methods in `model` save SFA as well."""
    for part in model.modules():
        if isinstance(part, PeftModel) and SAVE_METHOD not in part.__dict__ and injected_layers(part):
            part.__dict__[SAVE_METHOD] = SaveBoth(part)


class SaveBoth:
    """`save_pretrained` of one PEFT model; takes what PEFT's own takes.

    Args:
        model: A `PeftModel` whose method is not SFA.
    """

    belongs_to_sfa = True

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.notified = False

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves as PEFT does, then every SFA adapter in `sfa/`, or `sfa/NAME` where it is not called `default`."""
        written = type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        names = {name for _, _, layer in injected_layers(self.model) for name in layer.configs}
        for name in sorted(names):
            folder = Path(save_directory) / BESIDE
            if kwargs.get("is_main_process", True):
                folder = folder if name == "default" else folder / name
                write_scalars(self.model, folder, name, kwargs.get("state_dict"))
        if names and not self.notified:
            self.notified = True
            method = self.model.active_peft_config.peft_type
            method = getattr(method, "value", method)
            logger.warning(
                "%s holds the SFA adapter. PEFT's loader reads the %s adapter only; load both with: "
                "load_sfa(PeftModel.from_pretrained(base_model, folder), folder)",
                Path(save_directory) / BESIDE,
                method,
            )
        return written
