"""Cost of `observe`: a language model's forward, observed and not, against eager `output_attentions`.

    python -m benchmarks.observe                         # N 576 to 8192, a layer of 32 heads, fp32: 6 minutes
    python -m benchmarks.observe --device cuda --dtype bfloat16 --rounds 20

Candidates: `plain`, an unobserved forward with SDPA; `entropy + mass`, every row's entropy and its mass on two groups;
`mass of 20 rows`, what MDI needs; `eager maps`, `output_attentions=True`, all maps kept as the usual code does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaModel

from benchmarks.common import compare, write_result
from sfa_adapters import observe
from sfa_adapters.readers import KeyMass, RowEntropy

# Maps, scores and their softmax of one layer are alive at once, and the maps of all layers are kept.
MOST_EAGER_BYTES = 12 * 2**30


def main() -> None:
    """Parses the command line, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 1024, 2600, 4096, 8192])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    width = args.heads * args.width
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=args.layers, vocab_size=100,
        num_attention_heads=args.heads, max_position_embeddings=max(args.tokens),
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaModel(config)
    model = model.to(device, dtype).eval()
    body = [
        f"{args.layers} decoder layer(s), {args.heads} heads of {args.width}, {args.dtype}, batch 1, causal prefill.",
        "",
        "| tokens | candidate | ms | ratio | quartiles | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in args.tokens:
        candidates = _candidates(model, torch.randint(100, (1, tokens), device=device))
        if (args.layers + 3) * 4 * args.heads * tokens**2 > MOST_EAGER_BYTES:
            del candidates["eager maps"]
            body.append(
                f"| {tokens} | eager maps | not run: {4 * args.heads * tokens**2 / 2**30:.0f} GiB a map | | | |"
            )
        rows = compare(candidates, args.rounds, device, f"{tokens} tokens")
        body += [row.markdown(str(tokens)) for row in rows]
    console = Console()
    console.print("\n".join(body), markup=False)
    name = f"observe-{args.heads}heads-{args.dtype}"
    command = f"python -m benchmarks.observe {' '.join(sys.argv[1:])}".strip()
    console.print(f"written: {write_result(name, device, command, body)}")


def _candidates(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    tokens = ids.shape[1]
    groups = (torch.arange(tokens) < tokens // 2).long()

    @torch.no_grad()
    def plain() -> None:
        model.set_attn_implementation("sdpa")
        model(ids, use_cache=False)

    def every_row() -> None:
        with observe(model, [RowEntropy(), KeyMass(groups)]):
            plain()

    def few_rows() -> None:
        with observe(model, KeyMass(groups, queries=torch.arange(tokens - 20, tokens))):
            plain()

    @torch.no_grad()
    def eager() -> object:
        model.set_attn_implementation("eager")
        return model(ids, use_cache=False, output_attentions=True).attentions

    return {"plain": plain, "entropy + mass": every_row, "mass of 20 rows": few_rows, "eager maps": eager}


if __name__ == "__main__":
    main()
