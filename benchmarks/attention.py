"""Attention alone under a structural bias: plain SDPA against every backend and the eager reference.

    python -m benchmarks.attention                       # grids 16 to 64, fp32 and bf16: 10 minutes on 2 cores
    python -m benchmarks.attention --device cuda --rounds 50

The bias has the default terms. Candidates: `plain` SDPA without a bias; `folded`; `blocked`; `lines`; `dense` (the
matrix is built in every call); `cached` (a dense matrix from an earlier call; without gradients only); `auto`; `eager`
(all four terms, buffers and the whole score matrix, as first written).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.common import Row, compare, write_result
from benchmarks.reference import EagerBias
from sfa_adapters import StructuralBias, TokenLayout, attend
from sfa_adapters.attention import Backend, dense_mask
from sfa_adapters.choices import TERMS

HEAD = ["| grid | dtype | pass | candidate | ms | ratio | quartiles | peak MB |", "|---|---|---|---|---|---|---|---|"]


def measure(
    side: int,
    dtype: torch.dtype,
    backward: bool,
    heads: int,
    head_dim: int,
    batch: int,
    rounds: int,
    device: torch.device,
) -> list[Row]:
    """All candidates on one grid with a CLS token."""
    torch.manual_seed(0)
    layout = TokenLayout.regular(side, side, 1, device=device)
    bias = StructuralBias(heads, device=device)
    tokens = layout.num_tokens
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=backward)
    everything = StructuralBias(heads, terms=TERMS, device=device)
    eager = EagerBias(everything, layout)
    cached = dense_mask(bias.factors(layout), qkv[:, :, 0].transpose(1, 2)).detach()

    def run(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(backward):
                out = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            if backward:
                qkv.grad = None
                bias.zero_grad()
                out.backward(torch.ones_like(out))
            return out

        return call

    def backend(name: Backend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: attend(q, k, v, bias.factors(layout), backend=name)

    candidates = {"plain": run(F.scaled_dot_product_attention), "folded": run(backend("folded"))}
    for name in ("blocked", "lines", "dense"):
        candidates[name] = run(backend(name))
    if not backward:
        candidates["cached"] = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, cached))
    candidates["auto"] = run(backend("auto"))
    candidates["eager"] = run(eager.attend)
    label = f"{side}x{side} {str(dtype)[6:]} {'forward+backward' if backward else 'forward'}"
    return compare(candidates, rounds, device, label)


def main() -> None:
    """Parses the command line, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grids", type=int, nargs="+", default=[16, 24, 32, 48, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    lines = [f"{args.heads} heads of {args.head_dim}, batch {args.batch}, one CLS token.", "", *HEAD]
    for side in args.grids:
        for dtype in args.dtypes:
            for backward in (False, True):
                settings = (args.heads, args.head_dim, args.batch, args.rounds, device)
                rows = measure(side, getattr(torch, dtype), backward, *settings)
                label = "forward+backward" if backward else "forward"
                lines += [row.markdown(f"{side}x{side}", dtype, label) for row in rows]
    Console().print("\n".join(lines), markup=False)
    print(
        "written:", write_result("attention", device, f"python -m benchmarks.attention {' '.join(sys.argv[1:])}", lines)
    )


if __name__ == "__main__":
    main()
