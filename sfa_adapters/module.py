"""`SFAAttention`: self-attention with a structural bias, for people who write their own vision transformer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sfa_adapters.attention import Backend, attend, check_backend
from sfa_adapters.axial import Init
from sfa_adapters.bias import StructuralBias, Term
from sfa_adapters.block_maps import default_block_map
from sfa_adapters.choices import DEFAULT_TERMS
from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.layout import TokenLayout

__all__ = ["SFAAttention"]


class SFAAttention(nn.Module):
    """Multi-head self-attention over visual tokens with a structural bias on its logits.

    Args:
        dim: Width of the tokens.
        num_heads: Attention heads; must divide `dim`.
        grid: Rows and columns of tokens, used when `forward` gets no layout.
        prefix_tokens: Leading tokens without a place on the page (CLS, registers).
        qkv_bias: Whether the q, k and v projections have a bias.
        block_grid: Partition of the page into blocks, for the term `block`.
        init_std: Standard deviation of the structural scalars.
        terms: Which of `row`, `col`, `dist`, `block` are on.
        dropout: Dropout probability on attention weights in training.
        backend: `auto`, `lines`, `blocked`, `triton`, `folded` or `dense`.
        init: How the structural scalars start, as in `StructuralBias`.
        init_strength: In logits, for `init="axial"`.

    Raises:
        InjectionError: `num_heads` does not divide `dim`, or the backend or a structural option is wrong.

    Example:
        >>> import torch
        >>> attention = SFAAttention(1024, num_heads=16, grid=(28, 28))
        >>> attention(torch.zeros(2, 784, 1024)).shape
        torch.Size([2, 784, 1024])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        block_grid: tuple[int, int] = (4, 4),
        init_std: float = 0.02,
        terms: Sequence[Term] = DEFAULT_TERMS,
        dropout: float = 0.0,
        backend: Backend = "auto",
        init: Init = "normal",
        init_strength: float = 3.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InjectionError(f"num_heads={num_heads} must divide dim={dim}.")
        check_backend(backend)
        self.num_heads, self.head_dim, self.dropout = num_heads, dim // num_heads, dropout
        self.backend: Backend = backend
        self.block_map = default_block_map(block_grid)
        self.layout = None if grid is None else TokenLayout.regular(*grid, prefix_tokens, self.block_map)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.structural_bias = StructuralBias(
            num_heads, self.block_map.numel(), init_std, terms, init=init, init_strength=init_strength
        )

    def forward(
        self, hidden_states: Tensor, layout: TokenLayout | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Computes the attention output.

        Args:
            hidden_states: `[batch, tokens, dim]`.
            layout: Where the tokens lie; the layer's own grid by default.
            attention_mask: A further mask, boolean or additive, broadcastable to `[batch, heads, query, key]`.

        Returns:
            `[batch, tokens, dim]`.

        Raises:
            LayoutError: No layout was given and the layer has no grid, or the layout is for other tokens.
        """
        layout = layout or self.layout
        if layout is None:
            raise LayoutError(
                "SFAAttention needs a layout: pass grid=(rows, columns) when it is built, or layout= here."
            )
        if layout.device != hidden_states.device:
            layout = layout.to(hidden_states.device)
            if self.layout is not None and layout.num_tokens == self.layout.num_tokens:
                self.layout = layout
        batch, tokens, dim = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = attend(
            query,
            key,
            value,
            self.structural_bias.factors(layout),
            attention_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
