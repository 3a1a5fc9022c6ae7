"""Speedup from pruning attention heads: measured, beside what arithmetic expects.

    python -m benchmarks.heads                                       # a quarter of the width, fp32: minutes on one core
    python -m benchmarks.heads --scale 1 --device cuda --dtype bfloat16 --rounds 20     # full size, one after the other

Two language models with the proportions of those of LLaVA-1.5-7B (32 heads) and Qwen2.5-VL-7B (28 heads in 4 groups of
grouped-query attention). Width, layers and vocabulary are divided by the same number, so the share of attention in the
weights, and with it the expected gain, stays what it is at full size. Weights are random: what is measured is time and
memory. The plan is uniform over random scores. Each line is a `prune_receipt`: original and pruned model are the same
object and take turns; the prompt is text.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import write_result
from sfa_adapters.heads import HeadScores, PruneReceipt, plan_heads, prune_heads, prune_receipt, take_probe
from sfa_adapters.heads.expected import decode_bytes
from sfa_adapters.statistics import Interval

SHAPES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "LLaVA-1.5-7B": (LlamaConfig, LlamaForCausalLM, {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "vocab_size": 32_064,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    }),
    "Qwen2.5-VL-7B": (Qwen2Config, Qwen2ForCausalLM, {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }),
}  # fmt: skip
DIVIDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "vocab_size")  # the table twice
HEAD = ["| shape | heads gone | what | ms | faster | 95% interval | expected |", "|---|---|---|---|---|---|---|"]


def build(shape: str, scale: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A language model of random weights with the proportions of a host's, the same at every call."""
    config, kind, options = SHAPES[shape]
    settings = dict(options)
    for name in DIVIDED:
        settings[name] //= scale
    torch.manual_seed(0)
    with torch.device(device):
        return kind(config(**settings, max_position_embeddings=4096)).to(dtype).eval()


def receipt_of(model: Any, rate: float, args: argparse.Namespace) -> PruneReceipt:
    """Prunes heads of a model and times it against the original."""
    config: Any = model.config
    layers = [f"model.layers.{number}.self_attn" for number in range(config.num_hidden_layers)]
    numbers = torch.rand(len(layers), config.num_attention_heads, generator=torch.Generator().manual_seed(0)).tolist()
    groups = dict.fromkeys(layers, int(config.num_key_value_heads))
    plan = plan_heads(HeadScores(dict(zip(layers, numbers, strict=True)), groups, "random"), rate)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.vocab_size, (args.batch, args.prompt), generator=generator).to(model.device)
    probe = take_probe(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return prune_receipt(probe, prune_heads(model, plan), args.rounds, args.tokens)


def main() -> None:
    """Parses the command line, measures, prints and writes the tables, and the receipts as JSON beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3])
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if device.type == "cpu":
        torch.set_num_threads(1)
    summary_lines: list[dict[str, Any]] = []
    rows, notes = list(HEAD), []
    work = [(shape, rate) for shape in SHAPES for rate in args.rates]
    for shape, rate in track(work, description="receipts", transient=True):
        model = build(shape, args.scale, device, dtype)
        attention = sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name)
        share = attention * dtype.itemsize / decode_bytes(model)
        receipt = receipt_of(model, rate, args)
        summary_lines.append({"shape": shape, "rate": rate, "attention_share": share, "receipt": receipt.to_dict()})
        rows += lines_of(shape, receipt)
        assert receipt.speed is not None
        notes.append(f"* {shape}, {rate:.0%} asked, attention is {share:.0%} of what a step reads. {sizes(receipt)} "
                     f"{receipt.speed.verdict}")  # fmt: skip
    size = f"1/{args.scale} of width, layers and vocabulary, {args.dtype}, batch {args.batch}"
    lines = [f"{size}; a prompt of {args.prompt} tokens, {args.tokens} decoded, {args.rounds} rounds.",
             "Ratios here are original / pruned: medians over rounds, 95% intervals from the order of the rounds.",
             "", *rows, "", *notes]  # fmt: skip
    Console().print("\n".join(lines), markup=False, soft_wrap=True)
    command = f"python -m benchmarks.heads {' '.join(sys.argv[1:])}".strip()
    path = write_result(f"heads-scale{args.scale}-{args.dtype}", device, command, lines)
    path.with_suffix(".json").write_text(
        json.dumps({"options": vars(args), "receipts": summary_lines}, indent=2) + "\n"
    )
    print("written:", path, "and .json")


def lines_of(shape: str, receipt: PruneReceipt) -> list[str]:
    """The lines of one receipt in the table."""
    speed = receipt.speed
    assert speed is not None
    assert speed.decode is not None
    assert speed.decode_ratio is not None
    assert speed.expected_decode is not None
    heads, _ = next(iter(receipt.heads.values()))
    gone = f"{heads - next(iter(receipt.heads.values()))[1]} of {heads}"
    return [
        _line(shape, gone, "prefill", speed.prefill, speed.prefill_ratio, speed.expected_prefill),
        _line(shape, gone, "a token", speed.decode, speed.decode_ratio, speed.expected_decode),
    ]


def sizes(receipt: PruneReceipt) -> str:
    """Memory in one sentence."""
    speed = receipt.speed
    assert speed is not None
    assert speed.cache is not None
    pairs = {"weights": speed.weights, "cache of the prompt": speed.cache, "peak": speed.peak}
    return ", ".join(f"{name} {b / 2**20:.1f} -> {a / 2**20:.1f} MB" for name, (b, a) in pairs.items()) + "."


def _line(shape: str, gone: str, what: str, times: tuple[float, float], ratio: Interval, expected: float) -> str:
    cells = [shape, gone, what, f"{1e3 * times[0]:.1f} -> {1e3 * times[1]:.1f}", f"{ratio.value:.3f}x"]
    return f"| {' | '.join([*cells, f'{ratio.low:.3f}-{ratio.high:.3f}', f'{expected:.3f}x'])} |"


if __name__ == "__main__":
    main()
