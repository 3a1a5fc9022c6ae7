"""FastV: time of prefill and decoding in the shape of LLaVA-1.5-7B, against the unmodified host, all on sdpa.

    python -m benchmarks.fastv                                       # an eighth of the width, fp32: minutes on 2 cores
    python -m benchmarks.fastv --hidden 4096 --heads 32 --device cuda --dtype bfloat16 --rounds 20     # full size

CLIP-L/336 makes 576 image tokens; the language model has 32 layers. Weights are random: what is measured is time and
memory. Features of the image are computed once, so that the first table is about the language model alone; the prompt
is the image and 40 tokens of text. `input` prunes before layer 0. The second table is one decoding step after it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.common import Row, compare, write_result
from sfa_adapters.compat import cache_of_output, with_cache
from sfa_adapters.reduction.fastv.inject import FastVConfig, inject_fastv

IMAGE, VOCABULARY, TEXT = 1, 1000, 40
HEAD = ["| candidate | tokens behind | ms | ratio | quartiles | peak MB | faster |", "|---|---|---|---|---|---|---|"]
CONFIGS: dict[str, FastVConfig] = {
    "K=2, 50% pruned": FastVConfig(layer=2, ratio=0.5),
    "K=2, 75% pruned": FastVConfig(layer=2, ratio=0.75),
    "K=2, 90% pruned": FastVConfig(layer=2, ratio=0.9),
    "K=2, 50%, diversity": FastVConfig(layer=2, ratio=0.5, selector="diversity"),
    "input, 75% pruned": FastVConfig(layer=2, ratio=0.75, prune_at="input"),
}


def build(hidden: int, heads: int, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A host of random weights with LLaVA-1.5's proportions, and a tower that is not measured."""
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                              image_size=336, patch_size=14)  # fmt: skip
    text = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 11008 // 4096, num_hidden_layers=layers,
                       num_attention_heads=heads, vocab_size=VOCABULARY, max_position_embeddings=4096)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    with torch.device(device):
        torch.manual_seed(0)
        model: Any = LlavaForConditionalGeneration(config)
        return model.to(dtype).eval()


def twin(model: Any) -> Any:
    """A copy of the host that shares its weights and has its own hooks."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def main() -> None:
    """Parses the command line, measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    plain = build(args.hidden, args.heads, args.layers, device, dtype)
    hosts = {"plain": plain, **{name: inject_fastv(twin(plain), config) for name, config in CONFIGS.items()}}
    ids = torch.cat((torch.full((576,), IMAGE), torch.arange(2, 2 + TEXT))).expand(args.batch, -1).to(device)
    pixels = torch.randn(args.batch, 3, 336, 336, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        features = plain.get_image_features(pixels, return_dict=True)

    def prefill(model: Any) -> Any:
        with torch.no_grad():
            out = model(input_ids=ids, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)
        return cache_of_output(out)

    caches = {name: prefill(model) for name, model in hosts.items()}
    held = {name: int(cache.layers[-1].get_seq_length()) for name, cache in caches.items()}
    token = torch.full((args.batch, 1), 5, device=device)

    def step(name: str) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> None:
            hosts[name](**with_cache(hosts[name], {"input_ids": token}, caches[name]))
            caches[name].crop(-1)

        return call

    prefills: dict[str, Callable[[], object]] = {n: lambda model=m: prefill(model) for n, m in hosts.items()}
    size = f"hidden {args.hidden}, {args.layers} layers, {args.dtype}, batch {args.batch}"
    lines = [f"LLaVA-1.5's shape, {size}: 576 image tokens and {TEXT} of text; FastV's selection included.", ""]
    lines += table("prefill", compare(prefills, args.rounds, device, "prefill"), held)
    steps = compare({name: step(name) for name in hosts}, args.rounds * 3, device, "decode")
    lines += ["", *table("one decoding step", steps, held)]
    lines += ["", "Cache, MB: " + ", ".join(f"{name} {megabytes(cache):.1f}" for name, cache in caches.items()) + "."]
    Console().print("\n".join(lines), markup=False, soft_wrap=True)
    command = f"python -m benchmarks.fastv {' '.join(sys.argv[1:])}".strip()
    print("written:", write_result(f"fastv-hidden{args.hidden}-{args.dtype}", device, command, lines))


def table(title: str, rows: list[Row], held: dict[str, int]) -> list[str]:
    """The lines of one table."""
    lines = [f"**{title}**", "", *HEAD]
    for row in rows:
        cells = [row.name, str(held[row.name]), f"{row.milliseconds:.1f}", f"{row.ratio:.2f}"]
        cells += [f"{row.low:.2f}-{row.high:.2f}", f"{row.megabytes:.0f}", f"{1 / row.ratio:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def megabytes(cache: Any) -> float:
    """Size of the keys and values of a cache, in MiB."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.numel() * part.element_size() for part in parts) / 2**20


if __name__ == "__main__":
    main()
