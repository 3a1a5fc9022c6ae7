"""Head scores of small hosts, and S4 from whole attention maps as the slow reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sfa_adapters.heads.calibrate import calibrate_heads
from sfa_adapters.heads.scores import HeadScores
from tests.support.hosts import HOSTS, IMAGE

BY_NAME = {host.name: host for host in HOSTS}
NAMES = ("llava", "internvl", "qwen2_5_vl", "gemma3")
LLAVA = BY_NAME["llava"]


def calibrated(model: nn.Module, batches: Any = (), method: Any = "s4", **options: Any) -> HeadScores:
    return calibrate_heads(model, batches, method, progress=False, **options)


def assert_scores(scores: HeadScores, expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    values = torch.tensor(list(scores.values.values()), dtype=torch.float64)
    wanted = torch.stack(expected).double()
    assert values.shape == wanted.shape
    assert ((values - wanted).abs() <= tolerance * wanted.abs().max()).all(), f"{values}\n{wanted}"


def eager_s4(model: Any, batches: list[dict[str, Any]], gamma: float) -> list[torch.Tensor]:
    """S4 scores of each layer from whole attention maps, one sample and one row at a time."""
    model.set_attn_implementation("eager")
    samples: list[torch.Tensor] = []
    for batch in batches:
        with torch.no_grad():
            layers = model(**batch, output_attentions=True).attentions
        for row, ids in enumerate(batch["input_ids"]):
            image = [place for place, token in enumerate(ids) if token == IMAGE]
            real = batch["attention_mask"][row]
            text = [p for p in range(image[0], len(ids)) if ids[p] != IMAGE and real[p]]
            rows = [[a[row][:, q, [k for k in image if k <= q]] for q in text] for a in layers]
            of_layers = [
                torch.stack([p.var(-1, correction=0) + gamma * p.mean(-1) for p in layer]).mean(0) for layer in rows
            ]
            samples.append(torch.stack(of_layers))
    return list(torch.stack(samples).mean(0))


def padded(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """A batch with padding on the left, as `generate` needs it."""
    pad = torch.zeros(len(batch["input_ids"]), count, dtype=torch.long)
    ids = torch.cat((pad, batch["input_ids"]), 1)
    return {**batch, "input_ids": ids, "attention_mask": torch.cat((pad, batch["attention_mask"]), 1)}
