"""`SmallTower`: how a small tower on one flat sequence of patches is built and called, and where its tokens lie.

Where a tower rotates queries and keys by row and column, the place of each token is read back from that rotation, and
not from its record; elsewhere the order of tokens is listed by loops.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfa_adapters.compat import has_vision_model
from sfa_adapters.testing.cases import Grid, Inputs, Place, TowerCase, lively
from sfa_adapters.testing.towers_transformers import set_checkpointing, set_eager

__all__ = ["PATCH", "SmallTower", "groups", "raster"]

Sizes = tuple[tuple[int, int, int], ...]
SIZES: Sizes = ((1, 4, 6), (1, 2, 4))
LARGEST = 12  # no image has more rows or columns
PATCH = 4


def unchanged(places: Tensor) -> Tensor:
    """Positions that are rows and columns."""
    return places


def nothing(sizes: Sizes) -> Inputs:
    """No further arguments."""
    return {}


@dataclass(frozen=True, eq=False, kw_only=True)
class SmallTower:
    """How a small tower of one model is built and called.

    Attributes:
        model: Module of `transformers.models`, the prefix of the files in it.
        tower: Class of the tower.
        config: Class of its configuration.
        options: Options of the configuration.
        patch: Shape of one patch of the input.
        frames: Whether one entry of the grids can be several frames.
        loops: Places of the tokens of a grid, for towers without rotation.
        positions: What the tower's rotation is given for rows and columns `[places, 2]`; for several frames, one behind
            the other.
        count: What the grids count, in patches along a side.
        prefix: Leading tokens of each image.
        layers: Attention layers.
        heads: Heads of each.
        lora: Name of a projection.
        further: Further arguments of the forward.
        runs: As in `TowerCase`.
    """

    model: str
    tower: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    patch: tuple[int, ...] = (3 * 2 * PATCH * PATCH,)
    frames: bool = True
    loops: Callable[[int, int], list[Place]] | None = None
    positions: Callable[[Tensor], Tensor] = unchanged
    count: int = 1
    prefix: int = 0
    layers: int = 3
    heads: int = 4
    lora: str = "qkv"
    further: Callable[[Sizes], Inputs] = nothing
    runs: Literal["everything", "bias", "nightly"] = "nightly"

    @property
    def installed(self) -> bool:
        """Whether the installed transformers has this model."""
        return has_vision_model(self.model)

    def class_of(self) -> type[nn.Module]:
        """The class of the tower."""
        return getattr(import_module(f"transformers.models.{self.model}.modeling_{self.model}"), self.tower)

    def build(self) -> nn.Module:
        """A tower with random weights."""
        configuration = import_module(f"transformers.models.{self.model}.configuration_{self.model}")
        config = getattr(configuration, self.config)(**self.options)
        config._attn_implementation = "sdpa"
        return self.class_of()(config)

    # -- inputs -------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the arguments of the tower's forward: patches first, then grids."""
        return list(inspect.signature(self.class_of().forward).parameters)[1:]

    def inputs(self, seed: int, sizes: Sizes = SIZES) -> Inputs:
        """Patches and grids of two images."""
        counted = [(t, h // self.count, w // self.count) for t, h, w in sizes]
        tokens = sum(math.prod(size) for size in counted)
        patches = torch.randn(tokens, *self.patch, generator=torch.Generator().manual_seed(seed))
        patches = patches[None] if self.model == "paddleocr_vl" else patches
        grid = next(name for name in self.names if name.endswith("grid_thw"))
        return {self.names[0]: patches, grid: torch.tensor(counted), **self.further(sizes)}

    def resized(self, seed: int) -> Inputs:
        """Two images of other sizes, the second with two frames where the tower takes them."""
        return self.inputs(seed, ((1, 6, 4), (2 if self.frames else 1, 2, 4)))

    def _grid(self, inputs: Inputs) -> Tensor:
        return next(value for name, value in inputs.items() if name.endswith("grid_thw"))

    def sizes(self, inputs: Inputs) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of patches of each image."""
        return [(t, h * self.count, w * self.count) for t, h, w in self._grid(inputs).tolist()]

    def grids(self, inputs: Inputs) -> list[Grid]:
        """Rows and columns of each frame of each image."""
        return [(rows, columns) for frames, rows, columns in self.sizes(inputs) for _ in range(frames)]

    def split(self, inputs: Inputs) -> list[Inputs]:
        """Inputs of one image each."""
        grid, name = self._grid(inputs), self.names[0]
        dim = 1 if self.model == "paddleocr_vl" else 0
        parts = inputs[name].split(grid.prod(-1).tolist(), dim)
        single: list[Inputs] = []
        for number, part in enumerate(parts):
            rows = {k: v[number : number + 1] for k, v in inputs.items() if k != name}
            single.append({name: part, **rows})
        return single

    def turn(self, inputs: Inputs) -> Inputs:
        """The same patches on grids with rows and columns exchanged."""
        return {k: v[:, [0, 2, 1]] if k.endswith("grid_thw") else v for k, v in inputs.items()}

    def hidden(self, model: nn.Module, inputs: Inputs) -> list[Tensor]:
        """Features of each image; towers that merge patches give fewer, and those of class tokens are left out."""
        states = model(**inputs).last_hidden_state
        states = states[0] if states.ndim == 3 else states
        lengths = [math.prod(size) for size in self.sizes(inputs)]
        if self.prefix:
            return [part[self.prefix :] for part in states.split([length + self.prefix for length in lengths])]
        sides = inputs.get("merge_sizes")
        share = [sum(lengths) // len(states)] * len(lengths) if sides is None else [int(side) ** 2 for side in sides]
        return list(states.split([length // part for length, part in zip(lengths, share, strict=True)]))

    # -- places -------------------------------------------------------------------------------------------------------

    @cache  # noqa: B019 - the towers of this file live as long as the process
    def rotation(self) -> Tensor:
        """The rotation of every place up to `LARGEST`, row by row, `[frames * places, channels]`."""
        tower = self.build()
        rotary = next(m for m in tower.modules() if type(m).__name__.endswith("RotaryEmbedding"))
        places = torch.cartesian_prod(torch.arange(LARGEST), torch.arange(LARGEST))
        return torch.cat(rotary(torch.zeros(1), self.positions(places)), dim=-1).double()

    def places(self, inputs: Inputs, kwargs: Mapping[str, Any]) -> list[Place]:
        """Place of each token."""
        if self.loops is not None:
            return [place for grid in self.grids(inputs) for place in self.loops(*grid)]
        seen = torch.cat(kwargs["position_embeddings"], dim=-1).double()
        distance = torch.cdist(seen, self.rotation())
        nearest = distance.argmin(dim=1)
        starts = set[int]()
        if self.prefix:  # a class token is rotated to a place of its own, which is none of the page
            lengths = [math.prod(size) + self.prefix for size in self.sizes(inputs)]
            starts = {0, *itertools.accumulate(lengths[:-1])}
        for number, row in enumerate(distance):
            assert number in starts or row.min() < 1e-4, "the rotation does not look as expected"
        return [
            None if number in starts else (float(place // LARGEST % LARGEST), float(place % LARGEST))
            for number, place in enumerate(nearest.tolist())
        ]

    def case(self, backbone: str) -> TowerCase:
        """What the contract suite runs over."""
        return TowerCase(
            name=self.model, backbone=backbone, build=lively(self.build), inputs=self.inputs, split=self.split,
            hidden=self.hidden, layers=self.layers, heads=self.heads, grid=None, grids=self.grids, places=self.places,
            turn=self.turn, prefix=self.prefix, resized=self.resized, eager=set_eager, eager_takes_bias=False,
            checkpointing=set_checkpointing, lora_targets=(self.lora,), library="transformers", runs=self.runs,
        )  # fmt: skip


def raster(rows: int, columns: int) -> list[Place]:
    """Row by row."""
    return [(float(row), float(column)) for row in range(rows) for column in range(columns)]


def groups(rows: int, columns: int) -> list[Place]:
    """2x2 groups row by row."""
    return [
        (float(top + row), float(left + column))
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
        for row in (0, 1)
        for column in (0, 1)
    ]
