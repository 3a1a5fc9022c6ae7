"""A whole encoder with SFA in every layer, against the same encoder on plain SDPA.

    python -m benchmarks.encoder                          # 24 layers, 1025 tokens, fp32 and bf16: 15 minutes on 2 cores
    python -m benchmarks.encoder --tower qwen3_vl --layers 2 --dtypes float32 --candidates lines folded --rounds 3
    python -m benchmarks.encoder --device cuda --batch 8 --rounds 30

Towers: see `benchmarks/towers.py`. Candidates: `plain`; the backends `folded`, `blocked`, `lines`, `triton` (CUDA) and
`dense` (matrix built in every layer of every forward); `auto` (default memory budget); `auto+cache` (a budget that
holds the dense masks of all layers; without gradients only); `eager` (buffers and score matrices, as first written;
InternViT only).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import Row, compare, write_result
from benchmarks.reference import EagerBias
from benchmarks.towers import TOWERS
from sfa_adapters import SFAConfig, StructuralBias, TokenLayout, inject_sfa
from sfa_adapters.choices import TERMS

HEAD = ["| dtype | pass | candidate | ms | ratio | quartiles | peak MB |", "|---|---|---|---|---|---|---|"]
CACHE_MB = 4096
PASSES = ["forward", "forward+backward"]
CANDIDATES = ["folded", "blocked", "lines", "triton", "dense", "auto", "auto+cache", "eager"]


def build(layers: int, implementation: str, dtype: torch.dtype, device: torch.device, tower: str = "internvit") -> Any:
    """A tower with random weights, the same for every candidate."""
    torch.manual_seed(0)
    return TOWERS[tower].model(layers, implementation).to(device, dtype)


def add_eager_bias(model: Any, device: torch.device) -> None:
    """SFA as first written: a matrix from N x N buffers, added to eager attention in every layer."""
    layout = TokenLayout.regular(32, 32, 1, device=device)

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias: Any = module.eager_bias
        return args, {**kwargs, "attention_mask": bias.phi().to(args[0].dtype)}

    for layer in model.encoder.layer:
        scalars = StructuralBias(layer.attention.num_heads, terms=TERMS, device=device)
        layer.attention.scalars = scalars
        layer.attention.eager_bias = EagerBias(scalars, layout)
        layer.attention.register_forward_pre_hook(hook, with_kwargs=True)


def measure(args: argparse.Namespace, dtype: torch.dtype, backward: bool, device: torch.device) -> list[Row]:
    """All candidates on one dtype."""

    def built(implementation: str = "sdpa") -> Any:
        return build(args.layers, implementation, dtype, device, args.tower)

    models = {"plain": built()}
    for name in args.candidates:
        if name == "eager":
            models[name] = built("eager")
            add_eager_bias(models[name], device)
        elif not (backward and name == "auto+cache"):
            backend, budget = name, 256.0 if name == "auto" else 0.0
            if name == "auto+cache":
                backend, budget = "auto", CACHE_MB
            config = SFAConfig(terms=args.terms.split(","), backend=backend, mask_cache_mb=budget)
            models[name] = inject_sfa(built(), config)
    torch.manual_seed(0)
    given = {k: v.to(device) for k, v in TOWERS[args.tower].inputs(args.batch).items()}
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}

    def run(model: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(backward):
                out = model(**given).last_hidden_state
            if backward:
                model.zero_grad(set_to_none=True)
                out.float().square().mean().backward()
            return out

        return call

    label = f"{str(dtype)[6:]} {'forward+backward' if backward else 'forward'}"
    return compare({name: run(model) for name, model in models.items()}, args.rounds, device, label)


def main() -> None:
    """Parses the command line, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tower", choices=list(TOWERS), default="internvit")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--terms", default="row,col,dist,block")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.device == "cpu":  # there it would be `folded` under another name
        args.candidates = [name for name in args.candidates if name != "triton"]
    if args.tower != "internvit":
        args.candidates = [name for name in args.candidates if name != "eager"]
    device = torch.device(args.device)
    title = f"{TOWERS[args.tower].title}; {args.layers} layers, batch {args.batch}, terms {args.terms}."
    lines = [title, "", *HEAD]
    for dtype in args.dtypes:
        for label in args.passes:
            rows = measure(args, getattr(torch, dtype), label == "forward+backward", device)
            lines += [row.markdown(dtype, label) for row in rows]
    Console().print("\n".join(lines), markup=False, soft_wrap=True)
    # A run of some of the passes must not overwrite one of all.
    part = [*([] if args.tower == "internvit" else [args.tower]), f"{args.layers}layers"]
    part += [] if args.terms.count(",") == 3 else [args.terms.replace(",", "-")]
    part += [*([] if len(args.dtypes) > 1 else args.dtypes)]
    part += [] if args.passes == PASSES else [label.replace("+", "-") for label in args.passes]
    command = f"python -m benchmarks.encoder {' '.join(sys.argv[1:])}".strip()
    print("written:", write_result("-".join(["encoder", *part]), device, command, lines))


if __name__ == "__main__":
    main()
