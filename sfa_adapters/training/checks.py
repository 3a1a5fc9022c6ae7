"""Checks while a run trains: labels, gradients, NaN. A failed check stops the run and says why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sfa_adapters.errors import TrainingError
from sfa_adapters.files import whole_folder

if TYPE_CHECKING:
    from sfa_adapters.hosts.load import Host

__all__ = ["GradientCheck", "check_labels", "save_batch"]

SHOWN = 8  # names in an error


def check_labels(batch: Mapping[str, Any], image_token: int | None, ids: Sequence[str] = ()) -> None:
    """Checks that the loss is on the answers and on nothing else.

    Args:
        batch: A batch of the collator, with `input_ids` and `labels` `[B, L]`.
        image_token: Placeholder id of an image token; None where there is none.
        ids: Ids of the rows, for the error.

    Raises:
        TrainingError: A row has no answer token, or a token of the prompt, the image or the padding has a label.
    """
    labels, tokens = batch.get("labels"), batch.get("input_ids")
    if labels is None or tokens is None or labels.shape != tokens.shape:
        raise TrainingError(f"A batch needs input_ids and labels of one shape; there are {sorted(batch)}.")
    counts = labels != -100
    attended = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(counts)
    places = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    last = torch.where(attended, places, -1).amax(1)
    first = torch.where(counts, places, labels.shape[1]).amin(1)
    pieces = counts == ((places >= first[:, None]) & (places <= last[:, None]))
    for row in range(len(labels)):
        name = f"row {ids[row]!r}" if row < len(ids) else f"row {row} of the batch"
        if not bool(counts[row].any()):
            problem = "has no answer token: every label is -100, so it teaches nothing"
        elif image_token is not None and bool((counts[row] & (tokens[row] == image_token)).any()):
            problem = "has labels on image tokens"
        elif bool((counts[row] & ~attended[row]).any()):
            problem = "has labels on padding"
        elif bool((counts[row] & (labels[row] != tokens[row])).any()):
            problem = "has labels that are not its own tokens"
        elif int(first[row]) <= int(torch.where(attended[row], places[row], labels.shape[1]).amin()):
            problem = "has a label on its first token: the prompt is not masked"
        elif not bool(pieces[row].all()) or _image_behind(tokens[row], image_token, int(first[row])):
            problem = "has labels before the answer: the answer must be one piece at the end"
        else:
            continue
        raise TrainingError(f"The loss is not on the answers alone: {name} {problem}. Look at the collator.")


def _image_behind(tokens: Tensor, image_token: int | None, first: int) -> bool:
    return image_token is not None and bool((tokens[first:] == image_token).any())


class GradientCheck:
    """Checks gradients between the last backward pass of a step and the clipping of gradients.

    In the first step every tensor that trains must have a gradient that is finite and not zero. The first matrix of a
    LoRA has none while the second is zero, as it starts, and is checked once it is not. The bias of keys may have a
    gradient of zero: the same vector added to all keys moves no softmax. In later steps the norm of all gradients must
    be finite.

    Args:
        host: A prepared host.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.parameters = {name: p for name, p in host.model.named_parameters() if p.requires_grad}
        self.waiting = set(self.parameters)
        self.overflows = 0

    def __call__(self, step: int, scaled: bool = False) -> None:
        """Runs the check.

        Args:
            step: Number of the coming optimizer step, from 1.
            scaled: Whether gradients are scaled up (float16) and may overflow now and then; such a step is skipped.

        Raises:
            TrainingError: A gradient is missing, zero, NaN or infinite; names the tensors and possible reasons.
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not bool(norm.isfinite()):
            if scaled and self.overflows < 20:
                self.overflows += 1
                return
            bad = [name for name, gradient in gradients.items() if not bool(_local(gradient).isfinite().all())]
            raise TrainingError(
                f"Step {step}: gradients are NaN or infinite in {_listed(bad or list(gradients))}. Lower the learning "
                "rate, look at the saved batch, or train in float32 (dtype=float32)."
            )
        self.overflows = 0
        if self.waiting:
            self._first(gradients, step)

    def _first(self, gradients: Mapping[str, Tensor], step: int) -> None:
        missing = sorted(self.waiting - set(gradients))
        expected_names = {name for name in self.waiting & set(gradients) if not name.endswith("k_proj.bias")}
        zero = sorted(name for name in expected_names if not bool(_any(gradients[name])))
        excused = {name for name in zero if self._excused(name)}
        zero = [name for name in zero if name not in excused]
        if missing or zero:
            problem = (
                f"get no gradient at all: {_listed(missing)}" if missing else f"get a gradient of zero: {_listed(zero)}"
            )
            raise TrainingError(
                f"Step {step}: {len(missing) or len(zero)} of {len(self.parameters)} tensors that should train "
                f"{problem}. {self._why(missing or zero)}"
            )
        self.waiting = excused

    def _excused(self, name: str) -> bool:
        partner = self.parameters.get(name.replace("lora_A", "lora_B"))
        return "lora_A" in name and partner is not None and not bool(_any(partner.detach()))

    def _why(self, names: Sequence[str]) -> str:
        parts = {self.host.places.part_of(name) for name in names}
        if parts == set(map(self.host.places.part_of, self.parameters)):
            return (
                "That is every part: the loss does not depend on them, or gradients are cut off (torch.no_grad, "
                "reentrant checkpointing)."
            )
        reasons = {
            "vision": "the host does not read these layers (vision_feature_layer), or checkpointing cuts gradients off "
            "before the tower",
            "sfa": "the bias is in layers that the host does not read, or its terms see only one row or column",
            "projector": "no image of the batch goes through them",
            "llm": "no token of the batch goes through them",
            "lora": "no token of the batch goes through them, or the adapter is not active",
        }
        listed = "; ".join(f"{part}: {reasons[part]}" for part in sorted(parts))
        return f"Why it may be: {listed}. Freeze them, or repair what cuts them off."


def save_batch(folder: Path, batch: Mapping[str, Any], ids: Sequence[str], **details: Any) -> Path:
    """Writes the tensors of a batch and the ids of its rows, for a look at what went wrong.

    Args:
        folder: The folder to write.
        batch: The batch.
        ids: Ids of its rows.
        details: Further entries of `rows.json`.

    Returns:
        The folder.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in batch.items() if isinstance(value, Tensor)}
    with whole_folder(folder) as partial:
        save_file(tensors, partial / "batch.safetensors", metadata={"format": "pt"})
        text = json.dumps({"rows": list(ids), **details}, indent=1, ensure_ascii=False)
        (partial / "rows.json").write_text(text + "\n", encoding="utf-8")
    return folder


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _any(tensor: Tensor) -> Tensor:
    """Whether any entry is not zero, over all shards."""
    largest = tensor.abs().amax()
    return (largest.full_tensor() if isinstance(largest, DTensor) else largest) > 0


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
