"""Which token of the tower each image token of the language model comes from.

A host drops CLS, makes one token of four, or packs the tiles of an image with newline tokens in between. DyMU needs to
know which image tokens are equal because they were merged. For hosts that pack tiles, their own packing method is run
once more, on coordinates in place of features, so that cutting, resizing and newlines agree: the method of that one
model is watched, because no module runs there that could have a hook.

Shape letters: I pictures that the tower saw (tiles, too), P tokens of a picture, F image tokens of all prompts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.hooks import features_of
from sfa_adapters.reduction.dymu.tower import TowerState
from sfa_adapters.tower_search import FoundTower
from sfa_adapters.vlm.parts import find_decoder
from sfa_adapters.vlm.records import find_spec, registered_vlms

__all__ = ["PACK", "HostTokens", "ImageKeys", "find_host", "packed_keys"]

PACK = "pack_image_features"  # the method of the hosts that pack tiles


@dataclass(frozen=True, eq=False)
class ImageKeys:
    """Which image tokens were merged into one.

    Attributes:
        key: Equal for tokens that were merged into one, `[F]`, int64 from 0.
        is_represented: True for the representative of each merged token, bool `[F]`.
        count: One more than the largest possible key.
    """

    key: Tensor
    is_represented: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class HostTokens:
    """The modules of a host whose image tokens DyMU can shorten, and how it makes them.

    Attributes:
        core: The module that holds tower, projector and language model.
        tower: The tower.
        language_model: Its language model.
        kind: As in `ImageTokens`.
        side: Patches along one side of an image token.
        feature_layers: The hidden states of the tower that are read.
    """

    core: nn.Module
    tower: nn.Module
    language_model: nn.Module
    kind: str
    side: int
    feature_layers: tuple[int, ...]

    def picture_keys(self, state: TowerState) -> ImageKeys | None:
        """Keys of the image tokens of the pictures that the tower has just seen; None where nothing merged.

        Args:
            state: State of the tower.

        Returns:
            Keys `[F]`; for hosts that pack tiles `[I, P]`, still to be packed.
        """
        tokens = state.tokens
        if tokens is None or not tokens.history:
            return None
        merged = tokens.history[min(state.feature_layer, len(tokens.history) - 1)]
        if tokens.packed:
            keys = _of_adaptive_tokens(self.tower, merged, self.side)
        elif merged is None:
            return None
        elif self.kind == "merged_groups":
            assert state.window_index is not None
            index = state.window_index.to(merged.owner.device)
            key, represented = torch.empty_like(merged.owner), torch.empty_like(merged.is_represented)
            key[index], represented[index] = merged.owner, merged.is_represented
            return ImageKeys(key, represented, len(merged.size))
        else:
            images = len(tokens.lengths)
            keys = ImageKeys(merged.owner.view(images, -1), merged.is_represented.view(images, -1), len(merged.size))
        keys = self._with_prefix(keys, state.prefix)
        if self.kind == "packed_tiles":
            return keys
        return ImageKeys(keys.key.flatten(), keys.is_represented.flatten(), keys.count)

    @property
    def _strategy(self) -> str:
        config: Any = self.core.config
        return getattr(config, "vision_feature_select_strategy", "full")

    def _with_prefix(self, keys: ImageKeys, prefix: int) -> ImageKeys:
        """Adds keys of prefix tokens, which never merge; the strategy "default" drops the first token of all."""
        images = len(keys.key)
        prefix_keys = torch.arange(images * prefix, device=keys.key.device).view(images, prefix) + keys.count
        drop = 1 if self._strategy == "default" else 0
        key = torch.cat((prefix_keys, keys.key), 1)[:, drop:]
        is_represented = torch.cat((torch.ones_like(prefix_keys, dtype=torch.bool), keys.is_represented), 1)[:, drop:]
        return ImageKeys(key, is_represented, keys.count + images * prefix)


def find_host(model: nn.Module, located: FoundTower, strict: bool = True) -> HostTokens | None:
    """The host around a tower; None for a bare tower.

    Args:
        model: A model that holds the tower.
        located: The tower.
        strict: Whether a host of another kind is an error; if not, the result is None.

    Raises:
        InjectionError: It is a host whose image tokens DyMU cannot shorten.
    """
    if not located.name:
        return None
    core: Any = model.get_submodule(located.name.rpartition(".")[0])
    language_model = _language_model(core)
    spec = find_spec(core)
    tokens = None if spec is None or spec.refusal("dymu") is not None else spec.image_tokens
    if tokens is None or language_model is None:
        if not strict:
            return None
        reason = None if spec is None else spec.refusal("dymu")
        known = [record.title for record in registered_vlms().values() if record.refusal("dymu") is None]
        raise InjectionError(
            f"{type(core).__name__} puts image tokens into its text in a way that DyMU does not know"
            f"{f' ({reason})' if reason else ''}. It takes {', '.join(known)}; DyMUConfig(language='off') merges in "
            "the tower only."
        )
    config: Any = core.config
    kind, side = tokens.kind, tokens.side(config)
    layers: Any = getattr(config, "vision_feature_layer", -1)
    layers = tuple(layers) if isinstance(layers, (list, tuple)) else (int(layers),)
    return HostTokens(core, located.tower, language_model, kind, side, layers)


def _language_model(core: nn.Module) -> nn.Module | None:
    try:
        return find_decoder(core).module
    except InjectionError:  # what it is is asked later, and named
        return getattr(core, "language_model", None)


def packed_keys(core: Any, keys: ImageKeys, method: Any, called: dict[str, Any]) -> ImageKeys:
    """Packs the keys of tokens the way the host packs features, by running its method on their coordinates.

    Args:
        core: The host's core.
        keys: Keys of pictures, `[I, P]`.
        method: The packing method of the core.
        called: Its arguments by name, the core included.

    Returns:
        Keys of the packed image tokens, `[F]`.

    Raises:
        LayoutError: The tower saw other tokens than the host packs.
    """
    config, home = core.config, sys.modules[type(core).__module__]
    tiles = [len(part) for part in called["image_features"]]
    tile, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    count = tile // config.vision_config.patch_size
    if sum(tiles) != len(keys.key) or keys.key.shape[1] != count**2:
        raise LayoutError(
            f"The tower saw {tuple(keys.key.shape)} tokens; {type(core).__name__} packs {sum(tiles)} tiles of {count}x"
            f"{count}."
        )
    device = keys.key.device
    row, column = (part.flatten() for part in torch.meshgrid(*(torch.arange(count, device=device),) * 2, indexing="ij"))
    features, columns = [], []
    for size, number in zip(called["image_sizes"], tiles, strict=True):
        wide = home.get_anyres_image_grid_shape(size, pinpoints, tile)[1] if number > 1 else 1
        which = torch.arange(number, device=device)[:, None] - (1 if number > 1 else 0)  # the first one is the page
        down, right = which // wide * count + row, which % wide * count + column
        kind = torch.full_like(down, 2)
        if number > 1:
            kind[0], down[0], right[0] = 1, row, column
        features.append(torch.stack((kind, down, right), -1).double())
        columns.append(wide)
    arguments = {**called, "image_features": features}
    if arguments.get("image_newline") is not None:
        arguments["image_newline"] = torch.zeros(3, dtype=torch.float64, device=device)
    packed, _ = method(**arguments)
    start, token_keys, represented, total = 0, [], [], keys.count
    for places, number, wide in zip(packed, tiles, columns, strict=True):
        kind, down, right = places.round().long().unbind(-1)  # where tokens were resized, the nearest one counts
        which = torch.where(kind == 2, down // count * wide + right // count + (1 if number > 1 else 0), 0)
        inside = (start + which, down % count * count + right % count)
        is_newline = kind == 0
        fresh = total + is_newline.cumsum(0) - 1
        token_keys.append(torch.where(is_newline, fresh, keys.key[inside]))
        represented.append(is_newline | keys.is_represented[inside])
        start, total = start + number, total + len(places)
    return ImageKeys(torch.cat(token_keys), torch.cat(represented), total)


def _of_adaptive_tokens(tower: nn.Module, merged: Any, side: int) -> ImageKeys:
    """Equal keys for patches in the same adaptive token, or in adaptive tokens that were merged."""
    adat = features_of(tower)["adat"]
    token_keys, first, start = [], 0, 0
    for plan in adat.plans:
        patch, token, _ = plan.grid_pairs()
        owner = torch.arange(plan.num_tokens) if merged is None else merged.owner[start : start + plan.num_tokens].cpu()
        start += plan.num_tokens
        patches = plan.uniform_tokens
        pairs = torch.zeros(patches, dtype=torch.long).index_add(0, patch, torch.ones_like(patch))
        represented = torch.zeros(patches, dtype=torch.long).index_copy(0, patch, owner[token])
        # A patch in several tokens is a mixture that no other patch has.
        label = torch.where(pairs == 1, represented, int(owner.max()) + 1 + torch.arange(patches))
        if side > 1:
            height, width = (length // plan.patch for length in plan.image_size)
            grid = label.view(height // side, side, width // side, side).permute(0, 2, 1, 3).reshape(-1, side**2)
            label = torch.unique(grid, dim=0, return_inverse=True)[1]
        label = torch.unique(label, return_inverse=True)[1] + first
        first = int(label.max()) + 1
        token_keys.append(label)
    key = torch.stack(token_keys)
    device = next(tower.parameters()).device
    # The first patch of a token represents it.
    place = torch.arange(key.numel())
    earliest = torch.full((first,), key.numel()).scatter_reduce(0, key.flatten(), place, "amin")
    represented = (earliest[key.flatten()] == place).view_as(key)
    return ImageKeys(key.to(device), represented.to(device), first)
