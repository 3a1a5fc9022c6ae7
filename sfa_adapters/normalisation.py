"""Mean and standard deviation that images are normalised with: those of the tower, or the user's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sfa_adapters.registry import Backbone

__all__ = ["Statistics", "image_statistics"]

# Mean and standard deviation by channel, of pixels in [0, 1].
Statistics = tuple[Sequence[float], Sequence[float]]


def image_statistics(
    backbone: Backbone | None,
    tower: nn.Module | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Statistics | None:
    """Mean and standard deviation of a tower's images, by channel; None where one of them is not known.

    Args:
        backbone: The record of the tower, which knows its image processor; None where there is no tower.
        tower: The tower.
        mean: The user's mean, which takes precedence.
        std: The user's standard deviation, which takes precedence.

    Returns:
        Mean and standard deviation, one number per channel each, of pixels in [0, 1].
    """
    known = None if backbone is None or tower is None else backbone.statistics_of(tower)
    known = known or (None, None)
    mean = known[0] if mean is None else mean
    std = known[1] if std is None else std
    return None if mean is None or std is None else (tuple(mean), tuple(std))
