"""Entropy of a vision tower's attention, separately for dense and for sparse (nearly empty) regions of a page.

The attention of a query patch is a distribution over keys. Its entropy is H = -sum p log p nats: 0 if all attention is
on one patch, log n if it is spread evenly over n. H / log n compares images and towers of different token counts.

Patches of one image are not independent, but images are: a value is first averaged over the patches of a region, and
intervals come from a bootstrap over images, in which the dense and the sparse mean of an image stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sfa_adapters.adat.scorers import Scorer, score
from sfa_adapters.analysis.entropy_report import EntropyReport
from sfa_adapters.analysis.forward import Inputs, TowerPass, fixed_tower, run_tower, tower_layers
from sfa_adapters.analysis.report import Skip, Skips
from sfa_adapters.errors import DataError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.normalisation import image_statistics
from sfa_adapters.observe import Modules
from sfa_adapters.readers import RowEntropy

__all__ = ["Regions", "attention_entropy"]

# One map per image: truth values (dense, sparse), or integers 1 (dense), 0 (sparse), -1 (neither).
Regions = Sequence[Tensor | np.ndarray] | Tensor | np.ndarray
Keys = Literal["all", "patches"]
TEXT = 0.3  # density above which a place counts as text, as in the documentation of the density map
LONGEST = 2**20  # keys; more than any tower has


def attention_entropy(
    model: nn.Module,
    batches: Iterable[Inputs],
    regions: Regions | None = None,
    *,
    modules: Modules = "vision",
    scorer: Scorer = "density",
    threshold: float | tuple[float, float] = TEXT,
    normalize: bool = False,
    keys: Keys = "all",
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    seed: int = 0,
) -> EntropyReport:
    """Measures the entropy of a vision tower's attention in dense and in sparse regions of its images.

    Args:
        model: A tower with one grid per image, or a model with one.
        batches: Inputs of the model, one forward each: keyword arguments, or images alone `[..., 3, H, W]`, which
            go to the tower without the language model. Every image that the tower sees counts for itself, also the
            tiles of a page.
        regions: Which patches are dense, one map `[rows, columns]` for each image in the order in which the tower sees
            them: truth values, or integers 1 (dense), 0 (sparse), -1 (neither). By default the images are scored.
        modules: Which attention modules of the tower, as in `observe`; "vision" are those that the host reads.
        scorer: Scorer of text density, as in `PatchPolicy`; a patch has the mean density of its area.
        threshold: Patches above it are dense, the others sparse. With a pair (low, high), those in between are neither.
        normalize: Whether ratio, difference and figure use H / log n instead of nats. The table has both.
        keys: "all", or "patches": rows renormalised over patches, without CLS and registers. Queries are patches in
            either case.
        image_mean: Mean that images were normalised with, by channel; by default that of the tower's processor.
        image_std: Standard deviation that images were normalised with; by default that of the tower's processor.
        seed: Seed of the bootstrap.

    Returns:
        The report. Images without a dense or without a sparse patch are in `skipped`.

    Raises:
        NoMatchingBackboneError: No tower was found.
        ObservationError: The tower has no fixed grid, its tokens are not its own patches, or attention cannot be read.
        DataError: An option or a map cannot be used, images were not normalised with these statistics, or no image has
            both regions.
    """
    low, high = _thresholds(threshold)
    if keys not in ("all", "patches"):
        raise DataError(f"keys={keys!r} must be 'all' or 'patches'.")
    located, layers = fixed_tower(model), tower_layers(model, modules)
    prefix = located.backbone.geometry(located.tower).prefix_tokens
    # The reader cuts it to the number of keys.
    among = torch.arange(LONGEST) >= prefix if keys == "patches" and prefix else None
    given = None if regions is None else iter(regions)
    statistics = None if given is not None else _statistics(model, image_mean, image_std)
    kept: list[np.ndarray] = []  # [2 units, 2 regions, layers, heads] of each image
    patches: list[list[int]] = []
    images: list[int] = []
    skipped, number = Skips(), 0
    with evaluating(model):
        for inputs in batches:
            readers = [RowEntropy(keys=among), RowEntropy(keys=among, normalize=True)]
            for forward, seen in enumerate(run_tower(model, inputs, readers, layers)):
                if given is not None:
                    maps = _given(given, seen, number)
                else:
                    assert statistics is not None
                    density = _density(seen, scorer, *statistics)
                    maps = torch.where(density > high, 1, torch.where(density <= low, 0, -1))
                maps = maps.masked_fill(~seen.real, -1).flatten(1)
                # [units, layers, images, heads, patches]
                rows = torch.stack([torch.stack([r.results[name][forward] for name in layers]) for r in readers])
                rows = rows[..., seen.prefix :]
                for entropies, image in zip(maps, rows.unbind(2), strict=True):
                    dense, sparse = entropies == 1, entropies == 0
                    counts = [int(dense.sum()), int(sparse.sum())]
                    if all(counts):
                        means = torch.stack([image[..., dense].mean(-1), image[..., sparse].mean(-1)], 1)
                        kept.append(means.cpu().numpy())
                        patches.append(counts)
                        images.append(number)
                    else:
                        skipped.append(Skip(number, "no dense patch" if not counts[0] else "no sparse patch"))
                    number += 1
    if given is not None and next(given, None) is not None:
        raise DataError(f"There are more region maps than images: the tower saw {number}.")
    skipped.refuse_all(len(kept), "images")
    nats, relative = np.stack(kept, 1)
    how: dict[str, Any] = {"regions": "given" if given is not None else _name(scorer), "keys": keys}
    how |= {} if given is not None else {"threshold": [low, high]}
    return EntropyReport(layers, nats, relative, np.array(patches), tuple(images), skipped, normalize, seed, how)


def _thresholds(threshold: float | tuple[float, float]) -> tuple[float, float]:
    low, high = threshold if isinstance(threshold, tuple) else (threshold, threshold)
    if not 0 <= low <= high < 1:
        raise DataError(f"threshold={threshold!r} must lie in [0, 1); of a pair, the lower one comes first.")
    return low, high


def _name(scorer: Scorer) -> str:
    return scorer if isinstance(scorer, str) else getattr(scorer, "__name__", type(scorer).__name__)


def _statistics(
    model: nn.Module, image_mean: Sequence[float] | None, image_std: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that images were normalised with, `[3, 1, 1]` each."""
    located = fixed_tower(model)
    known = image_statistics(located.backbone, located.tower, image_mean, image_std)
    mean, std = (image_mean, image_std) if known is None else known
    if mean is None or std is None or len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise DataError(
            f"image_mean={mean}, image_std={std} must be three numbers each, deviations above 0: what the images of "
            f"this {located.backbone.name} tower were normalised with, which scores of pages need. Or give regions=...."
        )
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def _density(seen: TowerPass, scorer: Scorer, mean: Tensor, std: Tensor) -> Tensor:
    """Mean text density of each patch, `[n, rows, columns]`."""
    rows, columns = seen.grid
    patch = seen.images.shape[-2] // rows
    if seen.images.shape[-1] // columns != patch:
        raise DataError("Patches that are not square cannot be scored; give regions=... instead.")
    device = seen.images.device
    pages = seen.images[..., : rows * patch, : columns * patch].float() * std.to(device) + mean.to(device)
    low, high = float(pages.min()), float(pages.max())
    if not (low > -0.05 and high < 1.05):  # rounding in bfloat16, but no other statistics; NaN fails both
        raise DataError(
            f"Undone with image_mean={mean.flatten().tolist()} and image_std={std.flatten().tolist()}, the images "
            f"reach from {low:.3g} to {high:.3g} instead of 0 to 1. Say what they were normalised with."
        )
    return score(pages.clamp(0, 1), scorer, patch, "mean")


def _given(regions: Iterator[Any], seen: TowerPass, number: int) -> Tensor:
    """The user's region maps for the images of one forward, int64 `[n, rows, columns]`."""
    maps = []
    for _ in seen.images:
        region = next(regions, None)
        if region is None:
            raise DataError(f"There are {number} region maps, but more images.")
        dense = torch.as_tensor(region)
        if (
            tuple(dense.shape) != seen.grid
            or dense.is_floating_point()
            or not bool(((dense >= -1) & (dense <= 1)).all())
        ):
            raise DataError(
                f"The region map of image {number} is {dense.dtype} {tuple(dense.shape)}; it must be {seen.grid} truth "
                "values, or integers 1 (dense), 0 (sparse), -1 (neither)."
            )
        maps.append(dense.long())
        number += 1
    return torch.stack(maps).to(seen.images.device)
