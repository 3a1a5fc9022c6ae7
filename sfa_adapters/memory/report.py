"""`MemoryPlan`: a prediction of the memory on each GPU, to print, to compare and to act on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.shapes import Lengths

__all__ = ["DeviceMemory", "MemoryPlan"]


@dataclass(frozen=True)
class DeviceMemory:
    """What one GPU holds at the worst moment of a step, in bytes.

    Attributes:
        device: Its name, e.g. `GPU 0`.
        holds: Which parts of the host are on it.
        weights: Weights of host and adapters.
        gradients: Gradients, and the buckets in which processes exchange them.
        optimizer: The moments of AdamW.
        activations: What the backward pass needs, at its largest.
        workspace: CUDA's own, unpacked 4-bit matrices, and gathered shards.
    """

    device: str
    holds: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True)
class MemoryPlan:
    """The predicted memory of a run on each GPU.

    Attributes:
        recipe: The recipe, with the requested batch and tiles.
        devices: One entry for each GPU.
        memory: Of each GPU, in bytes.
        lengths: Tokens of the longest question, and how many of them may have a label.
        savings: Changes that make it fit, each with the bytes of the fullest GPU; empty where it fits.
    """

    recipe: Recipe
    devices: tuple[DeviceMemory, ...]
    memory: float
    lengths: Lengths
    savings: tuple[tuple[str, int], ...] = field(default=())

    @property
    def peak(self) -> int:
        """Bytes of the fullest GPU."""
        return max(device.total for device in self.devices)

    @property
    def fits(self) -> bool:
        """Whether every GPU is large enough."""
        return self.peak <= self.memory

    @property
    def advice(self) -> str:
        """In one line: whether it fits, by how much, and what would make it fit."""
        fullest = max(self.devices, key=lambda device: device.total)
        name, plan = self.recipe.name, self.recipe.plan
        if self.fits:
            left = _gigabytes(self.memory - self.peak)
            return f"{name} fits with plan={plan}: {fullest.device} needs {_gigabytes(self.peak)}, {left} are left."
        over = f"{name} does not fit with plan={plan}: {fullest.device} needs {_gigabytes(self.peak)} of "
        over += f"{_gigabytes(self.memory)}, {_gigabytes(self.peak - self.memory)} too much. "
        if not self.savings:
            return over + "No setting saves it: use larger GPUs, or a smaller host."
        ways = " or ".join(f"{change} ({_gigabytes(needed)})" for change, needed in self.savings)
        return f"{over}What saves it: {ways}."

    def table(self) -> Table:
        """One line for each GPU, in GB (10^9 bytes)."""
        recipe, lengths = self.recipe, self.lengths
        scored = f"logits of up to {lengths.answer:,}" if recipe.answer_logits else "logits of all"
        table = Table(
            title=f"{recipe.name}, plan {recipe.plan}, {recipe.micro_batch} x {lengths.sequence:,} tokens, {scored}, GB"
        )
        for column in ("GPU", "holds"):
            table.add_column(column)
        for column in ("weights", "grads", "AdamW", "activ.", "CUDA", "all"):
            table.add_column(column, justify="right")
        for d in self.devices:
            parts = (d.weights, d.gradients, d.optimizer, d.activations, d.workspace, d.total)
            table.add_row(d.device, d.holds, *(f"{part / 1e9:.1f}" for part in parts))
        # Where it does not fit, an error follows that says what to do.
        table.caption = self.advice if self.fits else f"Too much for {_gigabytes(self.memory)}."
        return table

    def as_dict(self) -> dict[str, Any]:
        """The prediction for JSON; sizes in bytes."""
        return {
            "recipe": self.recipe.name,
            "plan": self.recipe.plan,
            "micro_batch": self.recipe.micro_batch,
            "answer_logits": self.recipe.answer_logits,
            "lengths": {**asdict(self.lengths), "sequence": self.lengths.sequence},
            "memory": self.memory,
            "fits": self.fits,
            "advice": self.advice,
            "devices": [{**asdict(device), "total": device.total} for device in self.devices],
            "savings": [{"change": change, "needs": needed} for change, needed in self.savings],
        }


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
