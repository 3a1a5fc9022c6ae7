"""The eager reference: SFA as it was first written, with three N x N buffers and the whole score matrix.

Used for comparison only; the library never builds these matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfa_adapters import StructuralBias, TokenLayout


class EagerBias:
    """Structural buffers of one layer and the eager attention over them.

    Args:
        bias: The learned scalars.
        layout: A regular layout.
    """

    def __init__(self, bias: StructuralBias, layout: TokenLayout) -> None:
        self.bias, self.layout = bias, layout
        both = (layout.spatial[:, None] & layout.spatial).float()
        rows, columns = layout.rows, layout.columns
        self.same_row = (rows.index[:, None] == rows.index).float() * both
        self.same_column = (columns.index[:, None] == columns.index).float() * both
        distance = rows.distance()[rows.index[:, None], rows.index]
        distance = distance + columns.distance()[columns.index[:, None], columns.index]
        self.distance = distance * both

    def phi(self) -> Tensor:
        """`[1, H, N, N]`, built from the buffers."""
        weights = self.bias.weights
        assert weights.row is not None
        assert weights.col is not None
        assert weights.dist is not None
        assert weights.block is not None
        blocks = weights.block[:, self.layout.block] * self.layout.spatial
        phi = weights.row[:, None, None] * self.same_row + weights.col[:, None, None] * self.same_column
        phi = phi - weights.dist[:, None, None] * self.distance + blocks[:, :, None] * blocks[:, None, :]
        return phi.unsqueeze(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax over the whole score matrix."""
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + self.phi().to(query.dtype)
        return torch.softmax(scores, dim=-1) @ value
