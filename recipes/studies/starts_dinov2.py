"""DINOv2-small as a host of `starts`: its features encode colours, and it learns to answer along rows and columns.

The known task is read by a linear probe: ridge regression on the features of the untouched tower, in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfa_adapters.recipes.studies.pretrained import Run
from sfa_adapters.recipes.studies.pretrained_net import TableReader, encoded
from sfa_adapters.recipes.studies.pretrained_pictures import KINDS
from sfa_adapters.recipes.studies.training import NONE

__all__ = ["DinoStart", "build"]

RIDGE = 1.0


class DinoStart:
    """A host of `starts`.

    Args:
        options: Those of a run of `pretrained`, and the arm's.
        seed: Of heads, order and scalars.
    """

    def __init__(self, options: Mapping[str, Any], seed: int) -> None:
        adapter = {"adapter": "none" if options["bias"] == "none" else "sfa", "layers": "trained"}
        places = {"places": "shuffled" if options["bias"] == "placebo" else "own"}
        warmup = {"init_warmup_steps": round(options.get("ramp", 0) * options["steps"])}
        self.run = Run({**options, **adapter, **places, **warmup}, seed)
        self.model: nn.Module = self.run.net
        weight, bias = _probe(options["task"], options["pool_seed"], options["pool"])
        with torch.no_grad():
            self.run.net.content.weight.copy_(weight)
            self.run.net.content.bias.copy_(bias)

    def known(self) -> np.ndarray:
        """Share of patches with the right colour, by picture."""
        return self.run.scores("test")[1]

    def new(self, split: str) -> np.ndarray:
        """Share of right answers about headers, by picture; see `StartHost`."""
        return self.run.scores(split)[0]

    def learn(self, after_step: Callable[[int], None]) -> None:
        """Trains the last layers and the heads; see `StartHost`."""
        self.run.learn(after_step)


def build(options: Mapping[str, Any], seed: int) -> DinoStart:
    """The pretrained tower with the arm's bias; arguments as for `DinoStart`."""
    return DinoStart(options, seed)


@cache
def _probe(task: Any, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Weight `[10, 384]` and bias `[10]` of the probe for the colour of a patch."""
    pictures, reader, parts = encoded(task, "train", seed, count), TableReader({}, 0), []
    handle = reader.content.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0]))
    with torch.no_grad():
        for features in pictures.features.split(50):
            reader(features)
    handle.remove()
    inside = pictures.content.flatten() != NONE
    states = torch.cat(parts).flatten(0, 1)[inside].double()
    targets = nn.functional.one_hot(pictures.content.flatten()[inside], KINDS).double()
    center, level = states.mean(0), targets.mean(0)
    moments = (states - center).T @ (states - center) + RIDGE * torch.eye(states.shape[1])
    weight = torch.linalg.solve(moments, (states - center).T @ (targets - level)).T
    return weight.float(), (level - weight @ center).float()
