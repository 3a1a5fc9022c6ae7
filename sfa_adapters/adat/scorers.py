"""Scorers of text density: one number in [0, 1] per cell of a page, from the density estimator or from a rule.

| scorer | what it measures | needs |
|---|---|---|
| `density` | share of text around a place, by the density estimator | the weights that the library ships |
| `edges` | the pseudo labels that the estimator was trained on | OpenCV |
| `reconstruction` | the error of halving the resolution, beyond the noise of the page | nothing |
| `entropy` | entropy of the gray levels, as in APT; for budgets: its order is right, APT's threshold is not | nothing |
| `uniform` | one constant for all cells | nothing |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.errors import DataError, PlanError

__all__ = [
    "ENTROPY_BITS",
    "Reduce",
    "Scorer",
    "check_scorer",
    "content",
    "entropy_bits",
    "noise_level",
    "reconstruction",
    "score",
    "to_cells",
]

Reduce = Literal["max", "mean"]
ScorerName = Literal["density", "edges", "reconstruction", "entropy", "uniform"]
Scorer: TypeAlias = ScorerName | Callable[[Tensor], Tensor]

ENTROPY_BITS = 9.0  # log2 of the 512 bins: the largest entropy there is
ENTROPY_WINDOW = 32  # px
STRIDE = 16  # px, of the density maps
BLOCK = 8  # px, in which `reconstruction` averages its error: about the height of small print
NOISE_CAP = 16.0  # gray levels; texture all over a photograph is not noise
# Variance that is left of white noise of variance 1 after subtracting its 2 x 2 average, upsampled bilinearly:
# 1 - 2 * 9/16 * 1/4 + (81 + 9 + 9 + 1) / 256 / 4.
NOISE_GAIN = 0.81640625
TEXT_RESIDUE = 80.0  # gray levels, root mean square: the error in the densest parts of black body text on white


def check_scorer(scorer: Scorer, reduce: str) -> None:
    """Checks the options `scorer` and `reduce`.

    Raises:
        PlanError: One is unknown; names the known ones.
    """
    if not callable(scorer) and scorer not in get_args(ScorerName):
        raise PlanError(f"scorer={scorer!r} must be one of {list(get_args(ScorerName))} or a function of images.")
    if reduce not in get_args(Reduce):
        raise PlanError(f"reduce={reduce!r} must be one of {list(get_args(Reduce))}.")


@torch.no_grad()
def score(images: Tensor, scorer: Scorer, cell: int, reduce: Reduce = "max", constant: float = 0.0) -> Tensor:
    """Scores the text density of the cells of a batch of pages.

    Args:
        images: RGB in [0, 1], before a tower's normalisation, `[B, 3, H, W]`.
        scorer: A name, or a function that takes the images and returns a map over them of any resolution, `[B, h, w]`.
        cell: Side of a cell in pixels; cells at the border are scored by their part on the page.
        reduce: How the values of a finer map become one per cell. The maximum makes a cell with one small digit dense.
        constant: Density of every cell for `uniform`.

    Returns:
        Densities in [0, 1], `[B, ceil(H / cell), ceil(W / cell)]`, float32, on the device of the images.

    Raises:
        DataError: The images are no RGB batch of numbers in [0, 1].
        PlanError: The scorer is unknown, or a function returned another shape, NaN or values outside [0, 1].
    """
    check_scorer(scorer, reduce)
    _check_images(images)
    images = images.float()
    batch, _, height, width = images.shape
    cells = (-(-height // cell), -(-width // cell))
    covered = (height, width)  # px under the map
    if scorer == "uniform":
        return images.new_full((batch, *cells), constant)
    if callable(scorer):
        values = _checked_map(scorer(images), batch)
    elif scorer == "density":
        values = _estimator(str(images.device))(images)
        covered = (values.shape[-2] * STRIDE, values.shape[-1] * STRIDE)
    elif scorer == "edges":
        values = _edges(images)
    elif scorer == "reconstruction":
        values = reconstruction(images)
        covered = (values.shape[-2] * BLOCK, values.shape[-1] * BLOCK)
    else:
        bits = entropy_bits(images)
        values = bits / ENTROPY_BITS
        covered = (values.shape[-2] * ENTROPY_WINDOW, values.shape[-1] * ENTROPY_WINDOW)
    return to_cells(values.float(), covered, cell, cells, reduce).to(images.device)


def to_cells(
    values: Tensor, covered: tuple[int, int], cell: int, cells: tuple[int, int], reduce: Reduce = "max"
) -> Tensor:
    """Resamples maps of any resolution to one value per cell.

    Args:
        values: Maps, `[..., h, w]`.
        covered: Height and width in pixels that the map stretches over, from the top left corner of the page.
        cell: Side of a cell in pixels.
        cells: Rows and columns of the cells.
        reduce: Maximum of all values that touch the cell, or their mean weighted by the shared area.

    Returns:
        `[..., *cells]`.
    """
    for dim, pixels, count in ((-2, covered[0], cells[0]), (-1, covered[1], cells[1])):
        values = _reduce(values.movedim(dim, -1), pixels, cell, count, reduce).movedim(-1, dim)
    return values


def _reduce(values: Tensor, pixels: int, cell: int, count: int, reduce: Reduce) -> Tensor:
    """`to_cells` along the last dimension."""
    size = values.shape[-1]
    # Value k covers the pixels [k, k + 1) * pixels / size: all in whole numbers, in units of 1 / size px.
    begin = (torch.arange(count) * cell * size).clamp(max=(size - 1) * pixels)
    end = ((torch.arange(count) + 1) * cell * size).clamp(max=size * pixels)
    first, last = begin // pixels, -(-end // pixels)
    places = first[:, None] + torch.arange(int((last - first).max()))
    if reduce == "max":
        picked = torch.minimum(places, last[:, None] - 1).to(values.device)
        return values[..., picked].amax(-1)
    low = torch.maximum(places * pixels, begin[:, None])
    high = torch.minimum((places + 1) * pixels, end[:, None])
    weight = (high - low).clamp(min=0).float()
    weight = (weight / weight.sum(-1, keepdim=True)).to(values.device)
    return (values[..., places.clamp(max=size - 1).to(values.device)] * weight).sum(-1)


# -- rules ------------------------------------------------------------------------------------------------------------


def entropy_bits(images: Tensor, window: int = ENTROPY_WINDOW) -> Tensor:
    """Entropy of the gray levels of each window, by which APT (arXiv 2510.18091) chooses patch sizes.

    There a window below a fixed threshold, 5.75 bits at 32 px, counts as homogeneous and gets one large patch. Black
    letters on white have two gray levels and so few bits that this threshold takes all clean print for paper. But paper
    has fewer still: under a budget, where only the order counts, print comes before paper, also where noise lies evenly
    over the page. Wherever gray levels spread without print (shadow, grain in one place, photographs), they come first.

    Args:
        images: RGB in [0, 1], `[B, 3, H, W]`.
        window: Side of a window in pixels.

    Returns:
        Bits from 0 to 9 (512 bins over [0, 255]), `[B, ceil(H / window), ceil(W / window)]`; 9 for windows that reach
        over the border, which APT never makes coarse.
    """
    gray = _gray(images)
    batch, height, width = gray.shape
    rows, columns = -(-height // window), -(-width // window)
    whole = F.pad(gray, (0, columns * window - width, 0, rows * window - height))
    bins = (whole * (512 / 255)).long().clamp_(0, 511)
    bins = bins.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3).flatten(3)
    count = torch.zeros((batch, rows, columns, 512), device=gray.device)
    share = count.scatter_add_(3, bins, torch.ones_like(bins, dtype=torch.float32)) / window**2
    bits = -(share * torch.log2(share + 1e-10)).sum(-1)
    bits[:, height // window :] = ENTROPY_BITS
    bits[:, :, width // window :] = ENTROPY_BITS
    return bits.clamp_(0, ENTROPY_BITS)


def noise_level(gray: Tensor) -> Tensor:
    """Standard deviation of the noise of each page, from the median difference of neighbours in a row.

    On a page that is mostly paper the median neighbour differs by noise only; 0.6745 is the median of a normal |x|.

    Args:
        gray: Gray levels, `[B, H, W]`.

    Returns:
        Gray levels, `[B]`, at most 16: texture all over a photograph is not noise.
    """
    if gray.shape[-1] < 2:
        return gray.new_zeros(len(gray))
    every = max(1, gray.shape[-2] // 128)  # a quarter of a page's rows gives the same median
    difference = (gray[:, ::every, 1:] - gray[:, ::every, :-1]).abs().flatten(1)
    return (difference.median(1).values / 0.6745 / math.sqrt(2)).clamp(max=NOISE_CAP)


def reconstruction(images: Tensor) -> Tensor:
    """Error of halving the resolution beyond noise, as a score of text density.

    The image is averaged over 2 x 2 pixels and upsampled bilinearly. The mean squared error of 8 x 8 pixels, less twice
    the error that noise explains (with one gray level of rounding), is compared to the error of black body text on
    white: sqrt(error) / 80 gray levels, at most 1. Text of half the contrast scores half as much.

    Args:
        images: RGB in [0, 1], `[B, 3, H, W]`.

    Returns:
        `[B, ceil(H / 8), ceil(W / 8)]` in [0, 1].
    """
    return (_lost_detail(_gray(images), BLOCK) / TEXT_RESIDUE).clamp(max=1.0)


def content(images: Tensor, cell: int) -> Tensor:
    """How much finer patches would show in each cell: the order in which cells of equal density are refined.

    The error of halving the resolution beyond noise, as in `reconstruction`, but of the color channel that loses most
    (red print on green paper may have one gray level), and without the upper end, at which dense text is equal again.

    Args:
        images: RGB in [0, 1], before a tower's normalisation, `[B, 3, H, W]`.
        cell: Side of a cell in pixels; cells at the border are measured by their part on the page.

    Returns:
        Root mean square in gray levels, at least 0, `[B, ceil(H / cell), ceil(W / cell)]`, float32; 0 where finer
        patches would show nothing new. Rounded to hundredths, so that equal cells are equal wherever they lie.

    Raises:
        DataError: The images are no RGB batch of numbers in [0, 1].
    """
    _check_images(images)
    lost = _lost_detail(images.float().flatten(0, 1) * 255, cell)
    return (lost.unflatten(0, images.shape[:2]).amax(1) * 100).round() / 100


# -- parts ------------------------------------------------------------------------------------------------------------


def _lost_detail(gray: Tensor, block: int) -> Tensor:
    """What halving the resolution of gray levels loses beyond noise: root mean square of each block of pixels."""
    height, width = gray.shape[-2:]
    even = F.pad(gray[:, None], (0, width % 2, 0, height % 2), mode="replicate")
    small = F.avg_pool2d(even, 2)
    lost = F.interpolate(small, scale_factor=2.0, mode="bilinear", align_corners=False) - even
    error = F.avg_pool2d(lost[..., :height, :width].square(), block, ceil_mode=True)[:, 0]
    floor = NOISE_GAIN * noise_level(gray).square() + 1.0
    return (error - 2 * floor[:, None, None]).clamp(min=0).sqrt()


@cache
def _estimator(device: str) -> Callable[[Tensor], Tensor]:
    """The shipped density estimator, loaded once per device."""
    from sfa_adapters.adat.density import DensityEstimator

    # It is built in the middle of a run, whose random numbers (dropout) must not depend on that.
    with torch.random.fork_rng(devices=[]):
        return DensityEstimator.pretrained().fused().to(device)


def _edges(images: Tensor) -> Tensor:
    from sfa_adapters.adat.labels import density_labels

    grid = (-(-images.shape[-2] // STRIDE), -(-images.shape[-1] // STRIDE))
    pages = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([torch.as_tensor(density_labels(page, grid=grid)) for page in pages])


def _gray(images: Tensor) -> Tensor:
    """Gray levels from 0 to 255, `[B, H, W]`, with the weights of ITU-R BT.601."""
    red, green, blue = images.float().unbind(1)
    return (0.2989 * red + 0.5870 * green + 0.1140 * blue) * 255


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape:
        raise DataError(
            f"images {tuple(images.shape)} {images.dtype} must be [batch, 3, height, width], floating point in [0, 1]."
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise DataError(
            f"images hold values from {low:g} to {high:g}; scores need RGB in [0, 1], before the mean and deviation of "
            "a tower are applied."
        )


def _checked_map(values: Tensor, batch: int) -> Tensor:
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 3 or len(values) != batch or 0 in values.shape:
        raise PlanError(
            f"The scorer returned {tuple(values.shape)} for {batch} images; it must return [{batch}, h, w]."
        )
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise PlanError(f"The scorer returned values from {low:g} to {high:g} (NaN counts); they must lie in [0, 1].")
    return values
