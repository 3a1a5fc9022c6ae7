"""`SCRConfig`: which loss terms of SCR are on, their weights, and what they are computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sfa_adapters.adat.scorers import Scorer, check_scorer
from sfa_adapters.errors import DataError, PlanError

__all__ = ["AUGMENTATIONS", "TERMS", "Augmentation", "Fill", "GroundingKind", "SCRConfig", "Term"]

Term = Literal["entropy", "grounding", "stability"]
TERMS: tuple[Term, ...] = get_args(Term)
GroundingKind = Literal["kl", "mass"]
Augmentation = Literal["shift", "brightness", "blur", "jpeg"]
AUGMENTATIONS: tuple[Augmentation, ...] = get_args(Augmentation)
Fill = Literal["edge", "white"]


@dataclass(frozen=True, kw_only=True)
class SCRConfig:
    """Settings of the three loss terms. The default weights are starting points, not tuned values.

    Attributes:
        entropy: Weight of the entropy term; 0 is off, here and below.
        grounding: Weight of the grounding term.
        stability: Weight of the stability term, which runs the model once more.
        warmup_steps: Steps of a linear warm-up of all weights.
        entropy_band: Lowest and highest H / log n without penalty: 0 is a sink, 1 is uniform, both are degenerate.
        vision_layers: Attention layers of the tower for the entropy term, counted among those that the host reads;
            negative ones from the last. By default the last third.
        language_layers: Attention layers of the language model for the grounding term, given in the same way.
        grounding_kind: "kl" is KL(target || attention), "mass" is -log of the attention on the evidence.
        max_rows: Most query patches of an image, and most answer tokens of a sample, that are read in one step; where
            there are more, a random choice.
        scorer: Estimates density, as in `PatchPolicy`: a name, or a function of images `[B, 3, H, W]` in [0, 1].
        dense_threshold: Patches with a density above it are text-dense.
        image_mean: Mean that pixel values were normalised with, by channel; by default that of the tower's processor.
        image_std: Standard deviation, by channel, as `image_mean`.
        augmentations: Which changes the stability term may make.
        max_shift: Longest shift in pixels of the tensor, each way.
        fill: What appears at the border of a shifted page: copies of its last row or column of pixels, or white.
        max_brightness: Largest relative change of brightness.
        max_blur: Largest standard deviation of the blur in pixels.
        jpeg_quality: Lowest and highest JPEG quality.
        block_bytes: Size of the logits that are in memory at a time, in bytes; a few times as much is used.
        seed: Of augmentations and random choices.

    Raises:
        DataError: A field cannot be used; names it and its value.
    """

    entropy: float = 0.02
    grounding: float = 0.3
    stability: float = 0.3
    warmup_steps: int = 0
    entropy_band: tuple[float, float] = (0.3, 0.7)
    vision_layers: Sequence[int] | None = None
    language_layers: Sequence[int] | None = None
    grounding_kind: GroundingKind = "kl"
    max_rows: int = 128
    scorer: Scorer = "density"
    dense_threshold: float = 0.3
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None
    augmentations: Sequence[Augmentation] = AUGMENTATIONS
    max_shift: int = 2
    fill: Fill = "edge"
    max_brightness: float = 0.1
    max_blur: float = 0.5
    jpeg_quality: tuple[int, int] = (60, 95)
    block_bytes: int = 2**23
    seed: int = 0

    def __post_init__(self) -> None:
        for name in TERMS:
            self._require(name, _is_number(self.weight(name)) and self.weight(name) >= 0, "a number, at least 0")
        for name in ("warmup_steps", "seed"):
            self._require(name, _is_whole(getattr(self, name)) and getattr(self, name) >= 0, "whole, at least 0")
        for name in ("max_rows", "max_shift", "block_bytes"):
            self._require(name, _is_whole(getattr(self, name)) and getattr(self, name) >= 1, "whole, at least 1")
        band, low_high = self.entropy_band, "two numbers 0 <= low <= high <= 1"
        self._require("entropy_band", _is_pair(band) and 0 <= band[0] <= band[1] <= 1, low_high)
        for name in ("vision_layers", "language_layers"):
            layers = getattr(self, name)
            whole = layers is None or (_is_listed(layers) and len(layers) > 0 and all(map(_is_whole, layers)))
            self._require(name, whole, "None or a list of layer numbers, not empty")
        self._require("grounding_kind", self.grounding_kind in get_args(GroundingKind), "'kl' or 'mass'")
        self._require("fill", self.fill in get_args(Fill), "'edge' or 'white'")
        self._require(
            "dense_threshold", _is_number(self.dense_threshold) and 0 <= self.dense_threshold < 1, "in [0, 1)"
        )
        for name in ("max_brightness", "max_blur"):
            value, most = getattr(self, name), 1 if name == "max_brightness" else 10
            self._require(name, _is_number(value) and 0 < value <= most, f"in (0, {most}]")
        quality = self.jpeg_quality
        in_order = _is_pair(quality) and all(map(_is_whole, quality)) and 1 <= quality[0] <= quality[1] <= 100
        self._require("jpeg_quality", in_order, "two whole numbers 1 <= low <= high <= 100")
        known = _is_listed(self.augmentations) and set(self.augmentations) <= set(AUGMENTATIONS)
        self._require("augmentations", known, f"a list out of {list(AUGMENTATIONS)}")
        self._require(
            "augmentations", bool(self.augmentations) or not self.stability, "not empty while stability is on"
        )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            three = value is None or (_is_listed(value) and len(value) == 3 and all(map(_is_number, value)))
            positive = name == "image_mean" or value is None or (three and min(value) > 0)
            self._require(name, three and positive, "three numbers, and deviations above 0")
        try:
            check_scorer(self.scorer, "mean")
        except PlanError as error:
            raise DataError(str(error)) from None

    def weight(self, term: Term) -> float:
        """Weight of a term, without warm-up."""
        return getattr(self, term)

    @property
    def active(self) -> tuple[Term, ...]:
        """The terms that are on."""
        return tuple(name for name in TERMS if self.weight(name) > 0)

    def warmth(self, step: int) -> float:
        """Factor of the warm-up on all weights, in (0, 1].

        Args:
            step: Number of the optimiser step, from 0.
        """
        return min(1.0, (step + 1) / (self.warmup_steps + 1))

    def _require(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise DataError(f"{name}={getattr(self, name)!r} must be {wanted}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
