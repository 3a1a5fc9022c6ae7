"""The registry of backbones: one record says how one kind of tower is found and how a bias enters it.

A backbone is data plus a few small functions; `register_backbone` adds one, and modules named in the entry-point group
`sfa_adapters.backbones` are imported when a tower is first looked up, so third parties add towers in their own
packages.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from sfa_adapters.arrangement import ImageTokens, Joined, TokenArrangement
from sfa_adapters.attention_contract import MaskArgument, choose_mask_argument
from sfa_adapters.class_names import matches
from sfa_adapters.errors import InjectionError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.moved import know_old_names
from sfa_adapters.old_records import grid_layouts, segment_arrangements
from sfa_adapters.patch_groups import PatchGroups
from sfa_adapters.plugins import load_entry_points

__all__ = [
    "Backbone",
    "Geometry",
    "PatchSeam",
    "register_backbone",
    "registered_backbones",
]

know_old_names(__name__)

ENTRY_POINT_GROUP = "sfa_adapters.backbones"


@dataclass(frozen=True)
class Geometry:
    """What a tower looks like before it has seen an image.

    Attributes:
        grid: Rows and columns of patches at the tower's own image size, or None where any size goes (Qwen-type).
        prefix_tokens: Leading tokens without a place (CLS, registers).
    """

    grid: tuple[int, int] | None
    prefix_tokens: int


# (image module, args, kwargs of its forward) -> tokens of each image of this forward, in order. One entry, or the entry
# itself, where all images share a grid. None when the inputs do not say. A tower that joins images now in this way and
# now in that returns the whole `TokenArrangement`.
Layouts = Callable[
    [nn.Module, tuple[Any, ...], Mapping[str, Any]], ImageTokens | Sequence[ImageTokens] | TokenArrangement | None
]
# The old form of records, until 0.2. (image module, args, kwargs) -> grid of this forward.
GridOfInput = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[int, int] | None]
# (tower, its forward's args, kwargs) -> number of tokens, and a hashable description that segment layouts are built
# from.
DescribeInput = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[int, Any]]
# (that description, segment boundaries, block map) -> one layout per segment.
SegmentLayouts = Callable[[Any, tuple[int, ...], Tensor], list[TokenLayout]]


@dataclass(frozen=True, kw_only=True)
class PatchSeam:
    """Where the patches of a tower with absolute position embeddings become tokens. Paths are in the tower.

    Attributes:
        images: Module whose forward takes the images first.
        projection: The convolution that embeds a patch.
        positions: Reads the position embeddings of the tower's own grid, `[rows * columns, width]`, no prefix.
        tokens_in: Module whose forward takes the embedded tokens first (or as `inputs_embeds`).
        tokens_out: Module whose output is the sequence, a tensor or an output with `last_hidden_state`.
        check: Raises a named error for towers whose tokens cannot be exchanged.
        pools: Whether the tower pools over all tokens behind `tokens_out`, so that padding must not reach it.
        statistics: Mean and standard deviation that images of this tower are normalised with, by channel.
    """

    images: str
    projection: str
    positions: Callable[[nn.Module], Tensor]
    tokens_in: str
    tokens_out: str
    check: Callable[[nn.Module], None] | None = None
    pools: Callable[[nn.Module], bool] | None = None
    statistics: Callable[[nn.Module], tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How one kind of vision tower is adapted. Class names are patterns over `module.Class`, as in `fnmatch`.

    Attributes:
        name: Unique name, saved with adapters.
        towers: Classes of the tower: the module whose forward takes the image.
        attentions: Classes of its attention modules. Their number of heads is read from them or from their
            configuration. Where one such module holds another, the inner one is taken.
        attention_paths: Patterns over the paths of attention modules in the tower, where modules of their class also do
            something else (X-CLIP: attention over frames; MiniCPM-V: a merger with attention).
        geometry: Reads grid and prefix from a tower.
        layouts: Says how the tokens of each image of a forward lie, from the inputs of the image module: see `Layouts`.
        joined: How images are put together: `batch` (one grid), `padded` (a grid for each image), `packed` (one
            sequence under a block-diagonal mask) or `segments` (one sequence, cut at `segment_argument`).
        image_module: Path in the tower of the module whose inputs tell the grid; the tower itself by default. Name a
            child where people call other methods of the tower than its forward (timm: `forward_features`).
        mask_argument: Name of the argument of the attention module's forward that takes an additive mask. By default
            it is read from its signature (`sfa_adapters.attention_contract`).
        segment_argument: Segmented towers only: the argument of the attention's forward with the segment boundaries.
        wrap_attention: For attention modules without a mask argument: builds the module that stands in for one.
        unwrap_attention: Gives back what `wrap_attention` was given.
        check: Raises a named error for configurations of the tower that cannot carry a bias.
        unread_layers: Layers at the end whose patch tokens nobody reads, so that a bias there would get no gradient: of
            towers that give only what learned queries have gathered.
        patches: Where patches become tokens, for adaptive tokens; None where that is not supported.
        token_reduction: Segmented towers only: whether DyMU, which merges tokens, knows its windows and its merger.
        patch_groups: Segmented towers only: the form of the patches of a still image, for what reads their pixels or
            leaves some out (FastV by density, `drop_blank_groups`); None, also of one tower, where it is not known.
        statistics: Of towers without `patches`: as there.
        grid_of_input: Old form, until 0.2: the grid of a forward. Use `layouts`.
        describe_input: Old form, until 0.2: what to remember of the inputs of a segmented tower. Use `layouts`.
        segment_layouts: Old form, until 0.2: the layout of each segment. Use `layouts`.
        small_towers: Where small towers of this kind stand for the contract suite: `module:NAME` of a sequence of
            `sfa_adapters.testing.TowerCase`. Imported when the suite runs, never before.
    """

    name: str
    towers: tuple[str, ...]
    attentions: tuple[str, ...]
    attention_paths: tuple[str, ...] = ("*",)
    geometry: Callable[[nn.Module], Geometry]
    layouts: Layouts | None = None
    joined: Joined = "batch"
    image_module: str = ""
    mask_argument: str | None = None
    segment_argument: str = "cu_seqlens"
    wrap_attention: Callable[[nn.Module], nn.Module] | None = None
    unwrap_attention: Callable[[nn.Module], nn.Module] | None = None
    check: Callable[[nn.Module], None] | None = None
    unread_layers: int = 0
    patches: PatchSeam | None = None
    token_reduction: bool = False
    patch_groups: Callable[[nn.Module], PatchGroups | None] | None = None
    small_towers: str | None = None
    statistics: Callable[[nn.Module], tuple[Sequence[float], Sequence[float]] | None] | None = None
    grid_of_input: GridOfInput | None = None
    describe_input: DescribeInput | None = None
    segment_layouts: SegmentLayouts | None = None

    def __post_init__(self) -> None:
        """Brings a record of the old form into the new one.

        Raises:
            InjectionError: The record does not say how tokens lie, or says it twice.
        """
        described = [self.layouts, self.grid_of_input, self.segment_layouts]
        if sum(entry is not None for entry in described) != 1:
            raise InjectionError(f"Backbone {self.name!r} must say how tokens lie once: in layouts=...")
        if (self.segment_layouts is None) != (self.describe_input is None):
            raise InjectionError(f"Backbone {self.name!r}: segment_layouts and describe_input come together.")
        if self.layouts is not None:
            return
        old = "grid_of_input" if self.grid_of_input is not None else "describe_input and segment_layouts"
        warnings.warn(
            f"Backbone {self.name!r}: {old} will be gone in 0.2; give layouts=... (docs/adding_a_backbone.md).",
            DeprecationWarning,
            stacklevel=3,
        )
        if self.grid_of_input is not None:
            _set(self, layouts=grid_layouts(self.grid_of_input))
        else:
            assert self.describe_input is not None
            assert self.segment_layouts is not None
            _set(self, layouts=segment_arrangements(self.describe_input, self.segment_layouts), joined="segments")
        if self.mask_argument is None:
            _set(self, mask_argument="attention_mask")

    def argument_of(self, attention: nn.Module) -> MaskArgument:
        """The argument of an attention module that takes the bias, and why it is this one.

        Raises:
            UnsupportedAttentionError: It takes none.
        """
        return choose_mask_argument(attention, self.mask_argument, self.joined == "segments")

    def statistics_of(self, tower: nn.Module) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and standard deviation that images of a tower are normalised with, by channel; None if not known.

        Args:
            tower: Of this kind.
        """
        read = self.statistics if self.patches is None else self.patches.statistics
        return None if read is None else read(tower)

    def patch_groups_of(self, tower: nn.Module) -> PatchGroups | None:
        """The form of the patches that a flat tower is given; None if not known.

        Args:
            tower: Of this kind.
        """
        return None if self.patch_groups is None else self.patch_groups(tower)

    def is_tower(self, module: nn.Module) -> bool:
        """Whether the module is a tower of this kind."""
        return matches(module, self.towers)

    def is_attention(self, module: nn.Module) -> bool:
        """Whether the module is an attention layer of this kind of tower."""
        return matches(module, self.attentions)

    def adapts(self, path: str, module: nn.Module) -> bool:
        """Whether the module at a path in a tower of this kind is an attention layer that gets a bias."""
        return self.is_attention(module) and any(fnmatchcase(path, pattern) for pattern in self.attention_paths)

    def attentions_of(self, tower: nn.Module) -> list[tuple[str, nn.Module]]:
        """Path in the tower and module of each of its attention layers, in order."""
        matching = {path: module for path, module in tower.named_modules() if self.adapts(path, module)}
        # In older releases of transformers modules of this name hold the one that computes attention.
        return [
            (path, module)
            for path, module in matching.items()
            if not any(other.startswith(f"{path}.") for other in matching)
        ]

    def __reduce__(self) -> tuple[Callable[[str], Backbone], tuple[str]]:
        """Pickled and copied as its name: records hold functions, often lambdas, which cannot be pickled.

        Raises:
            InjectionError: The record is not registered, so a name would not bring it back.
        """
        if _registered(self.name) is not self:
            raise InjectionError(f"Another record than this one is registered under the name {self.name!r}.")
        return _registered, (self.name,)


def _set(record: Backbone, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(record, name, value)


_BACKBONES: dict[str, Backbone] = {}
_loaded_entry_points: set[str] = set()


def register_backbone(backbone: Backbone) -> Backbone:
    """Adds a backbone.

    Raises:
        InjectionError: The name is taken, or two functions that belong together are not both there.
    """
    if backbone.name in _BACKBONES:
        raise InjectionError(f"A backbone named {backbone.name!r} is registered already; choose another name.")
    if (backbone.wrap_attention is None) != (backbone.unwrap_attention is None):
        raise InjectionError(f"Backbone {backbone.name!r}: wrap_attention and unwrap_attention come together.")
    _BACKBONES[backbone.name] = backbone
    return backbone


def registered_backbones() -> dict[str, Backbone]:
    """All backbones by name, those of installed packages included."""
    load_entry_points(ENTRY_POINT_GROUP, _loaded_entry_points)
    return dict(_BACKBONES)


def _registered(name: str) -> Backbone:
    record = registered_backbones().get(name)
    if record is None:
        raise InjectionError(
            f"The backbone {name!r} is not registered. Models with SFA are pickled with the name of their backbone: "
            "call register_backbone, or install the package that does, before the model is saved or loaded."
        )
    return record
