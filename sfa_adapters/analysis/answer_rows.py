"""Attention of a language model from an answer token to the image tokens, arranged as they lie on the page."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from sfa_adapters.analysis.forward import Heads, Layers, chosen_layers, over_heads, to_device
from sfa_adapters.analysis.prompts import IMAGE, Aligned, TokenKinds, answer_lengths, decoder_layers, prompt_groups
from sfa_adapters.errors import DataError, NoMatchingBackboneError, ObservationError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.observe import observe
from sfa_adapters.readers import RowProbabilities
from sfa_adapters.tower_search import find_tower

__all__ = ["answer_attention"]


def answer_attention(
    model: Any,
    inputs: Mapping[str, Any],
    token: int,
    layers: Layers,
    heads: Heads,
    index: int,
    grid: tuple[int, int] | None,
    image_token_id: int | Collection[int] | None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Attention of the query that predicts a token of the greedy answer; arguments as in `attention_map`.

    Returns:
        Shares of attention on the image tokens, `[rows, columns]`, and how they were measured.

    Raises:
        DataError: A number does not exist, prompts are padded on the right, or the image tokens have no known grid.
        ObservationError: Attention cannot be read.
    """
    kinds = TokenKinds.of(model, image_token_id, True, True, None, None)
    inputs = to_device(inputs, model)
    groups = prompt_groups(inputs, kinds)
    if token < 0 or not 0 <= index < len(groups):
        raise DataError(f"answer_token={token}, index={index}: tokens and the {len(groups)} prompts count from 0.")
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise DataError("Pad prompts on the left: the last token of a prompt predicts the first one of its answer.")
    places = (groups[index] == IMAGE).nonzero()[:, 0]
    rows, columns = _token_grid(model, inputs, len(places), index, grid)
    names = chosen_layers(decoder_layers(model), layers)
    reader = RowProbabilities(queries="last")
    with evaluating(model), observe(model, [reader, Aligned(groups.shape[1])], modules=names):
        new = model.generate(
            **{**inputs, "do_sample": False, "num_beams": 1, "use_cache": True, "return_dict_in_generate": False},
            max_new_tokens=token + 1,
        )[:, groups.shape[1] :]
    length = int(answer_lengths(new, model)[index])
    if token >= length:
        raise DataError(f"answer_token={token}: the answer has {length} tokens, from 0, its end token included.")
    if any(len(reader.results[name]) != new.shape[1] for name in names):
        raise ObservationError(f"{new.shape[1]} tokens were generated, but not one by one.")
    row = over_heads(torch.stack([reader.results[name][token][index, :, 0] for name in names]).mean(0), heads)
    values = row[places].double().cpu().numpy()
    how = {"query": "answer token", "answer_token": token, "token_id": int(new[index, token])}
    how |= {"layers": list(names), "heads": heads}
    return values[: rows * columns].reshape(rows, columns), how


def _token_grid(
    model: nn.Module, inputs: Mapping[str, Any], count: int, index: int, grid: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns in which `count` image tokens lie on the page; one newline token may follow them."""
    options = [grid]
    if grid is None:
        sizes = inputs.get("image_grid_thw")
        config: Any = getattr(model, "config", None)
        if sizes is not None and len(sizes) > index:
            merge = int(getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1))
            options = [(int(sizes[index, 1]) // merge, int(sizes[index, 2]) // merge)]
        else:
            options = _merged_grids(model)
    for option in options:
        if option is not None and count in (option[0] * option[1], option[0] * option[1] + 1):
            return option
    raise DataError(
        f"The prompt has {count} image tokens, which is none of the grids {[o for o in options if o]} (one more for a "
        "newline). Give prompts with one image of one tile, or say how its tokens lie: grid=(rows, columns)."
    )


def _merged_grids(model: nn.Module) -> list[tuple[int, int] | None]:
    try:
        located = find_tower(model)
    except NoMatchingBackboneError:
        return []
    patches = located.backbone.geometry(located.tower).grid
    if patches is None:
        return []
    return [(patches[0] // s, patches[1] // s) for s in (1, 2, 3, 4) if patches[0] % s == patches[1] % s == 0]
