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
from sfa_adapters.class_names import matches, qualified_name
from sfa_adapters.errors import InjectionError, NoMatchingBackboneError
from sfa_adapters.hooks import state_of
from sfa_adapters.layout import TokenLayout
from sfa_adapters.moved import know_old_names
from sfa_adapters.old_records import grid_layouts, segment_arrangements
from sfa_adapters.patch_groups import PatchGroups
from sfa_adapters.plugins import load_entry_points
from sfa_adapters.read_layers import count_read_layers
from sfa_adapters.refusals import refusal_of

__all__ = [
    "Backbone",
    "FoundTower",
    "Geometry",
    "PatchSeam",
    "find_tower",
    "register_backbone",
    "registered_backbones",
    "tower_paths",
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


@dataclass(frozen=True)
class FoundTower:
    """A tower inside a model.

    Attributes:
        name: Its path in the model, "" for the model itself.
        tower: The tower.
        backbone: Its record.
        attentions: Its attention modules in order of execution, by path in the model.
        used_layers: How many of them the host really reads, counted from the first.
        several: Whether the model has more towers than this one.
    """

    name: str
    tower: nn.Module
    backbone: Backbone
    attentions: tuple[tuple[str, nn.Module], ...]
    used_layers: int
    several: bool = False


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


def find_tower(model: nn.Module, path: str | None = None) -> FoundTower:
    """Finds the vision tower of a model; text towers are left alone.

    Args:
        model: A tower, or a host with one or several.
        path: Path of the tower in the model, for hosts with several. By default the only one, or the only one that
            carries SFA already.

    Raises:
        NoMatchingBackboneError: No registered backbone fits; says why where the model is known to carry no bias, else
            lists the attention modules that were seen.
        InjectionError: Several towers fit, or none at the path.
    """
    backbones = registered_backbones()
    towers = _towers_of(model, backbones)
    if not towers:
        raise NoMatchingBackboneError(_nothing_found(model, backbones))
    name, tower, backbone = _choose_tower(model, towers, path)
    prefix = f"{name}." if name else ""
    attentions = tuple((prefix + path, module) for path, module in backbone.attentions_of(tower))
    if not attentions:
        raise NoMatchingBackboneError(
            f"{name or type(model).__name__} is a {backbone.name} tower, but none of its modules is one of "
            f"{list(backbone.attentions)}.\n{_nothing_found(tower, backbones)}"
        )
    used = min(count_read_layers(model, name, len(attentions)), len(attentions) - backbone.unread_layers)
    return FoundTower(name, tower, backbone, attentions, used, several=len(towers) > 1)


def tower_paths(model: nn.Module) -> list[str]:
    """Paths of the vision towers of a model that are known, "" for the model itself."""
    return [name for name, _, _ in _towers_of(model, registered_backbones())]


def _towers_of(model: nn.Module, backbones: Mapping[str, Backbone]) -> list[tuple[str, nn.Module, Backbone]]:
    """Path, module and record of each tower; a tower inside another one is a part of it."""
    towers: list[tuple[str, nn.Module, Backbone]] = []
    for name, module in model.named_modules():
        if any(not outer or name.startswith(outer + ".") for outer, _, _ in towers):
            continue
        backbone = next((record for record in backbones.values() if record.is_tower(module)), None)
        if backbone is not None:
            towers.append((name, module, backbone))
    return towers


def _choose_tower(
    model: nn.Module, towers: list[tuple[str, nn.Module, Backbone]], path: str | None
) -> tuple[str, nn.Module, Backbone]:
    names = ", ".join(f"{name or '(the model)'} ({record.name})" for name, _, record in towers)
    if path is not None:
        # A PeftModel puts names of its own in front of the paths of the model that it wraps.
        fitting = [entry for entry in towers if entry[0] == path or entry[0].endswith(f".{path}")]
        if len(fitting) != 1:
            raise InjectionError(
                f"tower={path!r} is not the path of a vision tower of {type(model).__name__}; its towers: {names}."
            )
        return fitting[0]
    if len(towers) > 1:
        adapted = [entry for entry in towers if state_of(entry[1], "sfa") is not None]
        if len(adapted) != 1:
            raise InjectionError(
                f"{type(model).__name__} has several vision towers{', all with SFA' if adapted else ''}: {names}. Say "
                f"which one is meant, e.g. inject_sfa(model, tower={towers[0][0]!r}), describe(model, tower=...) or "
                "SFAConfig(tower_path=...); inject_sfa(model, tower='all') takes all of them. Elsewhere pass the tower "
                "itself."
            )
        return adapted[0]
    return towers[0]


def _nothing_found(model: nn.Module, backbones: Mapping[str, Backbone]) -> str:
    known = refusal_of(model)
    if known is not None:
        return f"No registered backbone fits {type(model).__name__}. {known}"
    seen: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if "attention" in type(module).__name__.lower() or "attn" in name.rpartition(".")[2].lower():
            seen.setdefault(qualified_name(module), []).append(name)
    lines = [f"  {kind}: {len(names)} modules, e.g. {names[0]}" for kind, names in seen.items()] or ["  none"]
    return (
        f"No registered backbone fits {type(model).__name__}. Registered: {', '.join(sorted(backbones)) or 'none'}.\n"
        "Attention modules in the model:\n" + "\n".join(lines) + "\nTo add a tower, describe it in a "
        "sfa_adapters.registry.Backbone and pass that to register_backbone (see docs/adding_a_backbone.md)."
    )


def image_grid(pixel_values: Any, patch_size: Any) -> tuple[int, int] | None:
    """Grid of an image tensor `[..., height, width]` cut into patches.

    Args:
        pixel_values: The images, or anything else, which gives None.
        patch_size: One side, or height and width, in pixels.
    """
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim < 3:
        return None
    height, width = pair(patch_size)
    return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width


def pair(value: Any) -> tuple[int, int]:
    """One number as a pair, a pair (or longer sequence) as its last two entries."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[-2]), int(value[-1]))


def pixel_grid(tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Grid of the `pixel_values` that a transformers tower or its embedding gets first, by its `patch_size`."""
    size: Any = getattr(tower, "patch_size", None)
    size = tower.config.patch_size if size is None else size  # pyright: ignore[reportAttributeAccessIssue]
    return image_grid(args[0] if args else kwargs.get("pixel_values"), size)


def pixel_layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ImageTokens | None:
    """`layouts` of transformers towers and their embeddings: one grid for all `pixel_values`, row by row."""
    grid = pixel_grid(tower, args, kwargs)
    return None if grid is None else ImageTokens(grid)


def config_grid(tower: nn.Module) -> tuple[int, int]:
    """Grid at the tower's own image size, from `config.image_size` and `config.patch_size`."""
    config: Any = tower.config
    (height, width), (patch_height, patch_width) = pair(config.image_size), pair(config.patch_size)
    return height // patch_height, width // patch_width
