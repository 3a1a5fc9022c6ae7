"""For tests of DyMU: a slow merging tower, prompts of different lengths, and single samples of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.layer import SFALayer
from sfa_adapters.tower_search import find_tower
from tests.support.hosts import HOSTS, IMAGE, HostCase
from tests.support.reference import Place, layer_phi, merge_heads, project

BY_NAME: dict[str, HostCase] = {host.name: host for host in HOSTS}
NAMES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl")
# At these thresholds the images of a batch keep different numbers of tokens (but for LLaVA, where each keeps half).
THRESHOLD = 0.15
GENERATE: dict[str, Any] = {
    "do_sample": False, "suppress_tokens": [2, IMAGE, IMAGE + 1, IMAGE + 2, IMAGE + 3],
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
PAD = 3


def padded(host: HostCase, seed: int = 0) -> dict[str, Any]:
    """Two prompts; the second one is shorter, and padded on the left."""
    inputs = host.inputs(seed)
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[1] = torch.cat((torch.zeros(PAD, dtype=torch.long), ids[1, :-PAD]))
    mask[1, :PAD] = 0
    inputs |= {"input_ids": ids, "attention_mask": mask}
    if host.name == "qwen2_5_vl":
        for row in ids:  # older releases count images by the token in front of them
            row[int((row == IMAGE).long().argmax()) - 1] = IMAGE + 2
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs


def single(inputs: dict[str, Any], number: int, pad: int = PAD) -> dict[str, Any]:
    """One sample of `padded`, without its padding."""
    chosen = {}
    for name, value in inputs.items():
        if name == "pixel_values" and value.ndim == 2:  # Qwen: patches of all images
            chosen[name] = value.chunk(2)[number]
        else:
            chosen[name] = value[number : number + 1]
        if number == 1 and name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            chosen[name] = chosen[name][:, pad:]
    return chosen


def slow_tower(
    tower: nn.Module, pixels: Tensor, thresholds: tuple[float, ...], places: list[Place] | None = None
) -> list[Tensor]:
    """Hidden states of one image after each layer, scattered back to the full grid; in float64 with loops.

    For CLIP and SigLIP. With `places`, SFA's bias is added: a token has the place of its representative.
    """
    model: Any = tower
    located = find_tower(tower)
    prefix = located.backbone.geometry(tower).prefix_tokens
    states = model.embeddings(pixels)
    states = (model.pre_layrnorm(states) if hasattr(model, "pre_layrnorm") else states)[0].double()
    members = [[i] for i in range(len(states))]  # of each token, its representative first
    kept, keys, seen = [], None, []
    for number, layer in enumerate(model.encoder.layers):
        if number and number - 1 < len(thresholds):
            states, members = _slow_step(states, members, keys, thresholds[number - 1], prefix)
        query, key, value = project(layer.self_attn, layer.layer_norm1(states.float()))
        keys = key.mean(0)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores + torch.tensor([len(m) for m in members]).double().log()
        bias: Any = getattr(layer.self_attn, "sfa", None)
        if places is not None and isinstance(bias, SFALayer):
            grid = located.backbone.geometry(tower).grid
            assert grid is not None
            scores = scores + layer_phi(bias, [places[m[0]] for m in members], grid)
        states = states + merge_heads(layer.self_attn, scores.softmax(-1) @ value)
        states = states + layer.mlp(layer.layer_norm2(states.float())).double()
        seen.append((states, members))
    for states, groups in seen:
        full = torch.empty(sum(len(m) for m in groups), states.shape[-1], dtype=torch.float64)
        for state, group in zip(states, groups, strict=True):
            full[group] = state
        kept.append(full)
    return kept


def _slow_step(
    states: Tensor, members: list[list[int]], keys: Any, threshold: float, prefix: int
) -> tuple[Tensor, list[list[int]]]:
    count = len(states)
    parts = {i: [i] for i in range(count)}
    for i in range(prefix, count, 2):
        others = list(range(prefix + 1, count, 2))
        if not others:
            continue
        score = torch.nn.functional.cosine_similarity(keys[i][None], keys[others])
        if float(score.max()) > threshold:
            parts[others[int(score.argmax())]] += parts.pop(i)
    left = sorted(parts)
    weight = torch.tensor([len(m) for m in members]).double()
    new = [(states[parts[i]] * weight[parts[i], None]).sum(0) / weight[parts[i]].sum() for i in left]
    return torch.stack(new), [[m for p in parts[i] for m in members[p]] for i in left]
