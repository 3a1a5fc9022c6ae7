"""Prompts with several images of several sizes, alone and in left-padded batches, for hosts of four families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.support import hosts
from tests.support.hosts import IMAGE
from tests.support.towers import lively

PAD = 0
START, END = IMAGE + 2, IMAGE + 3
DEEP: dict[str, Any] = {**hosts.TEXT, "num_hidden_layers": 4, "eos_token_id": 63}


@dataclass(frozen=True)
class Family:
    """A kind of host.

    Attributes:
        name: In test ids.
        build: Makes the host: four decoder layers, the same weights every time.
        tokens: Image tokens of an image; for Qwen those of each size that there is.
    """

    name: str
    build: Callable[[], nn.Module]
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ask:
    """One prompt: numbers of text tokens before, between and after its images."""

    texts: tuple[int, ...]
    sizes: tuple[int, ...] = ()  # index of the size of each image in `Family.tokens`, for Qwen
    seed: int = 0

    @property
    def images(self) -> int:
        return len(self.texts) - 1


def _deep(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        usual = hosts.TEXT
        hosts.TEXT = DEEP
        try:
            model: Any = build()
        finally:
            hosts.TEXT = usual
        model.generation_config.eos_token_id = None  # every answer has its full length
        model.generation_config.pad_token_id = PAD
        return model

    return lively(make)


def _internvl() -> nn.Module:
    vision = transformers.InternVLVisionConfig(**hosts.VISION)
    text = transformers.Qwen3Config(**DEEP, head_dim=8)
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


GRIDS = ((1, 4, 8), (1, 8, 4), (1, 4, 4))
FAMILIES: tuple[Family, ...] = (
    Family("llava", _deep(hosts.llava), (16,)),
    Family("llava_onevision", _deep(hosts.llava_onevision), (36,)),
    Family("internvl", _deep(_internvl), (4,)),
    Family("qwen2_5_vl", _deep(hosts.qwen2_5_vl), (8, 8, 4)),
)


def prompt(family: Family, ask: Ask) -> dict[str, Any]:
    """The inputs of one prompt, `[1, L]`."""
    generator = torch.Generator().manual_seed(100 + ask.seed)
    sizes = ask.sizes if ask.sizes and len(family.tokens) > 1 else (0,) * ask.images
    parts: list[Tensor] = []
    for number, length in enumerate(ask.texts):
        parts.append(torch.randint(3, 50, (length,), generator=generator))
        if number < ask.images:
            image = torch.full((family.tokens[sizes[number]],), IMAGE)
            framed = family.name == "qwen2_5_vl"
            parts.append(torch.cat((torch.tensor([START]), image, torch.tensor([END]))) if framed else image)
    ids = torch.cat(parts)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, **_pixels(family, ask, sizes, ids, generator)}


def _pixels(family: Family, ask: Ask, sizes: Sequence[int], ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
    if family.name == "qwen2_5_vl":
        types = {"mm_token_type_ids": (ids == IMAGE).long()}
        if not ask.images:
            return types
        grids = torch.tensor([GRIDS[size] for size in sizes])
        pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 14 * 14, generator=generator)
        return {**types, "pixel_values": pixels, "image_grid_thw": grids}
    if not ask.images:
        return {}
    if family.name == "llava_onevision":
        pixels = torch.randn(ask.images, 2, 3, 56, 56, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[56, 56]] * ask.images)}
    return {"pixel_values": torch.randn(ask.images, 3, 56, 56, generator=generator)}


def batched(prompts: Sequence[dict[str, Any]], side: str = "left") -> dict[str, Any]:
    """Several prompts in one batch, padded on one side."""
    longest = max(p["input_ids"].shape[1] for p in prompts)
    out: dict[str, Any] = {}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
        rows = [p[name] for p in prompts if name in p]
        if rows:
            fill = -100 if name == "labels" else PAD
            gaps = [(longest - row.shape[1], 0) if side == "left" else (0, longest - row.shape[1]) for row in rows]
            padded = [torch.nn.functional.pad(r, gap, value=fill) for r, gap in zip(rows, gaps, strict=True)]
            out[name] = torch.cat(padded)
    for name in ("pixel_values", "image_grid_thw", "image_sizes"):
        tensors = [p[name] for p in prompts if name in p]
        if tensors:
            out[name] = torch.cat(tensors)
    return out
