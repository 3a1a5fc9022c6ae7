"""DINOv2-small in two parts: lower layers that run once per picture, and the last layers with prediction heads.

The last layers carry the adapter of the arm:

    none         nothing
    sfa          the structural bias of this library, by `inject_sfa`
    bitfit       the biases (vectors) of the layers train, their matrices do not (Ben Zaken et al., ACL 2022)
    lora         rank 1 on q and k (Hu et al., ICLR 2022), by PEFT: the smallest LoRA that there is

With `places: shuffled` the tokens enter the last layers in another order, the same for all pictures, and are put back
after them. Without SFA this changes nothing: attention is independent of the order, and the position embeddings are in
the features already. With SFA each token gets the row and column of another one: a placebo.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.errors import DataError
from sfa_adapters.heads import calibrate_axial
from sfa_adapters.heads.axial_heads import By
from sfa_adapters.recipes.studies.dinov2 import dinov2_tower
from sfa_adapters.recipes.studies.lookup_pictures import Split
from sfa_adapters.recipes.studies.pretrained_pictures import GRID, KINDS, SIDE, Pictures, Task, draw_pictures

__all__ = ["ADAPTERS", "TOP", "Encoded", "TableReader", "encoded", "strong_heads"]

TOP = 3  # layers with an adapter, which train with `layers: trained`
ADAPTERS = ("none", "sfa", "bitfit", "lora")
CHUNK = 50  # pictures per batch; always the same ones, so that features are the same in every run
PAGES = 16  # pictures that the heads of the axial start are chosen on


class Encoded:
    """Pictures after the lower layers.

    Args:
        features: Output of the last frozen layer, `[count, 1 + 64, 384]`.
        pictures: Their targets; pixels are dropped.
    """

    def __init__(self, features: Tensor, pictures: Sequence[Pictures]) -> None:
        self.features = features
        self.headers = torch.cat([part.headers for part in pictures])
        self.content = torch.cat([part.content for part in pictures])

    def __len__(self) -> int:
        return len(self.features)


@cache
def _parts() -> tuple[nn.Module, nn.Module]:
    """The lower layers with embeddings, and the last ones with the final norm."""
    lower: Any = dinov2_tower().requires_grad_(False)
    upper: Any = copy.deepcopy(lower)
    layers = len(lower.encoder.layer)
    lower.encoder.layer = lower.encoder.layer[: layers - TOP]
    lower.layernorm = nn.Identity()
    upper.encoder.layer = upper.encoder.layer[layers - TOP :]
    upper.config.num_hidden_layers = TOP
    upper.embeddings = _Given(upper.config.patch_size)
    return lower.eval(), upper.eval()


class _Given(nn.Module):
    """Replaces the embeddings of the last layers; its output is that of the lower layers."""

    def __init__(self, patch_size: Any) -> None:
        super().__init__()
        self.patch_size = patch_size  # SFA reads the grid from it and from the size of the (blank) images
        self.features: Tensor | None = None

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        assert self.features is not None
        return self.features


@cache
def encoded(task: Task, split: Split, seed: int, count: int) -> Encoded:
    """Draws pictures and runs them through the lower layers, once per process.

    Args:
        task: Kind of pictures.
        split: Their split.
        seed: Their seed.
        count: Number of pictures.
    """
    lower, parts, features = _parts()[0], [], []
    with torch.no_grad():
        for start in range(0, count, CHUNK):
            part = draw_pictures(task, split, range(start, min(start + CHUNK, count)), seed)
            features.append(lower(part.pixels).last_hidden_state)
            parts.append(Pictures(part.pixels[:0], part.headers, part.content))
    return Encoded(torch.cat(features), parts)


@cache
def strong_heads(task: Task, seed: int, by: By = "affinity") -> dict[int, dict[str, list[int]]]:
    """Row and column heads of the last layers, chosen by `calibrate_axial` on a few pictures in the whole tower.

    Args:
        task: Kind of pictures.
        seed: Their seed.
        by: As in `calibrate_axial`.
    """
    tower = dinov2_tower()
    total = len(tower.encoder.layer)
    pages = draw_pictures(task, "train", range(PAGES), seed).pixels
    chosen = calibrate_axial(tower, pages, by=by, layers=range(total - TOP, total))
    return {layer - (total - TOP): heads for layer, heads in chosen.items()}  # pyright: ignore[reportReturnType]


class TableReader(nn.Module):
    """The last layers of the tower with an adapter, and linear heads on every patch.

    Args:
        options: `layers` (trained or frozen), `adapter`, `places` (own or shuffled), and for SFA `terms`,
            `init`, `init_strength`, `init_warmup_steps`, `heads` (affinity, gate or first), `task`, `pool_seed`.
        seed: Of the new weights; those that arms share are equal for equal seeds.

    Raises:
        DataError: An option has an unknown value.
        WeightsError: The package with the pretrained weights is missing.
    """

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        adapter, layers = options.get("adapter", "none"), options.get("layers", "trained")
        places = options.get("places", "own")
        if adapter not in ADAPTERS or layers not in ("trained", "frozen") or places not in ("own", "shuffled"):
            raise DataError(f"adapter={adapter!r}, layers={layers!r} or places={places!r} is unknown.")
        self.tower: Any = copy.deepcopy(_parts()[1]).requires_grad_(layers == "trained")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.header, self.content = nn.Linear(384, 2 * KINDS), nn.Linear(384, KINDS)
            self.adapter_parameters = _adapt(self.tower, adapter, options, seed)
        self.given = next(module for module in self.tower.modules() if isinstance(module, _Given))
        order = torch.arange(1 + GRID * GRID)
        if places == "shuffled":
            order[1:] = 1 + torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(99))
        self.order, self.back = order, order.argsort()
        self.blank = torch.zeros(1, 3, SIDE, SIDE)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the headers of column and row, `[batch, 64, 2, 10]`, and of the content, `[batch, 64, 10]`.

        Args:
            features: From `Encoded`, `[batch, 65, 384]`.
        """
        self.given.features = features[:, self.order]
        states = self.tower(pixel_values=self.blank.expand(len(features), -1, -1, -1)).last_hidden_state
        states = states[:, self.back][:, 1:]
        return self.header(states).unflatten(-1, (2, KINDS)), self.content(states)


def _adapt(tower: Any, adapter: str, options: Mapping[str, Any], seed: int) -> int:
    """Injects the adapter into the tower, in place, and returns the number of its parameters."""
    if adapter == "sfa":
        start: dict[str, Any] = {"terms": list(options["terms"])}
        if options.get("init", "normal") == "axial":
            start |= {"init": "axial", "init_strength": float(options["init_strength"])}
            start["init_warmup_steps"] = options.get("init_warmup_steps", 0)
            by = options.get("heads", "affinity")
            if by != "first":
                start["init_heads"] = strong_heads(options["task"], options["pool_seed"], by)
        before = {id(parameter) for parameter in tower.parameters()}
        torch.manual_seed(seed)  # last: choosing heads builds a tower, the first time in a process
        inject_sfa(tower, SFAConfig(**start))
        return sum(p.numel() for p in tower.parameters() if id(p) not in before)
    if adapter == "bitfit":
        vectors = [parameter for name, parameter in tower.named_parameters() if name.endswith("bias")]
        for parameter in vectors:
            parameter.requires_grad_(True)
        return sum(parameter.numel() for parameter in vectors)
    if adapter == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj", "k_proj"]), tower)
        added = [parameter for name, parameter in tower.named_parameters() if "lora_" in name]
        return sum(parameter.numel() for parameter in added)
    return 0
