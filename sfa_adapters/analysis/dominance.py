"""MDI and AEI: whether a model attends more to the text of its prompt or to the image (arXiv 2508.10552, section 3).

A_T and A_O are the attention that text and non-text tokens of the prompt get, |T| and |O| how many there are:

    MDI   = (A_T / |T|) / (A_O / |O|)                         above 1: a text token gets more than an image token
    AEI_T = (A_T / (A_T + A_O)) / (|T| / (|T| + |O|))         above 1: more than the share of text in the prompt
    MDI   = AEI_T / AEI_O,    Q_T AEI_T + Q_O AEI_O = 1,    Q_T = |T| / (|T| + |O|)

Only two numbers per row of attention are kept, never the row itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sfa_adapters.analysis.dominance_report import DominanceReport
from sfa_adapters.analysis.forward import to_device
from sfa_adapters.analysis.prompts import (
    IMAGE,
    NEITHER,
    TEXT,
    Aligned,
    TokenKinds,
    answer_lengths,
    decoder_layers,
    prompt_groups,
)
from sfa_adapters.analysis.report import Skip, Skips
from sfa_adapters.errors import DataError, ObservationError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.observe import observe
from sfa_adapters.readers import GroupMass, KeyMass
from sfa_adapters.vlm.parts import forward_names

__all__ = ["modality_dominance"]

DominanceQueries = Literal["generated", "text"]
Stages = Literal["2/2/2", "thirds"] | Mapping[str, Sequence[int]]


def modality_dominance(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    *,
    image_token_id: int | Collection[int] | None = None,
    queries: DominanceQueries = "generated",
    layers: Stages = "2/2/2",
    include_bos: bool = True,
    include_special: bool = True,
    special_ids: Collection[int] | None = None,
    tokenizer: Any = None,
    max_new_tokens: int = 20,
    seed: int = 0,
) -> DominanceReport:
    """Measures how much attention of the output goes to the text and to the image of the prompt (MDI and AEI).

    A_T and A_O are means over query rows, heads and the layers of a stage. Rows are not renormalised: a row that
    attends to the answer so far weighs less. "generated" queries are the rows of the decoding steps, that is all
    generated tokens except the last, which is never fed back. The last row of the prompt, which predicts the first
    token, does not count.

    Args:
        model: A vision-language model of transformers.
        samples: Keyword arguments of the model for each prompt or batch of prompts: `input_ids` and `attention_mask`
            `[B, L]`, `pixel_values`, and so on. Pad on the left.
        image_token_id: Id of the image placeholder, or several; by default those in the config, videos included.
        queries: "generated": a greedy answer. "text": the text tokens behind the first image token, in one forward;
            text in front of it cannot see it.
        layers: "2/2/2": the first two, the middle two and the last two; in a model of fewer than six layers they
            overlap. "thirds": all layers. Or a mapping from names of stages to layer numbers.
        include_bos: Whether the BOS token is text; it often takes most of the attention. If not, it is in no group.
        include_special: Whether other special tokens are text. If not, they are in no group.
        special_ids: Which tokens are special; by default those of the tokenizer, or those that the configs name.
        tokenizer: Where the ids of BOS and special tokens are read; by default from the configs.
        max_new_tokens: Longest answer in tokens.
        seed: Seed of the bootstrap.

    Returns:
        The report. Samples without text, image or query are in `skipped`.

    Raises:
        DataError: An option or a mask cannot be used, or no sample can be measured.
        ObservationError: Attention cannot be read, the model expands its image placeholder internally, or its cache
            drops tokens.
    """
    if queries not in ("generated", "text"):
        raise DataError(f"queries={queries!r} must be 'generated' or 'text'.")
    if max_new_tokens < 2:
        raise DataError(f"max_new_tokens={max_new_tokens} must be at least 2: the last token is never a query.")
    names = decoder_layers(model)
    stages = stage_layers(layers, len(names))
    needed = sorted(set().union(*stages.values()))
    kinds = TokenKinds.of(model, image_token_id, include_bos, include_special, special_ids, tokenizer)
    kept: list[tuple[int, np.ndarray, list[int], int]] = []
    skipped, number = Skips(), 0
    with evaluating(model):
        for inputs in samples:
            inputs = to_device(inputs, model)
            groups = prompt_groups(inputs, kinds, number)
            asking = text_queries(groups) if queries == "text" else groups
            reasons = [_unusable(group, ask) for group, ask in zip(groups, asking, strict=True)]
            masses = counts = None
            if None in reasons:
                read = [names[layer] for layer in needed]
                if queries == "text":
                    masses, counts = _asked(model, inputs, groups, asking, read)
                else:
                    masses, counts = _generated(model, inputs, groups, read, max_new_tokens)
            for row, reason in enumerate(reasons):
                if reason is None:
                    assert masses is not None
                    assert counts is not None
                    group = np.stack([masses[row, [needed.index(n) for n in ns]].mean(0) for ns in stages.values()])
                    if not counts[row]:
                        reason = "the answer is one token, which is no query"
                    elif not (group > 0).all():
                        reason = "no attention on the text or on the image"
                    else:
                        tokens = [int((groups[row] == kind).sum()) for kind in (TEXT, IMAGE)]
                        kept.append((number, group, tokens, int(counts[row])))
                if reason is not None:
                    skipped.append(Skip(number, reason))
                number += 1
    skipped.refuse_all(len(kept), "samples")
    how: dict[str, Any] = {"queries": queries, "layers": layers if isinstance(layers, str) else "own"}
    how |= {"include_bos": include_bos, "include_special": include_special, "image_token_ids": sorted(kinds.image)}
    how |= {"left_out_ids": sorted(kinds.left_out)}
    how |= {"max_new_tokens": max_new_tokens} if queries == "generated" else {}
    numbers, mass, tokens, rows = zip(*kept, strict=True)
    return DominanceReport(stages, np.stack(mass), np.array(tokens), np.array(rows), numbers, skipped, seed, how)


def stage_layers(layers: Stages, count: int) -> dict[str, tuple[int, ...]]:
    """The layers of each stage of a language model with `count` attention layers.

    Raises:
        DataError: The option is unknown, a stage is empty, or a layer does not exist.
    """
    if layers == "2/2/2":
        middle = count // 2
        stages = {"early": range(2), "middle": range(middle - 1, middle + 1), "late": range(count - 2, count)}
        inside = {name: tuple(n for n in numbers if 0 <= n < count) for name, numbers in stages.items()}
    elif layers == "thirds":
        ends = (0, count // 3, 2 * count // 3, count)
        names = ("early", "middle", "late")
        inside = {name: tuple(range(ends[i], ends[i + 1])) for i, name in enumerate(names)}
    elif isinstance(layers, Mapping):
        inside = {str(name): tuple(int(n) for n in numbers) for name, numbers in layers.items()}
    else:
        raise DataError(f"layers={layers!r} must be '2/2/2', 'thirds' or layer numbers by stage.")
    wrong = {
        name: numbers for name, numbers in inside.items() if not numbers or not all(0 <= n < count for n in numbers)
    }
    if wrong or not inside:
        raise DataError(f"layers={layers!r}: the language model has the layers 0 to {count - 1}; cannot use {wrong}.")
    return inside


def text_queries(groups: Tensor) -> Tensor:
    """`TEXT` for text tokens behind the first image token, else `NEITHER`, `[B, L]`."""
    seen = (groups == IMAGE).cumsum(-1) > 0
    return torch.where((groups == TEXT) & seen, TEXT, NEITHER)


def _unusable(groups: Tensor, asking: Tensor) -> str | None:
    for kind, name in ((IMAGE, "image"), (TEXT, "text")):
        if not bool((groups == kind).any()):
            return f"no {name} tokens"
    return None if bool((asking == TEXT).any()) else "no text behind the image"


def _generated(
    model: Any, inputs: dict[str, Any], groups: Tensor, layers: Sequence[str], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean attention masses of the decoding steps of each sample, `[B, layers, 2]`, and their number, `[B]`."""
    mass = KeyMass(groups, queries="generated", heads="mean")
    length = groups.shape[1]
    with observe(model, [mass, Aligned(length)], modules=layers):
        options = {"do_sample": False, "num_beams": 1, "use_cache": True, "return_dict_in_generate": False}
        new = model.generate(**{**inputs, **options, "max_new_tokens": max_new_tokens})[:, length:]
    counts = answer_lengths(new, model) - 1
    steps = new.shape[1] - 1
    if any(len(mass.results.get(layer, [])) != steps for layer in layers):
        raise ObservationError(f"{steps + 1} tokens were generated, but not one by one behind the prompt.")
    if not steps:
        return np.zeros((len(groups), len(layers), 2)), counts.cpu().numpy()
    values = torch.stack([torch.cat(mass.results[layer], 2)[:, 0] for layer in layers], 1)  # [B, layers, steps, 2]
    # Steps behind the end of an answer are padding.
    valid = torch.arange(steps, device=new.device) < counts[:, None]
    means = (values * valid[:, None, :, None]).sum(2) / counts.clamp(min=1)[:, None, None]
    return means.double().cpu().numpy(), counts.cpu().numpy()


def _asked(
    model: Any, inputs: dict[str, Any], groups: Tensor, asking: Tensor, layers: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean attention masses of the text queries of each sample, `[B, layers, 2]`, and their number, `[B]`."""
    mass = GroupMass(asking, groups, heads="mean")
    known = forward_names(model)
    spare = {"use_cache": False, "logits_to_keep": 1}  # all logits of a long prompt would need gigabytes
    with observe(model, [mass, Aligned(groups.shape[1])], modules=layers):
        model(**inputs, **{name: value for name, value in spare.items() if name in known})
    values = torch.stack([mass.results[layer][0][:, 0, 0] for layer in layers], 1)
    return values.double().cpu().numpy(), (asking == TEXT).sum(1).cpu().numpy()
