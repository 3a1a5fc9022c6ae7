"""The whole InternViT-300M encoder on adaptive tokens, against its own tokens and against a page resized to as many.

    python -m benchmarks.tokens                          # 24 layers, four pages of 448 px, fp32: 6 minutes on 2 cores
    python -m benchmarks.tokens --device cuda --dtype bfloat16 --rounds 20

Candidates: `plain`, 1024 tokens and CLS; `ADAT r`, published levels within the share r, scoring and planning included;
`down r`, the page resized to about as many tokens; `ADAT r + SFA`. One call encodes all pages, one at a time. The last
line is the time of scoring and planning alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.common import compare, write_result
from benchmarks.encoder import build
from sfa_adapters import inject_sfa
from sfa_adapters.adat import AdaptiveTokenizer, PatchPolicy, inject_adat, latest_plans
from sfa_adapters.recipes.synthetic.pages import PageKind, render_page

KINDS: tuple[PageKind, ...] = ("text", "table", "chart", "mixed")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD = ["| candidate | tokens | ms/page | ratio | quartiles | peak MB | faster |", "|---|---|---|---|---|---|---|"]


def pages(count: int) -> Tensor:
    """Rendered pages of the test split in [0, 1], `[4 * count, 3, 448, 448]`."""
    images = [render_page(kind, seed, "test").image for kind in KINDS for seed in range(count)]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images]).float() / 255


def main() -> None:
    """Parses the command line, measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--pages", type=int, default=1, help="pages of each kind")
    parser.add_argument("--scorer", default="density", choices=["density", "edges", "reconstruction"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    images = pages(args.pages)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    normalised = ((images - mean) / std).to(device, dtype)

    def encode(model: Any, batch: Tensor, tokens: list[int] | None = None) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> None:
            if tokens is not None:
                tokens.clear()
            for page in batch:
                model(page[None])
                if tokens is not None:
                    tokens.append(latest_plans(model)[0].num_tokens)

        return call

    candidates: dict[str, Callable[[], object]] = {}
    counts: dict[str, list[int]] = {}
    plain = build(args.layers, "sdpa", dtype, device).eval()
    candidates["plain"], counts["plain"] = encode(plain, normalised), [1024]
    policies = {r: PatchPolicy.published(scorer=args.scorer, budget=r) for r in args.ratios}
    for ratio, policy in policies.items():
        side = round(32 * ratio**0.5)
        small = F.interpolate(images, (14 * side, 14 * side), mode="bicubic", antialias=True).clamp(0, 1)
        name = f"down {ratio:g}"
        candidates[name], counts[name] = encode(plain, ((small - mean) / std).to(device, dtype)), [side**2]
        for sfa in (False, True):
            model = build(args.layers, "sdpa", dtype, device).eval()
            model = inject_adat(inject_sfa(model) if sfa else model, AdaptiveTokenizer(policy=policy))
            name = f"ADAT {ratio:g}{' + SFA' if sfa else ''}"
            counts[name] = []
            candidates[name] = encode(model, normalised, counts[name])
    rows = compare(candidates, args.rounds, device, f"{args.dtype} encoder")
    lines = [
        f"InternViT-300M-448, {args.layers} layers, {args.dtype}, {len(images)} pages ({', '.join(KINDS)}).",
        "",
        *HEAD,
    ]
    for row in rows:
        cells = [row.name, f"{statistics.mean(counts[row.name]):.0f}", f"{row.milliseconds / len(images):.0f}"]
        cells += [f"{row.ratio:.2f}", f"{row.low:.2f}-{row.high:.2f}", f"{row.megabytes:.0f}", f"{1 / row.ratio:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    encoder = rows[0].milliseconds / len(images)
    lines += ["", *overhead(policies[args.ratios[0]], images.to(device), encoder)]
    Console().print("\n".join(lines), markup=False, soft_wrap=True)
    command = f"python -m benchmarks.tokens {' '.join(sys.argv[1:])}".strip()
    print("written:", write_result(f"tokens-{args.layers}layers-{args.dtype}", device, command, lines))


def overhead(policy: PatchPolicy, images: Tensor, encoder: float) -> list[str]:
    """Milliseconds per page of scoring and planning, and their share of the encoder's."""
    times = []
    for _ in range(5):
        for page in images:
            start = time.perf_counter()
            policy.plan_images(page[None], 14)
            times.append(1e3 * (time.perf_counter() - start))
    middle = statistics.median(times)
    return [
        f"Scoring and planning a page: {middle:.1f} ms (median of {len(times)}), {middle / encoder:.1%} of `plain`."
    ]


if __name__ == "__main__":
    main()
