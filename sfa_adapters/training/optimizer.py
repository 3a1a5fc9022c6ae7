"""Parameter groups, schedule and sampling order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, Sampler

from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.hosts.recipe import Recipe

if TYPE_CHECKING:
    from sfa_adapters.hosts.load import Host

__all__ = ["EpochOrder", "Repeated", "accumulation", "build_optimizer", "parameter_groups", "total_steps"]


def parameter_groups(host: Host) -> list[dict[str, Any]]:
    """The parameters that train, grouped by part of the host, with the learning rate of the part.

    Matrices get the weight decay; vectors (norms, biases) and structural scalars do not.

    Args:
        host: A prepared host.

    Returns:
        Groups for an optimizer, with `name` for logs.

    Raises:
        RecipeError: Nothing trains.
    """
    recipe = host.recipe
    rates = {
        "vision": recipe.vision_lr or recipe.lr,
        "projector": recipe.projector_lr or recipe.lr,
        "llm": recipe.llm_lr or recipe.lr,
        "lora": recipe.llm_lr or recipe.lr,
        "sfa": recipe.sfa_lr,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in host.model.named_parameters():
        if parameter.requires_grad:
            part = host.places.part_of(name)
            groups.setdefault((part, parameter.ndim > 1 and part != "sfa"), []).append(parameter)
    if not groups:
        raise RecipeError(
            "Nothing trains: every part is frozen and nothing is added. Turn on sfa, lora_llm, or a part "
            "(freeze_vision=false)."
        )
    return [
        {
            "name": part if decays or part == "sfa" else f"{part} (no decay)",
            "params": groups[part, decays],
            "lr": rates[part],
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for part, decays in sorted(groups, key=lambda key: (list(rates).index(key[0]), not key[1]))
    ]


def build_optimizer(host: Host) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; fused where all parameters are on GPUs, which needs no temporary copies.

    Args:
        host: A prepared host.

    Raises:
        RecipeError: Nothing trains.
    """
    groups = parameter_groups(host)
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=fused or None)


def accumulation(recipe: Recipe, processes: int) -> int:
    """Gradient accumulation steps: `batch_size / (micro_batch * processes)`.

    Args:
        recipe: The recipe.
        processes: Number of processes.

    Raises:
        RecipeError: That is not a whole number.
    """
    together = recipe.micro_batch * processes
    if recipe.batch_size % together:
        raise RecipeError(
            f"batch_size={recipe.batch_size} must be a multiple of micro_batch x processes = {recipe.micro_batch} x "
            f"{processes} = {together}."
        )
    return recipe.batch_size // together


def total_steps(recipe: Recipe, rows: int | None) -> int:
    """Optimizer steps of a run; each epoch has whole batches only.

    Args:
        recipe: The recipe.
        rows: Training rows; None for a stream.

    Raises:
        RecipeError: There are fewer rows than one batch, or a stream has no `max_steps`.
    """
    if rows is None:
        if recipe.max_steps is None:
            raise RecipeError("max_steps=None must be a number with streaming=true: a stream has no known length.")
        return recipe.max_steps
    if rows < recipe.batch_size:
        raise RecipeError(
            f"{rows} training rows are fewer than batch_size={recipe.batch_size}; make the batch smaller."
        )
    return recipe.max_steps or math.ceil(recipe.epochs * (rows // recipe.batch_size))


class EpochOrder(Sampler[int]):
    """All rows in a random order that depends on seed and epoch only, cut to whole batches.

    Args:
        rows: The training rows.
        batch_size: Rows of one optimizer step, over all processes.
        seed: Of the order.
    """

    def __init__(self, rows: Sized, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = rows, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the next epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        yield from torch.randperm(len(self.rows), generator=generator)[: len(self)].tolist()


class Repeated(IterableDataset[Any]):
    """A stream that starts over at its end, as the next epoch, so that a run may be longer than one pass.

    Args:
        rows: The stream.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        for epoch in itertools.count():
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            example = None
            for example in self.rows:
                yield example
            if example is None:
                raise DataError("The stream of training rows is empty.")
