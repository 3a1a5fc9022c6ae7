"""`SFAConfig`: the options of SFA, saved with an adapter."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from sfa_adapters.adapter_folder import complete_folder
from sfa_adapters.attention import check_backend
from sfa_adapters.axial import AXES, LayerHeads, check_start, first_heads, read_heads
from sfa_adapters.bias import TERMS, check_bias_options, check_blocks_used
from sfa_adapters.block_maps import check_block_map, default_block_map
from sfa_adapters.choices import DEFAULT_TERMS
from sfa_adapters.errors import AdapterMismatchError, InjectionError, LayoutError, SFAWarning
from sfa_adapters.peft_type import SFA_PEFT_TYPE

__all__ = ["FORMAT_VERSION", "SFAConfig"]

# Increased when saved adapters change meaning; a newer format is refused, because unknown keys would be dropped.
FORMAT_VERSION = 1


@dataclass
class SFAConfig(PeftConfig):
    """Configuration of a structural attention bias.

    Args:
        layers_to_transform: Attention layers of the tower that get a bias: one index, a list, or None for all that
            the host reads. Negative indices count from the last layer.
        num_blocks: Block scalars per head, for the term `block`; by default the number of blocks of `block_grid` or
            `block_map` (16).
        block_grid: Rows and columns of the partition of the page into blocks; 4x4 by default.
        block_map: Any integer map `[m][n]` instead of `block_grid`; it is stretched over the page.
        init: How the scalars start: `normal`, all with standard deviation `init_std`, as published; or `axial`: in each
            layer a third of the heads (at least one) with `w_row = init_strength`, as many others with
            `w_col = init_strength`, every other scalar as in `normal`. Layers with a single head stay normal.
        init_std: Standard deviation of the initial values.
        init_strength: Logits that the chosen scalars of `axial` start with.
        init_warmup_steps: Optimizer steps over which the strength of `axial` rises from 0; `AxialRamp` or
            `SFATrainerMixin` must step it. 0: full strength from the beginning.
        init_heads: Which heads `axial` takes, `{layer: {"row": [heads], "col": [heads]}}`, e.g. by `calibrate_axial`;
            layers that are not named stay normal. By default the first heads of each layer.
        terms: Which of `row`, `col`, `dist`, `block` are on. By default the first two; `published()` has all four.
        backend: `auto`, `lines`, `blocked`, `triton`, `folded` or `dense`, see `sfa_adapters.attention`.
        mask_cache_mb: Memory in MB that `auto` may spend, over all layers, on dense masks kept between forwards without
            gradients. 0 keeps none.
        keep_float32: Whether the scalars stay float32 when the model is cast (`model.to(torch.bfloat16)`, `.half()`).
            Leave it on for training: in bfloat16 small optimizer steps round to nothing.
        modules_to_save: Modules apart from SFA that PEFT trains and saves, e.g. the projector.
        target_modules: Filled in at injection with the attention modules; leave it None, and choose layers with
            `layers_to_transform`.
        tower_path: Path of the tower in the model, for hosts with several; filled in at injection for those.
        tower: Filled in at injection: the signature of the tower that the adapter was made for, checked when it is
            loaded.
        init_warmup_done: Filled in by `AxialRamp`: warm-up steps taken.
        format_version: Version of the file format.

    Raises:
        InjectionError: An option has a wrong value; names the field and the value.
        AdapterMismatchError: The file was written by a newer version of this library.
    """

    layers_to_transform: list[int] | int | None = None
    num_blocks: int | None = None
    block_grid: tuple[int, int] | None = None
    block_map: list[list[int]] | None = None
    init: str = "normal"
    init_std: float = 0.02
    init_strength: float = 3.0
    init_warmup_steps: int = 0
    init_heads: dict[int, LayerHeads] | None = None
    terms: list[str] = field(default_factory=lambda: list(DEFAULT_TERMS))
    backend: str = "auto"
    mask_cache_mb: float = 256.0
    keep_float32: bool = True
    modules_to_save: list[str] | None = None
    target_modules: list[str] | str | None = None
    tower_path: str | None = None
    tower: dict[str, Any] | None = None
    init_warmup_done: int = 0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SFA_PEFT_TYPE
        if self.format_version > FORMAT_VERSION:
            raise AdapterMismatchError(
                f"This adapter has format_version={self.format_version}; this version of sfa-adapters reads up to "
                f"{FORMAT_VERSION}. Upgrade sfa-adapters."
            )
        if self.tower is not None and not isinstance(self.tower, dict):
            raise AdapterMismatchError(f"tower={self.tower!r} is not what injection fills in; leave it out.")
        if isinstance(self.terms, str):
            raise InjectionError(f"terms={self.terms!r} must be a list, e.g. terms=[{self.terms!r}].")
        self.terms = [term for term in TERMS if term in self.terms] + [t for t in self.terms if t not in TERMS]
        check_backend(self.backend)
        if not self.mask_cache_mb >= 0:
            raise InjectionError(f"mask_cache_mb={self.mask_cache_mb} must be at least 0.")
        if self.target_modules is not None and self.tower is None:
            raise InjectionError(
                f"target_modules={self.target_modules!r}: SFA finds the attention modules of the vision tower itself. "
                "Leave it out, and choose layers with layers_to_transform=[...]."
            )
        self._check_blocks()
        assert self.num_blocks is not None
        check_bias_options(num_blocks=self.num_blocks, init_std=self.init_std, terms=self.terms)
        self._check_init()

    def _check_init(self) -> None:
        check_start(self.init, self.init_strength, self.terms)
        for name in ("init_warmup_steps", "init_warmup_done"):
            steps = getattr(self, name)
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
                raise InjectionError(f"{name}={steps!r} must be a whole number of at least 0.")
        if self.init_heads is not None:
            self.init_heads = read_heads(self.init_heads)  # JSON gives text as keys
        for name, default in (("init_warmup_steps", 0), ("init_heads", None)):
            if self.init != "axial" and getattr(self, name) != default:
                raise InjectionError(f"{name}={getattr(self, name)!r} belongs to init='axial', but init={self.init!r}.")

    @classmethod
    def published(cls, **options: Any) -> SFAConfig:
        """The configuration in which the method was published, whatever the defaults are.

        All four terms, 4x4 blocks, and scalars initialised as normal with standard deviation 0.02.

        Args:
            **options: Options that differ from it.

        Raises:
            InjectionError: As `SFAConfig`.
        """
        as_published = {"terms": list(TERMS), "init": "normal", "init_std": 0.02}
        blocks = {} if {"num_blocks", "block_grid", "block_map"} & options.keys() else {"block_grid": (4, 4)}
        return cls(**{**as_published, **blocks, **options})

    @property
    def waits_for_ramp(self) -> bool:
        """Whether the axial start has a warm-up of which no step was taken."""
        return self.init_warmup_steps > 0 and self.init_warmup_done == 0

    def strong_heads(self, layer: int, num_heads: int) -> LayerHeads:
        """Heads of a layer that start strong, by term; only terms that are on.

        Args:
            layer: Number of the layer in the tower.
            num_heads: Its heads. Heads of `init_heads` beyond them are left out: a saved adapter keeps the choice that
                it began with, also for a tower that was pruned since.
        """
        if self.init != "axial":
            return {}
        heads = first_heads(num_heads) if self.init_heads is None else self.init_heads.get(layer, {})
        return {axis: [n for n in heads.get(axis, []) if n < num_heads] for axis in AXES if axis in self.terms}

    def _check_blocks(self) -> None:
        if self.block_map is not None and self.block_grid is not None:
            raise InjectionError(f"block_map and block_grid={self.block_grid} exclude each other; give one of them.")
        if self.block_map is None:
            if self.block_grid is None and self.num_blocks is not None:
                side = math.isqrt(max(self.num_blocks, 0))
                if side * side != self.num_blocks or side == 0:
                    raise InjectionError(
                        f"num_blocks={self.num_blocks} is not a square; say how the page is cut with "
                        "block_grid=(rows, columns)."
                    )
                self.block_grid = (side, side)
            rows, columns = self.block_grid or (4, 4)
            self.block_grid = (rows, columns)  # JSON gives a list back
            if rows < 1 or columns < 1:
                raise InjectionError(f"block_grid={self.block_grid} must be two numbers of at least 1.")
            needed = rows * columns
        else:
            try:
                needed = int(check_block_map(torch.tensor(self.block_map)).max()) + 1
            except (LayoutError, ValueError, TypeError) as error:
                raise InjectionError(f"block_map is not a map of block ids: {error}") from None
        if self.num_blocks is None:
            self.num_blocks = needed
        if self.num_blocks < needed:
            raise InjectionError(f"num_blocks={self.num_blocks} is too few for the {needed} blocks of the page.")
        if self.tower is None:  # a saved adapter keeps the options that it was made with
            check_blocks_used(self.block_map is not None, "block_map", self.terms)
            check_blocks_used(self.block_grid != (4, 4), f"block_grid={self.block_grid}", self.terms)
            check_blocks_used(self.num_blocks != 16, f"num_blocks={self.num_blocks}", self.terms)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves as PEFT does, then completes the other files of the folder, see `sfa_adapters.adapter_folder`.

        Warns if the axial start has a warm-up that never ran.

        Args:
            save_directory: The folder of the adapter.
            **kwargs: As PEFT's.
        """
        if self.waits_for_ramp and self.tower is not None:
            warnings.warn(
                f"This adapter is saved with init_warmup_steps={self.init_warmup_steps}, but AxialRamp.step() never "
                "ran: its axial start is at strength 0. Train with SFATrainerMixin, or step AxialRamp(model) after "
                "each optimizer.step().",
                SFAWarning,
                stacklevel=2,
            )
        super().save_pretrained(save_directory, **kwargs)
        complete_folder(Path(save_directory))

    def block_map_tensor(self) -> Tensor:
        """The map from places on the page to block ids, `[m, n]`, int64."""
        if self.block_map is not None:
            return torch.tensor(self.block_map)
        assert self.block_grid is not None
        return default_block_map(self.block_grid)
