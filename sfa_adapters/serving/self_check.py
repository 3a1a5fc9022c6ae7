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


# How far two kernels may differ in the features of a whole tower, relative to their size.
TOLERANCES, COARSE = {torch.float32: 1e-3}, 5e-2


def check_bias_acts(state: EngineTower, built: set[int], dtype: torch.dtype, encode: Callable[[], Any]) -> str:
    """Compares the features of one image with the bias, with a bias of zero, and by the engine's own attention.

    Two kernels round differently, so features with the bias would never equal those of plain attention. A bias of zero
    goes the same way as the bias, to the last bit.

    Args:
        state: State of the tower.
        built: Numbers of the attention layers that the engine has built.
        dtype: Of the tower.
        encode: Runs the image through the tower.

    Returns:
        What acts where, in one line.

    Raises:
        ServingError: A layer of the adapter was not built or did not use its bias, the features are equal, or the
            engine's attention gives others with wide heads.
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
        try:
            state.mode = "zeros"
            zeros = _features(encode())
            state.mode = "off"
            plain = _features(encode())
        finally:
            state.mode = "bias"
    if acted != wanted:
        raise ServingError(f"The layers {sorted(wanted - acted)} ran without their bias.")
    if torch.equal(biased, zeros):
        raise ServingError(
            f"The adapter {adapter.folder} changes nothing: a random image has the same features with its bias and "
            f"without. Its largest scalar is {adapter.largest:.2g} logits."
        )
    kernel, bias = _change(zeros, plain), _change(biased, zeros)
    if not kernel <= (tolerance := TOLERANCES.get(dtype, COARSE)):
        raise ServingError(
            "The engine's attention is wrong for wide heads: with a bias of zero the features of a random image differ "
            f"by {100 * kernel:.2g}% from those of plain attention (rounding gives {100 * tolerance:.2g}% at most). "
            "Take another backend for the encoder."
        )
    return (
        f"SFA: {adapter} acts in {len(acted)} of {len(built)} layers; largest scalar {adapter.largest:.2f} logits; the "
        f"bias changes the features of a random image by {100 * bias:.2g}%, wider heads alone by {100 * kernel:.2g}%"
    )


def _change(new: Tensor, old: Tensor) -> float:
    """Size of a change relative to what was there."""
    return float((new - old).norm() / old.norm())


def _features(output: Any) -> Tensor:
    """The features in what a tower returned, in fp32."""
    if isinstance(output, (list, tuple)):
        return torch.cat([_features(part).flatten() for part in output])
    if not isinstance(output, Tensor):
        output = output.last_hidden_state
    return output.float()
