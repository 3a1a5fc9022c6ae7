"""Attention alone under a structural bias: plain SDPA against every backend and the eager reference.

    python -m benchmarks.attention                             # grids 16 to 48, fp32 and bf16: 10 minutes on 2 cores
    python -m benchmarks.attention --grids 32 48 72x80 --widths 64 72 80 --dtypes float32 --heads 4 --rounds 5
    python -m benchmarks.attention --grids 96x128 --widths 72 --dtypes float32 --heads 2 --rounds 3
    python -m benchmarks.attention --write-table               # what `auto` goes by, for this CPU: 15 minutes
    python -m benchmarks.attention --device cuda --write-table # likewise for a GPU; not timed yet
    python -m benchmarks.attention --device cuda --dtypes bfloat16 --grids 32 48 72x80 96x128 --widths 64 72 80

Candidates: `plain` SDPA without a bias; `folded`; `blocked`; `lines`; `dense` (the matrix is built in every call);
`cached` (a dense matrix from an earlier call; without gradients only); `auto`; `flex` (FlexAttention, compiled; on a
CPU without gradients only); `eager` (all four terms, buffers and the whole score matrix, as first written). Those that
need a matrix above 2 GB are left out.
"""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console

from benchmarks.attention_cases import CANDIDATES, AttentionCase, candidates
from benchmarks.common import compare, write_result
from sfa_adapters import TokenLayout
from sfa_adapters.choices import DEFAULT_TERMS, TERMS

HEAD = [
    "| grid | width | dtype | pass | candidate | ms | ratio | quartiles | peak MB |",
    "|---|---|---|---|---|---|---|---|---|",
]
PASSES = ["forward", "forward+backward"]
DEFAULT_CANDIDATES = [name for name in CANDIDATES if name != "flex"]


def grid(text: str) -> tuple[int, int]:
    """`32` or `72x80`, rows first."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side nor ROWSxCOLUMNS.")
    return sides[0], sides[-1]


def main() -> None:
    """Parses the command line, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grids", type=grid, nargs="+", default=[(16, 16), (24, 24), (32, 32), (48, 48)])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    parser.add_argument("--terms", default=",".join(DEFAULT_TERMS), help=f"of {','.join(TERMS)}")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=DEFAULT_CANDIDATES)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefix", type=int, default=1, help="tokens without a place, in front")
    parser.add_argument("--write-table", action="store_true", help="measure what `auto` goes by; takes no other option")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.write_table:
        from benchmarks.backend_table import write_table

        print("written:", write_table(device))
        return
    title = f"{args.heads} heads, batch {args.batch}, {args.prefix} token(s) without a place, terms {args.terms}."
    lines = [title, "", *HEAD]
    for rows, columns in args.grids:
        layout = TokenLayout.regular(rows, columns, args.prefix, device=device)
        for width in args.widths:
            for dtype in args.dtypes or ["float32", "bfloat16"]:
                for label in args.passes:
                    case = AttentionCase(
                        layout, f"{rows}x{columns}", args.terms.split(","), getattr(torch, dtype), args.heads, width,
                        args.batch, label == "forward+backward",
                    )  # fmt: skip
                    made = compare(
                        candidates(case, args.candidates), args.rounds, device, f"{case.title} {width} {dtype} {label}"
                    )
                    lines += [row.markdown(case.title, str(width), dtype, label) for row in made]
    Console().print("\n".join(lines), markup=False, soft_wrap=True)
    command = f"python -m benchmarks.attention {' '.join(sys.argv[1:])}".strip()
    # A run on other grids, or in one dtype, must not overwrite the whole one.
    part = ["x".join(map(str, sides)) for sides in args.grids] if args.grids != parser.get_default("grids") else []
    part += [] if args.dtypes is None or len(args.dtypes) > 1 else args.dtypes
    part += [] if args.terms == ",".join(DEFAULT_TERMS) else [args.terms.replace(",", "-")]
    part += ["flex"] if "flex" in args.candidates and "folded" not in args.candidates else []
    print("written:", write_result("-".join(["attention", *part]), device, command, lines))


if __name__ == "__main__":
    main()
