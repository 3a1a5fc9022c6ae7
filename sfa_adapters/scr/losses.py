"""The loss terms of SCR as functions of attention: differentiable, for chosen rows only, recomputed in `backward`.

An `AttentionCall` holds references to q and k of a forward that has ended. Each function computes the logits of a block
of rows, reduces them to a number per row, and frees them; `torch.utils.checkpoint` computes them again in `backward`.
So a term keeps numbers per row, and the graph of q and k is the model's own, which its checkpointing may recompute.

Shape letters: B batch, H query heads, Q queries, K keys, R chosen rows, T chosen keys, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfa_adapters.attention_call import HIDDEN, AttentionCall, rows_of
from sfa_adapters.errors import ObservationError
from sfa_adapters.readers import row_entropy
from sfa_adapters.scr.config import GroundingKind

__all__ = ["band_penalty", "grounding_rows", "jeffreys", "narrowed", "row_entropies", "sample_mean"]

BLOCK_BYTES = 2**23


def narrowed(
    call: AttentionCall, rows: Tensor, keys: Tensor | None = None, present: Tensor | None = None
) -> AttentionCall:
    """The attention call reduced to chosen rows, others for each sample, and to some of its keys.

    Args:
        call: The attention computation of a layer.
        rows: Queries of each sample, int64 `[B, R]`, by place in the call.
        keys: Keys of each sample, int64 `[B, T]`, by place in the call; all by default.
        present: False hides an entry of `keys` that is padding, bool `[B, T]`.

    Returns:
        A call with R queries and T keys, differentiable in the tensors of the first one.
    """
    batch = torch.arange(call.batch_size, device=call.device)[:, None]
    if call.scores is not None:
        scores = call.scores[batch, :, rows].transpose(1, 2)
        if keys is not None:
            scores = _at_keys(scores, keys)
        if present is not None:
            scores = scores.masked_fill(~present[:, None, None], torch.finfo(scores.dtype).min)
        return replace(call, scores=scores)
    assert call.query is not None
    assert call.key is not None
    mask = _rows_of_mask(call, rows, batch)
    query, key = call.query[batch, :, rows].transpose(1, 2), call.key
    if keys is not None:
        key = key[batch, :, keys].transpose(1, 2)
        mask = None if mask is None else _at_keys(mask, keys)
    if present is not None:
        shown = present[:, None, None]
        if mask is None:
            mask = shown
        elif mask.dtype == torch.bool:
            mask = mask & shown
        else:
            mask = mask.masked_fill(~shown, torch.finfo(mask.dtype).min)
    return replace(call, query=query, key=key, mask=mask, is_causal=False)


def _rows_of_mask(call: AttentionCall, rows: Tensor, batch: Tensor) -> Tensor | None:
    """The mask of other rows for each sample, `[1 or B, 1 or H, 1 or R, K]`."""
    if call.is_causal:
        assert call.mask is None, "SDPA takes a mask or is_causal, not both"
        return (torch.arange(call.num_keys, device=call.device) <= rows[..., None])[:, None]
    if call.mask is None:
        return None
    mask = call.mask[(None,) * (4 - call.mask.ndim)]
    if mask.shape[-2] == 1:
        return mask
    # A bias that all samples share gets its gradient at [H, Q, K], not once per sample.
    return mask[0][:, rows].transpose(0, 1) if len(mask) == 1 else mask[batch, :, rows].transpose(1, 2)


def _at_keys(matrix: Tensor, keys: Tensor) -> Tensor:
    """Columns of each sample, `[B, 1 or H, 1 or R, T]`."""
    matrix = matrix.expand(len(keys), -1, -1, matrix.shape[-1])
    return matrix.gather(-1, keys[:, None, None].expand(-1, *matrix.shape[1:3], -1))


def _recomputed(compute: Callable[..., Tensor], *blocks: Tensor) -> Tensor:
    """Runs a function without keeping intermediate results; they are computed again in `backward`."""
    result = checkpoint(compute, *blocks, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def _per_block(call: AttentionCall, keys: int, block_bytes: int) -> int:
    return max(1, block_bytes // (4 * call.batch_size * call.num_heads * keys))


def row_entropies(call: AttentionCall, rows: Tensor, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """Entropy of the attention of chosen rows, divided by the log of the number of keys that they see.

    Args:
        call: The attention computation of a layer.
        rows: Queries of each sample, int64 `[B, R]`.
        block_bytes: Size of the logits in memory at a time.

    Returns:
        H / log n in [0, 1], `[B, H, R]`; NaN for rows that see no key.

    Raises:
        ObservationError: Logits are NaN.
    """

    def compute(block: Tensor) -> Tensor:
        block_call = narrowed(call, block)
        return row_entropy(
            block_call, rows_of(block_call, torch.arange(block.shape[1], device=call.device)), normalize=True
        )

    blocks = rows.split(_per_block(call, call.num_keys, block_bytes), dim=1)
    return torch.cat([_recomputed(compute, block) for block in blocks], dim=2)


def band_penalty(values: Tensor, band: tuple[float, float]) -> Tensor:
    """Squared distance to a band: 0 inside, so that neither a sink nor a uniform row is the optimum.

    Args:
        values: Any shape.
        band: Lowest and highest value without penalty.
    """
    return (values - values.clamp(*band)).square()


def grounding_rows(
    call: AttentionCall,
    rows: Tensor,
    keys: Tensor,
    present: Tensor,
    evidence: Tensor,
    kind: GroundingKind = "kl",
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Distance between the attention of chosen rows to image tokens and the evidence.

    The attention of each head is renormalised over the image tokens, then averaged over heads: A. With the evidence
    scaled to a distribution t, "kl" is KL(t || A) = sum t log (t / A), and "mass" is -log of the sum of A where t > 0.
    KLAL (arXiv 2511.12738) is the first of these for the last answer token. The logarithm of A comes from
    log-sum-exps, so that no mass is too small for it.

    Args:
        call: The attention computation of a layer of the language model.
        rows: Queries of each sample, int64 `[B, R]`.
        keys: Places of the image tokens, int64 `[B, T]`.
        present: False for entries of `keys` that are padding, bool `[B, T]`.
        evidence: How much evidence lies under each image token, from 0 up, `[B, R, T]`.
        kind: Which of the two distances.
        block_bytes: Size of the logits in memory at a time.

    Returns:
        The term in nats, the attention on the evidence in [0, 1] without gradients, and whether the row sees any
        evidence, `[B, R]` each; the first two are 0 where it sees none.

    Raises:
        ObservationError: Logits are NaN.
    """

    def compute(block: Tensor, wanted: Tensor) -> Tensor:
        block_call = narrowed(call, block, keys, present)
        seen = rows_of(block_call, torch.arange(block.shape[1], device=call.device))
        log_attention = seen.logits.log_softmax(-1).logsumexp(1) - math.log(call.num_heads)
        # Evidence that a mask hides cannot be attended to.
        target = wanted.to(log_attention.dtype) * (seen.logits > HIDDEN / 2).any(1)
        total = target.sum(-1, keepdim=True)
        target = target / torch.where(total > 0, total, 1.0)
        usable = total.squeeze(-1) > 0
        on_evidence = log_attention.masked_fill(target == 0, HIDDEN).logsumexp(-1)
        divergence = (torch.xlogy(target, target) - target * log_attention).sum(-1)
        value = -on_evidence if kind == "mass" else divergence
        value = value.masked_fill(~usable, 0.0)
        mass = on_evidence.detach().exp().masked_fill(~usable, 0.0)
        return torch.stack((value, mass, usable.to(value.dtype)))

    size = _per_block(call, keys.shape[1], block_bytes)
    blocks = zip(rows.split(size, dim=1), evidence.split(size, dim=1), strict=True)
    value, mass, usable = torch.cat([_recomputed(compute, *block) for block in blocks], dim=2)
    return value, mass.detach(), usable > 0


def jeffreys(first: Tensor, second: Tensor, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """Half the sum of both KL divergences of two distributions, R-Drop's regulariser (arXiv 2106.14448, equation 2).

    (KL(p || q) + KL(q || p)) / 2 = sum (p - q) (log p - log q) / 2.

    Args:
        first: Logits, `[R, V]`.
        second: Logits, `[R, V]`.
        block_bytes: Size of the logits in memory at a time.

    Returns:
        In nats, fp32 or wider, `[R]`.

    Raises:
        ObservationError: Logits are NaN or infinite.
    """

    def compute(p: Tensor, q: Tensor) -> Tensor:
        kind = torch.promote_types(p.dtype, torch.float32)
        log_p, log_q = p.to(kind).log_softmax(-1), q.to(kind).log_softmax(-1)
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2

    size = max(1, block_bytes // (4 * first.shape[-1]))
    pairs = zip(first.split(size), second.split(size), strict=True)
    divergences = torch.cat([_recomputed(compute, *pair) for pair in pairs])
    if not bool(divergences.isfinite().all()):
        raise ObservationError("The model's answer logits are NaN or infinite: there is no stability to measure.")
    return divergences


def sample_mean(values: Tensor, used: Tensor) -> Tensor:
    """Mean over the samples of the mean over their rows, so that a long answer counts as much as a short one.

    Args:
        values: `[B, R]`.
        used: Which of them count, bool `[B, R]`; at least one.
    """
    rows = used.sum(1)
    means = torch.where(used, values, 0.0).sum(1) / rows.clamp(min=1)
    return means.sum() / (rows > 0).sum()
