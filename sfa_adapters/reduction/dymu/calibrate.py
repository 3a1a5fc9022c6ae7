"""Calibrates merge thresholds on images: at each place between two layers, the largest that merges enough tokens.

As DyMU does (arXiv 2504.17040, section 3.1): the similarities of all images of a batch are sorted together, so that
images with many similar tokens merge more and others less; the threshold of a place is the mean over the batches; and
places are calibrated one after the other, each on tokens that have merged at the earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.reduction.dymu.config import DyMUConfig
from sfa_adapters.reduction.dymu.inject import dymu_state, eject_dymu, inject_dymu, tower_signature
from sfa_adapters.reduction.dymu.merging import Pairs
from sfa_adapters.tower_search import find_tower

__all__ = ["calibrate_dymu", "see_images", "threshold_of"]


def threshold_of(score: Tensor, merges: int) -> float:
    """The largest threshold above which `merges` of the similarities lie (all of a tie count).

    Args:
        score: Similarities, `[P]`.
        merges: How many; 0 gives the threshold 1, which merges nothing. More than P gives 0.

    Returns:
        At least 0: tokens whose keys point apart are not alike, whatever the budget.
    """
    if merges <= 0 or not len(score):
        return 1.0
    if merges > len(score):
        return 0.0
    wanted = score.topk(merges).values[-1]
    return max(0.0, torch.nextafter(wanted, wanted.new_tensor(-2.0)).item())


@dataclass(eq=False)
class _Means:
    """Running means of thresholds, one per place; the `Calibrator` of `calibrate_dymu`."""

    keep: float
    merges: tuple[float, ...] | None
    places: int
    total: list[float] = field(default_factory=list)
    batches: int = 0
    units: int = 0

    def __call__(self, place: int, pairs: Pairs, images: int) -> float:
        if place == 0:
            self.units = pairs.units
            self.batches += 1
        if not self.total:
            self.total = [0.0] * self.places
        even = self.units * (1.0 - self.keep) / self.places
        wanted = even if self.merges is None else images * self.merges[place]
        threshold = threshold_of(pairs.score, round(wanted))
        self.total[place] += threshold
        return threshold


def calibrate_dymu(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    keep: float = 0.5,
    merges: float | Sequence[float] | None = None,
    config: DyMUConfig | None = None,
) -> DyMUConfig:
    """Finds merge thresholds on images.

    Use images of the kind that the model will see: on other images the same thresholds leave other numbers of tokens.

    Args:
        model: A tower, or a vision-language model with one; it is left as it was. Only the tower runs.
        batches: Batches of images as the processor of the model makes them: `pixel_values`, or mappings with it (and
            `image_grid_thw` for Qwen2.5-VL). Images of one batch share its merges, so make them large: 64 and more.
        keep: Share of the tokens that should be left on average, with as many merges at every place.
        merges: Merges per image at every place instead, one number or one per place; a group that merges whole counts
            as one.
        config: Gives the other options.

    Returns:
        The options with calibrated thresholds, for `inject_dymu` and `save_dymu`.

    Raises:
        RecipeError: `keep` or `merges` cannot be used.
        DataError: There is no batch, or one without images.
        InjectionError: The tower cannot merge, or merges already.
    """
    if not 0 < keep <= 1:
        raise RecipeError(f"keep={keep} must lie above 0 and at most at 1: the share of tokens that is left.")
    config = config or DyMUConfig()
    signature = tower_signature(model)
    places = int(signature["places"])
    wanted = None if merges is None else _per_place(merges, places)
    tower: Any = find_tower(model).tower
    means = _Means(keep, wanted, places)
    inject_dymu(model, DyMUConfig(thresholds=1.0, language="off", side=config.side))
    try:
        dymu_state(model).calibrator = means
        with evaluating(tower):
            for batch in batches:
                see_images(tower, batch)
    finally:
        eject_dymu(model)
    if not means.batches:
        raise DataError("No batch of images was given, so there is nothing to calibrate on.")
    thresholds = tuple(total / means.batches for total in means.total)
    return replace(config, thresholds=thresholds, tower=signature)


def _per_place(merges: float | Sequence[float], places: int) -> tuple[float, ...]:
    values = (float(merges),) * places if isinstance(merges, int | float) else tuple(float(m) for m in merges)
    if len(values) != places or any(not 0 <= value < float("inf") for value in values):
        raise RecipeError(f"merges={merges} must be one number from 0, or one for each of {places} places.")
    return values


def see_images(tower: Any, batch: Tensor | Mapping[str, Any]) -> None:
    """Runs the tower on the images of a batch.

    Raises:
        DataError: The batch has no images.
    """
    inputs: dict[str, Any] = {"pixel_values": batch} if isinstance(batch, Tensor) else dict(batch)
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or not len(pixels):
        raise DataError("A batch needs pixel_values, a tensor with images, as the processor of the model makes it.")
    reference = next(tower.parameters())
    pixels = pixels.to(reference.device, reference.dtype)
    if "image_grid_thw" in inputs:
        tower(pixels, grid_thw=inputs["image_grid_thw"].to(reference.device))
        return
    if pixels.ndim == 5:  # tiles of images; those that only fill the batch up are blank
        pixels = pixels.flatten(0, 1)
        pixels = pixels[pixels.flatten(1).any(1)]
    tower(pixels)
