"""Images of different token counts in one sequence, each attending to itself only: no padding, no wasted work.

Adaptive tokens give every image its own count. Side by side in a padded batch they would waste what they saved, so
they are put behind one another, `[1, T, width]`: linear layers see one long sequence, and the lazy mask of the
attention cuts it into images again, where SDPA asks it. On CUDA an unbiased half-precision sequence runs in one
variable-length flash kernel, and a biased one with the backend `triton` in one launch of that backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.attention import Backend, attend, being_read, dense_mask
from sfa_adapters.bias import BiasFactors
from sfa_adapters.errors import LayoutError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.mask import LazyMask
from sfa_adapters.triton_attention import triton_misfit, triton_varlen_attention

__all__ = ["PackedMask", "Packing", "check_block_diagonal", "check_hidden_padding"]


@dataclass(frozen=True, eq=False)
class Packing:
    """What the attention layers need to know of a packed sequence.

    Attributes:
        lengths: Tokens of each image, prefix tokens included.
        build: Makes the layouts of the images for a block map.
    """

    lengths: tuple[int, ...]
    build: Callable[[Tensor | None], Sequence[TokenLayout]]
    _layouts: dict[Any, Sequence[TokenLayout]] = field(default_factory=dict, init=False, repr=False)

    @property
    def total(self) -> int:
        """T, the length of the packed sequence."""
        return sum(self.lengths)

    def layouts(self, block_map: Tensor | None, key: Any, device: torch.device) -> Sequence[TokenLayout]:
        """One layout per image; kept for the other layers of the forward.

        Args:
            block_map: As in `TokenLayout.regular`.
            key: What tells block maps apart.
            device: Where the layouts are needed.
        """
        if (key, device) not in self._layouts:
            with torch.inference_mode(False):
                self._layouts[key, device] = [layout.to(device) for layout in self.build(block_map)]
        return self._layouts[key, device]


class PackedMask(LazyMask):
    """The mask of a packed sequence: every image attends to itself, under its own bias where it has one.

    Args:
        lengths: Tokens of each image.
        biases: The tables of phi of each image, or None for plain attention.
        backend: How biased attention is computed.
    """

    def __init__(
        self, lengths: Sequence[int], biases: Sequence[BiasFactors] | None = None, backend: Backend = "auto"
    ) -> None:
        self.lengths = tuple(lengths)
        self.biases = biases
        self.backend: Backend = backend
        self.attention_mask = None
        self.used = False

    @property
    def shape(self) -> torch.Size:
        """`[1, 1 or H, T, T]`."""
        total = sum(self.lengths)
        return torch.Size((1, self.biases[0].num_heads if self.biases else 1, total, total))

    def size(self, dim: int | None = None) -> Any:
        """As `Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        """Attention inside each image; shapes `[1, H, T, D]`."""
        self.used = True
        if self.biases is None and query.is_cuda and dropout_p == 0.0 and query.dtype != torch.float32:
            return self._flash(query, key, value, scale)
        alone = dropout_p == 0.0 and not being_read()
        if self.biases and self.backend == "triton" and alone and triton_misfit(query) is None:
            q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, H, D]
            flat = triton_varlen_attention(q, k, v, [0, *accumulate(self.lengths)], self.biases, scale)
            return flat.transpose(0, 1)[None]
        parts = [states.split(self.lengths, dim=-2) for states in (query, key, value)]
        biases = self.biases or [None] * len(self.lengths)
        out = [
            attend(q, k, v, bias, scale=scale, dropout_p=dropout_p, backend=self.backend)
            for q, k, v, bias in zip(*parts, biases, strict=True)
        ]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-2)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        bounds = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=query.device)
        longest = max(self.lengths)
        q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))  # [T, H, D]
        if scale is not None:  # older releases have no argument for it
            q = q * (scale * q.shape[-1] ** 0.5)
        out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest)
        return out.transpose(0, 1)[None]

    def tensor(self, like: Tensor | None = None) -> Tensor:
        """The mask as a matrix, `[1, 1 or H, T, T]`: minus infinity between images."""
        self.used = True
        total, rows = sum(self.lengths), []
        for i, (start, stop) in enumerate(pairwise([0, *accumulate(self.lengths)])):
            if self.biases is None:
                inside = torch.zeros(1, 1, stop - start, stop - start)
                inside = inside if like is None else inside.to(like.device, like.dtype)
            else:
                inside = self.biases[i].dense() if like is None else dense_mask(self.biases[i], like)
            rows.append(F.pad(inside, (start, total - stop), value=float("-inf")))
        return torch.cat(rows, dim=-2)


def check_block_diagonal(mask: Tensor, lengths: Sequence[int], where: str) -> None:
    """Checks at the borders of the images that a mask keeps exactly these images apart.

    Args:
        mask: Boolean (True = attend) or additive, `[.., T, T]`.
        lengths: Tokens of each image, T together.
        where: For the message.

    Raises:
        LayoutError: It has another size, or images reach into each other, or one is cut.
    """
    total = sum(lengths)
    if tuple(mask.shape[-2:]) != (total, total):
        raise LayoutError(
            f"{where} got a mask {tuple(mask.shape)} for images of {list(lengths)} tokens, {total} in all."
        )
    visible = _visible(mask[(0,) * (mask.ndim - 2)])
    ends = torch.tensor(list(accumulate(lengths)), device=mask.device)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    # The first and last token of an image see each other, and neither sees the token beyond the border.
    whole = visible[starts, ends - 1] & visible[ends - 1, starts]
    apart = ~visible[ends[:-1], ends[:-1] - 1] & ~visible[ends[:-1] - 1, ends[:-1]]
    if not bool(whole.all() & apart.all()):
        raise LayoutError(
            f"{where}: the mask of the model does not keep images of {list(lengths)} tokens apart, which its inputs "
            "name. Call the tower itself, with the sizes of its images."
        )


def check_hidden_padding(mask: Tensor, lengths: Sequence[int], where: str) -> None:
    """Checks that a mask hides the padding of padded images from their first tokens.

    Args:
        mask: Boolean (True = attend) or additive, broadcastable to `[B, H, N, N]`.
        lengths: Tokens of each image without padding.
        where: For the message.

    Raises:
        LayoutError: It shows padding: with a bias, which hides it, the tower would compute something else than without.
    """
    seen = _visible(mask[(None,) * (4 - mask.ndim)][:, 0, 0])
    ends = torch.tensor(lengths, device=mask.device)
    shown = seen & (torch.arange(seen.shape[-1], device=mask.device) >= ends[:, None])
    if bool(shown.any()):
        number = int(shown.any(-1).nonzero()[0])
        raise LayoutError(
            f"{where}: the mask of the model shows tokens behind the {lengths[number]} of image {number}, which are "
            "padding by the sizes in its input. Pass sizes and mask from one call of the processor."
        )


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
