"""Peak memory of attention against the number of tokens, by backend: a table, and the figure of docs/performance.md.

    python -m benchmarks.attention_memory                 # fp32, forward and backward, up to 12,288 tokens: 5 minutes
    python -m benchmarks.attention_memory --device cuda --dtype bfloat16

What one call allocates, without its inputs. Of each curve the exponent of its last half is given: 1 is linear, 2 is
quadratic. Candidates that need a matrix above 2 GB are left out from there on.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.attention_cases import CANDIDATES, AttentionCase, candidates
from benchmarks.common import hardware, peak_memory, write_result
from sfa_adapters import TokenLayout
from sfa_adapters.choices import DEFAULT_TERMS

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
GRIDS = ((16, 16), (24, 24), (32, 32), (48, 48), (64, 64), (72, 80), (128, 96))
DEFAULT_CANDIDATES = ["lines", "blocked", "folded", "dense"]

Curve = dict[int, float]  # tokens to MB


def measure(names: list[str], dtype: torch.dtype, heads: int, width: int, device: torch.device) -> dict[str, Curve]:
    """A curve of each candidate and of plain SDPA."""
    curves: dict[str, Curve] = {}
    for rows, columns in track(GRIDS, description="tokens", transient=True):
        layout = TokenLayout.regular(rows, columns, device=device)
        case = AttentionCase(layout, f"{rows}x{columns}", DEFAULT_TERMS, dtype, heads, width, 1, backward=True)
        for name, call in candidates(case, names).items():
            curves.setdefault(name, {})[layout.num_tokens] = peak_memory(call, device)
    return curves


def exponent(curve: Curve) -> float:
    """Slope of the last half of a curve on logarithmic axes."""
    points = [(math.log(tokens), math.log(size)) for tokens, size in sorted(curve.items())][len(curve) // 2 :]
    if len(points) < 2:
        return math.nan
    (first, low), (last, high) = points[0], points[-1]
    return (high - low) / (last - first)


def draw(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Both axes logarithmic, the name of each candidate at the end of its curve."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        tokens = sorted(curve)
        colour, line = ("black", "--") if name == "plain" else (f"C{number - 1}", "-")
        axes.plot(tokens, [curve[n] for n in tokens], line, marker="o", linewidth=2, label=name, color=colour)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("tokens", fontsize=14)
    axes.set_ylabel("peak memory of one call, MB", fontsize=14)
    axes.set_xticks([rows * columns for rows, columns in GRIDS], [str(r * c) for r, c in GRIDS], rotation=45)
    axes.minorticks_off()
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=13)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Parses the command line, measures, prints and writes table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=DEFAULT_CANDIDATES)
    args = parser.parse_args()
    device = torch.device(args.device)
    curves = measure(args.candidates, getattr(torch, args.dtype), args.heads, args.width, device)
    about = f"{args.heads} heads of {args.width}, {args.dtype}, terms row and col, forward and backward"
    counts = sorted(curves["plain"])
    lines = [f"{about}. Peak memory in MB.", ""]
    lines += ["| candidate | " + " | ".join(map(str, counts)) + " | exponent |", "|---" * (len(counts) + 2) + "|"]
    for name, curve in curves.items():
        sizes = [f"{curve[count]:.1f}" if count in curve else "" for count in counts]
        lines.append(f"| {name} | " + " | ".join(sizes) + f" | {exponent(curve):.2f} |")
    Console().print("\n".join(lines), markup=False, soft_wrap=True)
    figure = FIGURES / f"attention_memory_{hardware(device)}.png"
    draw(curves, about, figure)
    command = f"python -m benchmarks.attention_memory {' '.join(sys.argv[1:])}".strip()
    print("written:", write_result("attention-memory", device, command, lines), figure)


if __name__ == "__main__":
    main()
