"""What images come into a vision tower: one record of a call, and one watcher, for all who have to know.

Where tokens lie follows from the images that a tower is called with. SFA, ADAT, DyMU, FastV, SCR and the analyses see
them here, through the record of the tower's kind (`Backbone`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from sfa_adapters.arrangement import ImageTokens, TokenArrangement
from sfa_adapters.hooks import attach, attached_while, attachment_of
from sfa_adapters.patch_groups import PatchGroups
from sfa_adapters.registry import Backbone, Geometry

__all__ = ["TowerInput", "arrangement_of", "watch_input", "watching_input"]


@dataclass(frozen=True)
class _Place:
    tower: nn.Module
    backbone: Backbone
    geometry: Geometry


class TowerInput:
    """What a tower, or the module in it that takes its images, is called with.

    Attributes:
        tower: The tower.
        module: The module that is called.
        args: Its arguments.
        kwargs: Likewise.
    """

    def __init__(self, place: _Place, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._place, self.tower = place, place.tower
        self.module, self.args, self.kwargs = module, args, kwargs

    @property
    def images(self) -> Any:
        """Images `[n, 3, H, W]`, or patches in rows for towers that work on segments; whatever was given, or None."""
        if self.args:
            return self.args[0]
        names = ("pixel_values", "hidden_states", "x")
        return next((self.kwargs[name] for name in names if self.kwargs.get(name) is not None), None)

    def argument(self, name: str, position: int) -> Any:
        """Another argument, or None."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    @property
    def patch_groups(self) -> PatchGroups | None:
        """The form of patches in rows; None for images, and where it is not known."""
        return self._place.backbone.patch_groups_of(self.tower)

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches where all images share one grid, else None."""
        arrangement = self.arrangement()
        return arrangement.grid if arrangement is not None and arrangement.joined == "batch" else None

    def arrangement(self) -> TokenArrangement | None:
        """How the tokens lie; None where the input does not say.

        Raises:
            LayoutError: The input says something impossible: no image, or a grid that has no whole merge groups.
        """
        backbone, geometry = self._place.backbone, self._place.geometry
        assert backbone.layouts is not None
        images = backbone.layouts(self.module, self.args, self.kwargs)
        if images is None and backbone.joined == "batch" and geometry.grid is not None:
            images = ImageTokens(geometry.grid)
        if images is None or isinstance(images, TokenArrangement):
            return images
        images = (images,) if isinstance(images, ImageTokens) else tuple(images)
        return TokenArrangement(backbone.joined, images, geometry.prefix_tokens)


def arrangement_of(tower: nn.Module, backbone: Backbone, images: Tensor, **kwargs: Any) -> TokenArrangement | None:
    """How the tokens of a forward would lie; None where its arguments do not say.

    Args:
        tower: The tower.
        backbone: Its record.
        images: What its image module takes first, images or patches in rows; the shape is enough.
        kwargs: Its other arguments.

    Raises:
        LayoutError: As in `TowerInput.arrangement`.
    """
    module = tower.get_submodule(backbone.image_module)
    return TowerInput(_Place(tower, backbone, backbone.geometry(tower)), module, (images,), kwargs).arrangement()


def watch_input(tower: nn.Module, backbone: Backbone, feature: str, state: Any, images: str | None = None) -> None:
    """Lets a feature see the input of every forward of a tower, until it is detached.

    Args:
        tower: The tower.
        backbone: Its record.
        feature: Name of the feature.
        state: Its state; `state.record_input` is called with a `TowerInput`.
        images: Path in the tower of the module to watch; `Backbone.image_module` by default.
    """
    module = tower.get_submodule(backbone.image_module if images is None else images)
    place = _Place(tower, backbone, backbone.geometry(tower))
    attach(module, feature, state, place=place, pre=partial(_record, feature))


def _record(feature: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    attachment = attachment_of(module, feature)
    attachment.state.record_input(TowerInput(attachment.place, module, args, kwargs))


@contextmanager
def watching_input(
    tower: nn.Module, backbone: Backbone, feature: str, record: Callable[[TowerInput], None], state: Any = None
) -> Iterator[None]:
    """Sees the input of a tower for a while.

    Args:
        tower: The tower.
        backbone: Its record.
        feature: Who watches, for `features_of`.
        record: Called with the input of each forward.
        state: What `features_of` gives for the feature.
    """
    place = _Place(tower, backbone, backbone.geometry(tower))

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(TowerInput(place, module, args, kwargs))

    with attached_while(feature) as attach_here:
        attach_here(tower.get_submodule(backbone.image_module), state, pre=see)
        yield
