"""What hosts have in common whose tower takes images of any size as one sequence (NaViT): Qwen-VL, GLM and PaddleOCR.

The processor shrinks an image until it has at most so many pixels, in whole groups of patches; each group becomes one
image token. Every layer attends to the whole image, so a structural bias is folded into its queries.
"""

from __future__ import annotations

from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.sizes import FLOAT, Lengths, Precision, Widths

__all__ = [
    "NO_DENSITY",
    "NO_GRID",
    "NO_MERGING",
    "attention_bytes",
    "lengths",
    "merge_side",
    "patch_grid",
    "pixel_options",
    "plain_layer",
]

# Why the tower of such a host takes no adaptive tokens.
NO_GRID = (
    "its tower has no fixed grid of patches. Leave adat out; for fewer tokens set max_pixels, or use drop_blank_groups."
)
NO_DENSITY = "the density of text is not measured for a host without a fixed grid of patches."
NO_MERGING = (
    "nobody has written how tokens merge in its tower. For fewer tokens use FastV, drop_blank_groups or a smaller "
    "max_pixels."
)


def pixel_options(processor: Any, pixels: int, frames: int = 1) -> dict[str, Any]:
    """Options of the image processor, so that an image has at most so many pixels.

    Args:
        processor: The image processor.
        pixels: The most pixels.
        frames: How often the processor counts each pixel of a still image: GLM's counts it in every frame.

    Raises:
        RecipeError: That is less than one image token.
    """
    least = (processor.patch_size * processor.merge_size) ** 2
    if pixels < least:
        raise RecipeError(f"max_pixels={pixels} must be at least {least}, one image token.")
    smallest = min(int(processor.size["shortest_edge"]), frames * pixels)
    return {"size": {"shortest_edge": smallest, "longest_edge": frames * pixels}}


def merge_side(config: Any) -> int:
    """Patches along one side of an image token."""
    return int(config.vision_config.spatial_merge_size)


def lengths(config: Any, pixels: int) -> Lengths:
    """Tokens of an image with the most pixels."""
    vision = config.vision_config
    group = (vision.patch_size * vision.spatial_merge_size) ** 2
    tokens = max(1, pixels // group)
    frames = getattr(vision, "temporal_patch_size", 1)  # every patch of a still image comes as often
    return Lengths(frames * tokens * group, tokens * vision.spatial_merge_size**2, tokens)


def patch_grid(config: Any, pixels: int) -> tuple[int, int]:
    """Rows and columns of patches of an image with the most pixels, a square."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    groups = max(1, int(pixels**0.5) // side)
    return groups * vision.spatial_merge_size, groups * vision.spatial_merge_size


def attention_bytes(sizes: Widths, part: Precision, fused: bool) -> int:
    """Bytes per token that the attention keeps beside its input.

    Args:
        sizes: Widths of the layer.
        part: Precision of the tower.
        fused: Whether one product makes query, key and value. The value is then a view of it, which keeps all three.
    """
    width, compute = sizes.width, part.compute
    wide = sizes.folded * sizes.heads
    plain = (2 + (3 if fused else 1) + 1) * width  # query and key turned, value, output
    kept = compute * (4 * wide if wide > sizes.attended else plain)  # with a bias all four are copies that are wider
    return kept + FLOAT * sizes.heads + (compute * width if part.trains else 0)  # and the output joined


def plain_layer(sizes: Widths, part: Precision, fused: bool) -> int:
    """Bytes per token of a layer with two layer norms and an MLP with one activation."""
    width, inner, compute = sizes.width, sizes.inner, part.compute
    # Means and roots of the norms, and what the second one saw; autocast gives both of them copies in float32.
    kept = 4 * FLOAT + FLOAT * width * (1 if part.compute == FLOAT else 2)
    kept += attention_bytes(sizes, part, fused)
    kept += part.product_inputs(width, 1 if fused else 3) + part.product_inputs(width, 1)
    return kept + compute * inner * (1 + part.trains)
