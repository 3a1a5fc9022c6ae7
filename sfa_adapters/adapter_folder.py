"""Completes an adapter folder that PEFT has written: SFA in the model card, and no tensors of other adapters.

PEFT saves the configuration of an adapter after its weights and its model card. `SFAConfig.save_pretrained` calls this
then, so it runs last, for every adapter that PEFT saves.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from sfa_adapters.install import install_for_others
from sfa_adapters.state_keys import scalar_keys

__all__ = ["WEIGHTS_NAME", "complete_folder"]

WEIGHTS_NAME = "adapter_model.safetensors"

CARD_TITLE = "## A structural attention bias (SFA)"
CARD_TEXT = """This adapter adds learned numbers for rows, columns, distance and blocks of a page to the attention
logits of a vision tower. The library sfa-adapters registers it as a PEFT method:

    {install}

    from sfa_adapters import SFAConfig
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model, folder)
"""


def complete_folder(folder: Path) -> None:
    """Adds SFA and how to load it to the model card, and removes tensors of other adapters from the weights.

    Args:
        folder: Where PEFT has written; missing files are skipped.
    """
    card = folder / "README.md"
    if card.is_file() and CARD_TITLE not in (text := card.read_text(encoding="utf-8")):
        added = CARD_TEXT.format(install=install_for_others())
        card.write_text(f"{text.rstrip()}\n\n{CARD_TITLE}\n\n{added}", encoding="utf-8")
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        return
    tensors = load_file(weights)
    # PEFT before 0.21 writes every SFA adapter into each file; only those of other adapters still carry a name.
    foreign = [key for key, parts in scalar_keys(tensors).items() if parts.adapter is not None]
    if foreign:
        partial = folder / f"{WEIGHTS_NAME}.part"
        save_file({k: v for k, v in tensors.items() if k not in foreign}, partial, metadata={"format": "pt"})
        partial.replace(weights)
