"""Small towers on one flat sequence of patches: one of each model of transformers that works like this.

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
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfa_adapters.testing.cases import Grid, Inputs, Place, TowerCase, lively
from sfa_adapters.testing.towers_transformers import set_checkpointing, set_eager

__all__ = ["NAVIT", "NAVIT_RASTER", "NAVIT_WINDOWS", "SMALL_TOWERS"]

Sizes = tuple[tuple[int, int, int], ...]
SIZES: Sizes = ((1, 4, 6), (1, 2, 4))
LARGEST = 12  # no image has more rows or columns
PATCH = 4


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
        eager: Whether the tower has eager attention, which takes no bias.
        extra: Further arguments of the forward.
        runs: As in `TowerCase`.
    """

    model: str
    tower: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    patch: tuple[int, ...] = (3 * 2 * PATCH * PATCH,)
    frames: bool = True
    loops: Callable[[int, int], list[Place]] | None = None
    positions: Callable[[Tensor], Tensor] = field(default=lambda rows_columns: rows_columns)
    count: int = 1
    prefix: int = 0
    layers: int = 3
    heads: int = 4
    lora: str = "qkv"
    further: Callable[[Sizes], Inputs] = field(default=lambda sizes: {})
    runs: Literal["everything", "bias", "nightly"] = "nightly"

    @property
    def installed(self) -> bool:
        """Whether the installed transformers has this model."""
        return find_spec(f"transformers.models.{self.model}") is not None

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


# -- the towers -------------------------------------------------------------------------------------------------------

QWEN: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": PATCH,
}  # fmt: skip
TABLE: dict[str, Any] = {"num_position_embeddings": 16}
DEEP: dict[str, Any] = {**TABLE, "deepstack_visual_indexes": [0]}
GLM: dict[str, Any] = {**QWEN, "image_size": 16}
PLAIN: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "patch_size": PATCH,
}  # fmt: skip
STILL = (3 * PATCH * PATCH,)
FULL = ["full_attention", "window_attention", "full_attention"]

SMALL_TOWERS: dict[str, tuple[SmallTower, ...]] = {
    "navit": (
        SmallTower(
            model="qwen3_vl", tower="Qwen3VLVisionModel", config="Qwen3VLVisionConfig", options={**QWEN, **DEEP},
            runs="bias",
        ),
        SmallTower(
            model="qwen3_vl_moe", tower="Qwen3VLMoeVisionModel", config="Qwen3VLMoeVisionConfig",
            options={**QWEN, **DEEP},
        ),
        SmallTower(
            model="qwen3_5", tower="Qwen3_5VisionModel", config="Qwen3_5VisionConfig", options={**QWEN, **TABLE},
        ),
        SmallTower(
            model="qwen3_5_moe", tower="Qwen3_5MoeVisionModel", config="Qwen3_5MoeVisionConfig",
            options={**QWEN, **TABLE},
        ),
        SmallTower(
            model="qwen4_exp", tower="Qwen4ExpVisionModel", config="Qwen4ExpVisionConfig", options={**QWEN, **TABLE},
        ),
        SmallTower(
            model="qwen3_omni_moe", tower="Qwen3OmniMoeVisionEncoder", config="Qwen3OmniMoeVisionEncoderConfig",
            options={**QWEN, **DEEP},
        ),
        SmallTower(
            model="qwen2_vl", tower="Qwen2VisionTransformerPretrainedModel", config="Qwen2VLVisionConfig",
            options={**QWEN, "embed_dim": 32, "mlp_ratio": 2},
        ),
        SmallTower(model="glm_ocr", tower="GlmOcrVisionModel", config="GlmOcrVisionConfig", options=GLM),
        SmallTower(
            model="glm4v", tower="Glm4vVisionModel", config="Glm4vVisionConfig", options=GLM, frames=False,
        ),
        SmallTower(
            model="glm4v_moe", tower="Glm4vMoeVisionModel", config="Glm4vMoeVisionConfig", options=GLM, frames=False,
        ),
        SmallTower(
            model="glm5_next", tower="Glm5NextVisionModel", config="Glm5NextVisionConfig",
            options={**GLM, "projection_intermediate_size": 32},
        ),
        SmallTower(
            model="glm_image", tower="GlmImageVisionModel", config="GlmImageVisionConfig",
            options={**GLM, "spatial_merge_size": 2}, patch=STILL, frames=False, loops=groups,
        ),
        SmallTower(
            model="ernie4_5_vl_moe", tower="Ernie4_5_VLMoeVisionTransformerPretrainedModel",
            config="Ernie4_5_VLMoeVisionConfig", options=QWEN, patch=STILL,
        ),
        SmallTower(
            model="dots3_note", tower="Dots3NoteVisionModel", config="Dots3NoteVisionConfig",
            options={**PLAIN, "adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 3},
            patch=STILL,
        ),
        SmallTower(
            model="video_llama_3", tower="VideoLlama3VisionModel", config="VideoLlama3VisionConfig", options=PLAIN,
            patch=STILL, lora="q_proj", further=lambda sizes: {"merge_sizes": torch.tensor([2, 1])},
        ),
        SmallTower(
            model="lfm3_vl", tower="Lfm3VlVisionModel", config="Lfm3VlVisionConfig",
            options={
                **PLAIN, "num_hidden_layers": 4, "num_key_value_heads": 2,
                "layer_types": ["full_attention", "conv", "full_attention", "full_attention"],
            },
            lora="q_proj",
        ),
        SmallTower(
            model="minimax_m3_vl", tower="MiniMaxM3VLVisionModel", config="MiniMaxM3VLVisionConfig",
            options=PLAIN, lora="q_proj",
            positions=lambda places: torch.cat([torch.nn.functional.pad(places, (1, 0), value=t) for t in (0, 1)]),
        ),
        SmallTower(
            model="cosmos3_edge", tower="Cosmos3EdgeVisionModel", config="Cosmos3EdgeVisionConfig",
            options={**PLAIN, "num_patches": 16}, patch=STILL, loops=groups, lora="q_proj",
        ),
        SmallTower(
            model="inkling2", tower="Inkling2VisionModel", config="Inkling2VisionConfig",
            options={**PLAIN, "posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": 32},
            patch=(2 * PATCH, 2 * PATCH, 3), count=2, prefix=1, frames=False, lora="q_proj",
            positions=lambda places: places + 1,
        ),
        SmallTower(
            model="cohere_compass", tower="CohereCompassVisionModel", config="CohereCompassVisionConfig",
            options={**QWEN, **DEEP},
        ),
    ),
    "navit_raster": (
        SmallTower(
            model="paddleocr_vl", tower="PaddleOCRVisionModel", config="PaddleOCRVisionConfig",
            options={**PLAIN, "image_size": 16}, patch=(3, PATCH, PATCH), lora="q_proj", runs="bias",
        ),
        SmallTower(
            model="hunyuan_vl", tower="HunYuanVLVisionTransformer", config="HunYuanVLVisionConfig",
            options={**PLAIN, "max_image_size": 16, "text_hidden_size": 32}, patch=STILL, frames=False, loops=raster,
            lora="q_proj",
        ),
        SmallTower(
            model="hy_v4_vl", tower="HYV4VLVisionModel", config="HYV4VLVisionConfig",
            options={**PLAIN, "max_image_size": 16, "out_hidden_size": 32}, patch=STILL, frames=False, loops=raster,
            lora="q_proj",
        ),
        SmallTower(
            model="kimi_k25", tower="Kimi_K25VisionModel", config="Kimi_K25VisionConfig",
            options={**PLAIN, "pos_emb_height": 4, "pos_emb_width": 4}, patch=(3, PATCH, PATCH), lora="q_proj",
        ),
    ),
    "navit_windows": (
        SmallTower(
            model="qwen2_5_omni", tower="Qwen2_5OmniVisionEncoder", config="Qwen2_5OmniVisionEncoderConfig",
            options={**QWEN, "fullatt_block_indexes": [1], "window_size": 4 * PATCH}, lora="q", runs="bias",
        ),
        SmallTower(
            model="exaone4_5", tower="Exaone4_5_VisionModel", config="Exaone4_5_VisionConfig",
            options={**QWEN, "fullatt_block_indexes": [1], "window_size": 4 * PATCH, "num_key_value_heads": 2},
        ),
        SmallTower(
            model="muse_glimmer", tower="MuseGlimmerVisionModel", config="MuseGlimmerVisionConfig",
            options={**PLAIN, "pos_emb_height": 3, "pos_emb_width": 3, "layer_types": FULL}, lora="q_proj",
            positions=lambda places: places.flip(-1) + 1,
        ),
        SmallTower(
            model="muse_spark", tower="MuseSparkVisionModel", config="MuseSparkVisionConfig",
            options={**PLAIN, "pos_emb_height": 3, "pos_emb_width": 3, "layer_types": FULL}, lora="q_proj",
            positions=lambda places: places.flip(-1) + 1,
        ),
    ),
}  # fmt: skip


def cases(backbone: str) -> tuple[TowerCase, ...]:
    """The small towers of a record that the installed transformers has."""
    return tuple(small.case(backbone) for small in SMALL_TOWERS[backbone] if small.installed)


NAVIT = cases("navit")
NAVIT_RASTER = cases("navit_raster")
NAVIT_WINDOWS = cases("navit_windows")
