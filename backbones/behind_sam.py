"""DeepSeek-OCR 2 and Unlimited-OCR: an encoder behind a SAM encoder. The second one carries the bias.

SAM has a bias over relative rows and columns already, decomposed as SFA's is. It gives a feature map of a quarter of
its grid. Unlimited-OCR runs a CLIP encoder on it, behind a CLS token. DeepSeek-OCR 2 puts learned queries behind it,
which have no place on the page: patches see each other, queries see patches and earlier queries, and only the queries
are read. So the last layer of its encoder gets no bias: what patches gather there goes nowhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from sfa_adapters import processor_statistics
from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.pixel_grids import pair, pixel_grid
from sfa_adapters.registry import Backbone, Geometry, register_backbone


def map_grid(tower: nn.Module, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of SAM's feature map: two convolutions of stride 2 behind its patches, ends rounded up."""
    return -(-rows // 4), -(-columns // 4)


def own_grid(tower: nn.Module) -> tuple[int, int]:
    """The feature map at SAM's own image size."""
    model: Any = tower
    config = model.config.sam_config
    (height, width), (side, across) = pair(config.image_size), pair(config.patch_size)
    return map_grid(tower, height // side, width // across)


def image_of(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> ImageTokens | None:
    """One grid for all `pixel_values`, row by row."""
    model: Any = tower
    grid = pixel_grid(model.sam_encoder, args, kwargs)
    return None if grid is None else ImageTokens(map_grid(tower, *grid))


def queries_behind(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> ImageTokens | None:
    """The patches, and behind them as many queries as the tower has for this resolution."""
    model: Any = tower
    image = image_of(tower, args, kwargs)
    if image is None:
        return None
    few, many = model.query_768_resolution.num_embeddings, model.query_1024_resolution.num_embeddings
    patches = image.num_tokens
    queries = few if patches <= few else many
    return replace(image, without_place=((patches, patches + queries),))


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What its image processor normalises with."""
    return processor_statistics.HALF


DEEPSEEK_OCR2 = register_backbone(
    Backbone(
        name="deepseek_ocr2",
        towers=("transformers.models.deepseek_ocr2.*.DeepseekOcr2VisionModel",),
        attentions=("transformers.models.deepseek_ocr2.*.DeepseekOcr2VisionAttention",),
        geometry=lambda tower: Geometry(grid=own_grid(tower), prefix_tokens=0),
        layouts=queries_behind,
        unread_layers=1,
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_behind_sam:DEEPSEEK_OCR2",
    )
)

UNLIMITED_OCR = register_backbone(
    Backbone(
        name="unlimited_ocr",
        towers=("transformers.models.unlimited_ocr.*.UnlimitedOcrVisionModel",),
        attentions=("transformers.models.unlimited_ocr.*.UnlimitedOcrAttention",),
        geometry=lambda tower: Geometry(grid=own_grid(tower), prefix_tokens=1),
        layouts=image_of,
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_behind_sam:UNLIMITED_OCR",
    )
)
