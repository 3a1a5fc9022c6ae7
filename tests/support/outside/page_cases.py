"""Small towers of `page_towers`, for the contract suite."""

from typing import Any

import torch
from page_towers import PATCH, Page, Pages  # pyright: ignore[reportMissingImports]

from sfa_adapters.testing import TowerCase, lively


def page(height: int, width: int) -> Any:
    return lambda seed: {"image": torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))}


def turn(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"image": inputs["image"].transpose(-1, -2).contiguous()}


def pages(*sizes: tuple[int, int]) -> Any:
    def make(seed: int) -> dict[str, Any]:
        tokens = sum(rows * columns for rows, columns in sizes)
        patches = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed))
        return {"patches": patches, "sizes": torch.tensor(sizes)}

    return make


def split(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    parts = inputs["patches"].split(inputs["sizes"].prod(-1).tolist())
    return [{"patches": part, "sizes": size[None]} for part, size in zip(parts, inputs["sizes"], strict=True)]


def set_checkpointing(tower: Any, reentrant: bool | None) -> None:
    tower.gradient_checkpointing, tower.use_reentrant = reentrant is not None, bool(reentrant)


PAGE = (
    TowerCase(
        name="page",
        backbone="page",
        build=lively(Page),
        inputs=page(4 * PATCH, 4 * PATCH),
        resized=page(3 * PATCH, 5 * PATCH),
        grids=lambda inputs: [(inputs["image"].shape[-2] // PATCH, inputs["image"].shape[-1] // PATCH)],
        turn=turn,
        layers=2,
        heads=2,
        grid=(4, 4),
        prefix=1,
    ),
)
PAGES = (
    TowerCase(
        name="pages",
        backbone="pages",
        build=lively(Pages),
        inputs=pages((3, 4), (5, 2)),
        grids=lambda inputs: [(rows, columns) for rows, columns in inputs["sizes"].tolist()],
        hidden=lambda model, inputs: list(model(**inputs).split(inputs["sizes"].prod(-1).tolist())),
        split=split,
        turn=lambda inputs: {**inputs, "sizes": inputs["sizes"].flip(-1)},
        layers=2,
        heads=2,
        grid=None,
        checkpointing=set_checkpointing,
        compiles="no",
    ),
)
