"""Mean and variance of a head's attention over the image tokens, the two terms of the s4 score."""

from __future__ import annotations

import torch
from torch import Tensor

from sfa_adapters.attention_call import HIDDEN, AttentionCall, Rows
from sfa_adapters.readers import Reader, fitted_to_keys

__all__ = ["ImageMoments"]


class ImageMoments(Reader):
    """Reader of mean and variance of the attention over the image tokens, averaged over queries: `[B, H, 2]`.

    The variance of a row is the population variance over the image tokens that it sees. NaN for a prompt without query.

    Args:
        queries: Which rows are queries, bool `[B, N]`.
        image: Which keys are image tokens, bool `[B, N]`.
    """

    def __init__(self, queries: Tensor, image: Tensor) -> None:
        super().__init__(queries)
        self.image = image

    def begin(self, call: AttentionCall) -> list[Tensor]:
        """An empty list for sums and counts."""
        return []

    def block(self, state: list[Tensor], call: AttentionCall, rows: Rows) -> None:
        """Adds sums and counts of a block of rows."""
        weights = self.row_weights(call, rows)[:, None]  # [1 or B, 1, R]
        seen = rows.logits > HIDDEN / 2
        seen = seen & fitted_to_keys(self.image, call, False)[:, None, None, : seen.shape[-1]]
        count = seen.sum(-1).clamp(min=1)
        mean = (rows.probabilities * seen).sum(-1) / count
        # From deviations: a difference of two means of squares would lose all digits of small numbers.
        variance = ((rows.probabilities - mean[..., None]).square() * seen).sum(-1) / count
        sums = [(torch.stack((mean, variance), -1) * weights[..., None]).sum(2), weights.sum(-1)[..., None]]
        state[:] = [old + new for old, new in zip(state, sums, strict=True)] if state else sums

    def end(self, state: list[Tensor], call: AttentionCall) -> Tensor:
        """Sums over counts; NaN where there is no query."""
        return state[0] / state[1]
