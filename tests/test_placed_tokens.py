"""Patches that bring their rows and columns along: read as the image processors write them, and what cannot be."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.naflex_transforms import patchify_image
from torch import Tensor
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
from transformers.models.pix2struct.image_processing_pix2struct import Pix2StructImageProcessor
from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

from sfa_adapters.arrangement import ImageTokens, Listed
from sfa_adapters.errors import LayoutError
from sfa_adapters.placed_tokens import placed_images, sized_images
from sfa_adapters.registry import registered_backbones

GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


@given(grids=GRIDS, spare=st.integers(0, 3), order=st.randoms(use_true_random=False), shuffled=st.booleans())
@settings(max_examples=40, deadline=None)
def test_grid_order_and_padding_are_read_from_the_places(grids: Any, spare: int, order: Any, shuffled: bool) -> None:
    length = max(h * w for h, w in grids) + spare
    places, real = torch.full((len(grids), length, 2), -7), torch.zeros(len(grids), length, dtype=torch.bool)
    for number, (rows, columns) in enumerate(grids):
        listed = list(itertools.product(range(rows), range(columns)))
        if shuffled:
            order.shuffle(listed)
        places[number, : len(listed)] = torch.tensor(listed)
        real[number, : len(listed)] = True
    for number, image in enumerate(placed_images(places, real)):
        assert image.grid == grids[number]
        assert image.num_tokens + image.padding == length
        assert torch.equal(torch.stack(image.places(), -1).long(), places[number, : image.num_tokens])


def test_patches_row_by_row_need_no_list_and_parts_of_a_grid_do() -> None:
    whole = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])[None]
    seen = torch.ones(1, 4, dtype=torch.bool)
    assert placed_images(whole, seen) == [ImageTokens((2, 2))]
    assert placed_images(whole.double(), seen) == [ImageTokens((2, 2))]
    assert placed_images(whole.flip(1), seen) == [ImageTokens((2, 2), Listed((1, 1, 0, 0), (1, 0, 1, 0)))]
    assert placed_images(whole[:, 1:], seen[:, 1:]) == [ImageTokens((2, 2), Listed((0, 1, 1), (1, 0, 1)))]


def test_what_cannot_be_is_refused() -> None:
    places = torch.tensor([[0, 0], [0, 1], [1, 0]])[None].repeat(2, 1, 1)
    with pytest.raises(LayoutError, match="Image 1 of the batch has no tokens"):
        placed_images(places, torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(LayoutError, match="Image 0 of the batch has padding in front of some of its 2 tokens"):
        placed_images(places, torch.tensor([[True, False, True]] * 2))
    with pytest.raises(LayoutError, match=r"Image 0 of the batch has a patch at row and column \[-1, 0\]"):
        placed_images(places - torch.tensor([1, 0]), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(LayoutError, match="2x3 patches does not fit into the 5 tokens"):
        sized_images(torch.tensor([[1, 3], [2, 3]]), 5)


# -- records read what image processors write: an image of 2 rows and 5 columns, and one of 3 rows and 2 columns --

GRID, OTHER = (2, 5), (3, 2)


def pictures(side: int) -> list[Tensor]:
    return [torch.rand(3, side * rows, side * columns) for rows, columns in (GRID, OTHER)]


def read(name: str, args: tuple[Any, ...], **kwargs: Any) -> list[tuple[tuple[int, int], int]]:
    record = registered_backbones()[name]
    assert record.layouts is not None
    images: Any = record.layouts(torch.nn.Identity(), args, kwargs)
    images = images if isinstance(images, list) else images.images
    assert all(image.order is None for image in images), "processors list patches row by row"
    return [(image.grid, image.padding) for image in images]


def gemma4(batch: list[Tensor]) -> Any:
    """Each image fills its token budget: 70 soft tokens of 3x3 patches, so that grids keep the aspect."""
    out = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)(batch, return_tensors="pt")
    (wide, _), (tall, _) = read("gemma4", (out["pixel_values"], out["image_position_ids"]))
    assert wide[1] > 2 * wide[0]
    assert tall[0] > tall[1]


def siglip2(batch: list[Tensor]) -> Any:
    out = Siglip2ImageProcessor(patch_size=4, max_num_patches=12)(batch, return_tensors="pt")
    result = read("siglip2_naflex", (out["pixel_values"],), spatial_shapes=out["spatial_shapes"])
    counts = out["pixel_attention_mask"].sum(-1).tolist()
    assert [12 - padding for _, padding in result] == counts
    assert [grid[0] * grid[1] for grid, _ in result] == counts
    assert result[0][0][1] > result[0][0][0]


def pix2struct(batch: list[Tensor]) -> Any:
    make: Any = Pix2StructImageProcessor
    out = make(patch_size={"height": 4, "width": 4}, max_patches=12)(batch, return_tensors="pt")
    result = read("flat_patches", (out["flattened_patches"],), attention_mask=out["attention_mask"])
    assert [12 - padding for _, padding in result] == out["attention_mask"].sum(-1).tolist()
    assert result[0][0][1] > result[0][0][0]


def naflex(batch: list[Tensor]) -> Any:
    parts = [patchify_image(image, (4, 4), pad=False) for image in batch]
    for (_, places, _), grid in zip(parts, (GRID, OTHER), strict=True):
        embeds: Any = torch.nn.Identity()
        embeds.has_class_token, embeds.num_reg_tokens = True, 4
        record = registered_backbones()["naflexvit"]
        assert record.layouts is not None
        arrangement: Any = record.layouts(embeds, (None, places[None]), {})
        assert (arrangement.joined, arrangement.prefix_tokens) == ("padded", 5)
        assert arrangement.images == (ImageTokens(grid),)


@pytest.mark.parametrize("check", [gemma4, siglip2, pix2struct, naflex], ids=lambda check: check.__name__)
def test_records_read_what_processors_write(check: Callable[[list[Tensor]], Any]) -> None:
    torch.manual_seed(0)
    check(pictures(4))


def test_pixtral_reads_the_part_of_a_canvas_that_its_tower_cuts_out() -> None:
    from sfa_adapters.testing.towers_grids import PIXTRAL

    record, tower = registered_backbones()["pixtral"], PIXTRAL[0].build()
    assert record.layouts is not None
    pixels = torch.zeros(2, 3, 13, 24)
    for sizes in (torch.tensor([[13, 24], [8, 30]]), [(13, 24), (8, 30)], torch.tensor([[13, 24], [8, 30], [4, 4]])):
        assert record.layouts(tower, (pixels,), {"image_sizes": sizes}) == [ImageTokens((3, 6)), ImageTokens((2, 6))]
        assert record.layouts(tower, (pixels, sizes), {}) == [ImageTokens((3, 6)), ImageTokens((2, 6))]
    assert record.layouts(tower, (), {"pixel_values": pixels}) == [ImageTokens((3, 6))] * 2


def test_a_mask_that_shows_patches_without_a_place_is_an_error() -> None:
    patches = torch.cat((torch.tensor([[1, 1], [1, 2], [0, 0]]).float(), torch.ones(3, 4)), -1)[None]
    layouts = registered_backbones()["flat_patches"].layouts
    assert layouts is not None
    assert layouts(torch.nn.Identity(), (patches,), {}) == [ImageTokens((1, 2), padding=1)]
    with pytest.raises(LayoutError, match="shows patches that have no row and column"):
        layouts(torch.nn.Identity(), (patches, torch.ones(1, 3)), {})
