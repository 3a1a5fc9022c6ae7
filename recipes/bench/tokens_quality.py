"""Quality of the answers of a nano host with FastV: accuracy, fabricated numbers, and modality dominance.

MDI (arXiv 2508.10552, section 3) compares the attention that a text token of the prompt gets with the attention that an
image token gets, over all layers, heads and decoding steps. In pruned layers the image tokens that are left count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfa_adapters.attention_call import AttentionCall
from sfa_adapters.compat import cache_of_output, with_cache
from sfa_adapters.observe import observe
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.evaluate import evaluate
from sfa_adapters.recipes.nano.models import NanoHost
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample
from sfa_adapters.reduction.fastv.inject import FastVConfig
from sfa_adapters.reduction.image_tokens import image_places
from sfa_adapters.reduction.kept_tokens import KEPT
from sfa_adapters.statistics import Interval, bootstrap
from sfa_adapters.vlm.parts import image_token_ids

__all__ = ["Quality", "answer_quality"]

LOOKED_AT = 24  # questions whose attention is read: one at a time


@dataclass(frozen=True)
class Quality:
    """Quality of the answers, with 95% intervals over questions.

    Attributes:
        accuracy: Relaxed accuracy.
        invented: Share of readable numeric answers with a number that is printed nowhere on the chart.
        mdi: Modality dominance: above 1, a text token gets more attention than an image token.
    """

    accuracy: Interval
    invented: Interval
    mdi: Interval


def answer_quality(host: NanoHost, samples: Sequence[ChartSample], setting: FastVConfig | None) -> Quality:
    """Lets the host answer every question once.

    Args:
        host: The host, with FastV or without.
        samples: The questions.
        setting: Options of FastV, or None.
    """
    evaluation = evaluate(host, samples)
    ratios = [_dominance(host, sample, setting) for sample in samples[:LOOKED_AT]]
    return Quality(evaluation.accuracy, evaluation.fabricated_share, bootstrap(np.array(ratios)))


def _dominance(host: NanoHost, sample: ChartSample, setting: FastVConfig | None) -> float:
    model: Any = host.model
    inputs = {name: value.to(model.device) for name, value in encode(host, [sample.image], [sample.question]).items()}
    image = image_places(inputs["input_ids"], image_token_ids(model))[0]
    with torch.no_grad():
        cache = cache_of_output(model(**inputs, use_cache=True))
        behind = image[cache_columns(cache, image)]
        first = len(cache.layers) if setting is None else setting.layer
        per_token: list[tuple[float, float]] = []

        def read(call: AttentionCall) -> None:
            places = image if call.index < first else behind
            mass = call.logits(slice(None)).softmax(-1).mean((0, 1, 2))[: len(places)]
            per_token.append((float(mass[~places].mean()), float(mass[places].mean())))

        token = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        with observe(model, read, modules="language"):
            for _ in range(3):
                token = model(**with_cache(model, {"input_ids": token}, cache)).logits[:, -1].argmax(-1, keepdim=True)
    text, pictures = np.array(per_token).mean(0)
    return float(text / pictures)


def cache_columns(cache: Any, image: Tensor) -> Tensor:
    """Which columns of a prompt of one sample the last layer holds, int64."""
    kept = getattr(cache, KEPT, None)
    return torch.arange(len(image), device=image.device) if kept is None else kept.columns[0]
