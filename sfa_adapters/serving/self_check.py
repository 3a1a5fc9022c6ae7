"""The self-check at start: one image through the tower of the engine, with the bias and without.

What people complain of is the adapter that loads and does nothing. So a server does not start unless the bias of every
layer was used and changed the features of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.errors import ServingError
from sfa_adapters.serving.engine_tower import EngineTower

__all__ = ["check_bias_acts"]


def check_bias_acts(state: EngineTower, built: set[int], encode: Callable[[], Any]) -> str:
    """Compares the features of one image with the bias and without.

    Args:
        state: State of the tower.
        built: Numbers of the attention layers that the engine has built.
        encode: Runs the image through the tower.

    Returns:
        What acts where, in one line.

    Raises:
        ServingError: A layer of the adapter was not built or did not use its bias, or the features are equal.
    """
    adapter = state.adapter
    wanted = set(adapter.layers)
    missing = sorted(wanted - built)
    if missing:
        raise ServingError(
            f"The adapter has a bias for the layers {missing}, which the engine has not built; it has {len(built)} "
            "layers. The bias would act in a part of the tower only."
        )
    with torch.inference_mode():
        state.acted.clear()
        biased = _features(encode())
        acted = set(state.acted)
        state.enabled = False
        try:
            plain = _features(encode())
        finally:
            state.enabled = True
    if acted != wanted:
        raise ServingError(f"The layers {sorted(wanted - acted)} ran without their bias.")
    if torch.equal(biased, plain):
        raise ServingError(
            f"The adapter {adapter.folder} changes nothing: a random image has the same features with its bias and "
            f"without. Its largest scalar is {adapter.largest:.2g} logits."
        )
    change = float((biased - plain).norm() / plain.norm())
    return (
        f"SFA: {adapter} acts in {len(acted)} of {len(built)} layers; largest scalar {adapter.largest:.2f} logits; "
        f"features of a random image differ by {100 * change:.2g}% from those without it"
    )


def _features(output: Any) -> Tensor:
    """The features in what a tower returned, in fp32."""
    if isinstance(output, (list, tuple)):
        return torch.cat([_features(part).flatten() for part in output])
    if not isinstance(output, Tensor):
        output = output.last_hidden_state
    return output.float()
