"""The query rows, those of the question about the image, and how much they attend to each token in one layer.

Only these rows are computed, beside the attention that runs anyway in its own kernel: from q, k, scale and mask as
`scaled_dot_product_attention` gets them, or from the scores that an eager implementation puts into its softmax. So
rotary embeddings, norms of q and k, and grouped heads need no knowledge of the model.

Shape letters: B samples, H query heads, G key heads, L tokens of a prompt, K keys, R rows, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfa_adapters.attention_call import HIDDEN, AttentionCall
from sfa_adapters.observe import Seam

__all__ = ["AttentionReader", "query_rows", "row_attention"]

IGNORED = -100  # labels that are no target
BLOCK_BYTES = 2**25  # of logits at a time


def query_rows(
    image: Tensor, valid: Tensor, labels: Any = None, logits_to_keep: Any = None, texts: int = 0
) -> tuple[Tensor, Tensor]:
    """The rows of the tokens of the question.

    The question ends before the first token that is to be predicted: the first target after the images where there are
    labels, the first of the `logits_to_keep` rows (assisted generation appends its candidates to the prompt), else at
    the last token. So teacher forcing chooses as generation does.

    Args:
        image: Which tokens are image tokens, bool `[B, L]`.
        valid: Which are not padding, bool `[B, L]`.
        labels: Targets `[B, L]`, or None.
        logits_to_keep: As the host was called with it.
        texts: 0 for the last token of the question only; else all text up to there, and the largest number of text
            tokens of a sample.

    Returns:
        Rows int64 `[B, R]`, and which of them are real, bool `[B, R]`.
    """
    place = torch.arange(image.shape[1], device=image.device)
    last = (place * valid).amax(1)
    if isinstance(labels, Tensor) and labels.shape == image.shape:
        behind = place > (place * image).amax(1, keepdim=True)
        targets = (labels.to(image.device) != IGNORED) & behind & valid
        last = torch.where(targets.any(1), targets.int().argmax(1) - 1, last)
    elif isinstance(logits_to_keep, int) and logits_to_keep > 1:
        last = (last - (logits_to_keep - 1)).clamp(min=0)
    if not texts:
        return last[:, None], torch.ones_like(last, dtype=torch.bool)[:, None]
    queries = valid & ~image & (place <= last[:, None])
    rows = (~queries).int().argsort(dim=1, stable=True)[:, :texts]
    return rows, queries.gather(1, rows)


def row_attention(call: AttentionCall, rows: Tensor) -> Tensor:
    """Attention of chosen rows, another choice in every sample, fp32 `[B, H, R, K]`.

    Args:
        call: One attention computation.
        rows: int64 `[B, R]`.
    """
    batch, heads, keys = call.batch_size, call.num_heads, call.num_keys
    place = rows.to(call.device)[:, None, :, None]
    if call.scores is not None:
        return call.scores.gather(2, place.expand(-1, heads, -1, keys)).float().softmax(-1)
    assert call.query is not None
    assert call.key is not None
    query = call.query.gather(2, place.expand(-1, heads, -1, call.query.shape[-1])).float() * call.scale
    key = call.key.float().transpose(-1, -2)
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # the heads of a group share their keys
    logits = (grouped @ key).view(batch, heads, -1, keys)
    if call.mask is not None:
        mask = call.mask[(None,) * (4 - call.mask.ndim)].expand(batch, -1, call.num_queries, -1)
        mask = mask.gather(2, place.expand(-1, mask.shape[1], -1, mask.shape[-1]))
        logits = logits.masked_fill(~mask, HIDDEN) if mask.dtype == torch.bool else logits + mask.float()
    if call.is_causal:
        logits = logits.masked_fill(torch.arange(keys, device=call.device) > place, HIDDEN)
    return logits.softmax(-1)


class AttentionReader:
    """Reads how much the query rows attend to each token of a prompt, while one decoder layer runs.

    Args:
        rows: Query rows, int64 `[B, R]`.
        real: Which of them count, bool `[B, R]`.
        past: Tokens in the cache before the prompt.
        length: L.
    """

    index = 0

    def __init__(self, rows: Tensor, real: Tensor, past: int | Tensor, length: int) -> None:
        self.rows, self.real, self.past, self.length = rows, real, past, length
        self.attention: Tensor | None = None
        self.name, self.groups, self.is_causal = "language model", 1, False
        # What `Seam` reads: a prompt has several queries, so heads are never packed into the query axis.
        self.seam = Seam(self, None, 0)  # pyright: ignore[reportArgumentType]

    def open(self) -> None:
        """Begins to read."""
        self.seam.__enter__()

    def close(self) -> Tensor | None:
        """Ends reading.

        Returns:
            Mean attention over heads and rows to each token of the prompt, `[B, L]`, or None where none was seen.
        """
        self.seam.__exit__(None, None, None)
        return self.attention

    @torch.no_grad()
    def read(self, call: AttentionCall) -> None:
        """Reads one attention computation of the layer."""
        if self.attention is not None or call.num_queries != self.length:
            return
        with torch.autocast(call.device.type, enabled=False):
            columns = torch.arange(self.length, device=call.device) + self.past
            total: Any = 0
            step = max(1, BLOCK_BYTES // (4 * call.batch_size * call.num_heads * call.num_keys))
            for rows, real in zip(self.rows.split(step, 1), self.real.split(step, 1), strict=True):
                mean = row_attention(call, rows).mean(1).index_select(-1, columns)
                total = total + (mean * real.to(mean.device)[:, :, None]).sum(1)
            self.attention = total / self.real.sum(1, keepdim=True).clamp(min=1).to(total.device)
