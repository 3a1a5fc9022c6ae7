"""The whole InternViT-300M encoder with SFA in every layer, against the same encoder on plain SDPA.

    python -m benchmarks.encoder                          # 24 layers, 1025 tokens, fp32 and bf16: 15 minutes on 2 cores
    python -m benchmarks.encoder --device cuda --batch 8 --rounds 30

Candidates: `plain`; `folded`; `dense` (matrix built in every layer of every forward); `auto` (default memory budget);
`auto+cache` (a budget that holds the dense masks of all layers; without gradients only); `eager` (buffers and score
matrices, as first written).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import InternVLVisionConfig, InternVLVisionModel

from benchmarks.common import Row, compare, write_result
from benchmarks.reference import EagerBias
from sfa_adapters import SFAConfig, StructuralBias, TokenLayout, inject_sfa

HEAD = ["| dtype | pass | candidate | ms | ratio | quartiles | peak MB |", "|---|---|---|---|---|---|---|"]
CACHE_MB = 4096
PASSES = ["forward", "forward+backward"]


def build(layers: int, implementation: str, dtype: torch.dtype, device: torch.device) -> Any:
    """InternViT-300M-448 with random weights, the same for every candidate."""
    torch.manual_seed(0)
    config = InternVLVisionConfig(num_hidden_layers=layers, attention_bias=True)
    config._attn_implementation = implementation
    model: Any = InternVLVisionModel(config)
    return model.to(device, dtype)


def add_eager_bias(model: Any, device: torch.device) -> None:
    """SFA as first written: a matrix from N x N buffers, added to eager attention in every layer."""
    layout = TokenLayout.regular(32, 32, 1, device=device)

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias: Any = module.eager_bias
        return args, {**kwargs, "attention_mask": bias.phi().to(args[0].dtype)}

    for layer in model.encoder.layer:
        scalars = StructuralBias(layer.attention.num_heads, device=device)
        layer.attention.scalars = scalars
        layer.attention.eager_bias = EagerBias(scalars, layout)
        layer.attention.register_forward_pre_hook(hook, with_kwargs=True)


def measure(
    layers: int, dtype: torch.dtype, backward: bool, batch: int, rounds: int, device: torch.device
) -> list[Row]:
    """All candidates on one dtype."""
    models = {"plain": build(layers, "sdpa", dtype, device)}
    budgets = {
        "folded": ("folded", 0.0),
        "dense": ("dense", 0.0),
        "auto": ("auto", 256.0),
        "auto+cache": ("auto", CACHE_MB),
    }
    for name, (backend, budget) in budgets.items():
        if not (backward and name == "auto+cache"):
            config = SFAConfig.published(backend=backend, mask_cache_mb=budget)
            models[name] = inject_sfa(build(layers, "sdpa", dtype, device), config)
    models["eager"] = build(layers, "eager", dtype, device)
    add_eager_bias(models["eager"], device)
    images = torch.randn(batch, 3, 448, 448, device=device, dtype=dtype)

    def run(model: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(backward):
                out = model(images).last_hidden_state
            if backward:
                model.zero_grad(set_to_none=True)
                out.float().square().mean().backward()
            return out

        return call

    label = f"{str(dtype)[6:]} {'forward+backward' if backward else 'forward'}"
    return compare({name: run(model) for name, model in models.items()}, rounds, device, label)


def main() -> None:
    """Parses the command line, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    lines = [f"InternViT-300M-448, {args.layers} layers, 1025 tokens, batch {args.batch}.", "", *HEAD]
    for dtype in args.dtypes:
        for label in args.passes:
            rows = measure(
                args.layers, getattr(torch, dtype), label == "forward+backward", args.batch, args.rounds, device
            )
            lines += [row.markdown(dtype, label) for row in rows]
    Console().print("\n".join(lines), markup=False)
    # A run of some of the passes must not overwrite one of all.
    part = [f"{args.layers}layers", *([] if len(args.dtypes) > 1 else args.dtypes)]
    part += [] if args.passes == PASSES else [label.replace("+", "-") for label in args.passes]
    command = f"python -m benchmarks.encoder {' '.join(sys.argv[1:])}".strip()
    print("written:", write_result("-".join(["encoder", *part]), device, command, lines))


if __name__ == "__main__":
    main()
