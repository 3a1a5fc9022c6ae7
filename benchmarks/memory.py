"""Predicted and measured memory of full-size hosts: 10 training steps each, from the configuration, random weights.

    python -m benchmarks.memory                                    # InternVL3.5-8B: nf4, split and bf16, on one GPU
    python -m benchmarks.memory --recipe llava_1_5_7b --plans nf4 bf16 --batch 4 --tiles 1
    python -m benchmarks.memory --all-logits                       # not those of answer tokens alone

Needs a CUDA GPU, and no download. What is measured is the peak of the allocator (`max_memory_allocated`), so the
context of CUDA is in neither number. `split` has both halves on one card, with its hooks; its prediction is that of
`bf16`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.common import write_result
from sfa_adapters.answer_logits import logits_at_answers
from sfa_adapters.hosts.load import Host, prepare
from sfa_adapters.hosts.placement import dispatch, skeleton, split_map
from sfa_adapters.hosts.quantization import check_loaded, quantization
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.predict import WORKSPACE, predict_memory
from sfa_adapters.memory.shapes import Lengths, lengths_of
from sfa_adapters.recipes.catalog import architecture, find_recipe
from sfa_adapters.training.optimizer import build_optimizer
from sfa_adapters.vlm.records import vlm_spec

PLANS = ("nf4", "split", "bf16")
STEPS = 10


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="internvl3_5_8b")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tiles", type=int, default=None)
    parser.add_argument("--all-logits", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.memory needs a CUDA GPU; `sfa plan` predicts without one.")
    base = find_recipe(args.recipe).replace(answer_logits=not args.all_logits)
    config = architecture(base)
    lengths = lengths_of(base, config, args.tiles)
    body = [
        f"{args.recipe}: {args.batch} x {lengths.sequence:,} tokens, logits of "
        f"{'all' if args.all_logits else lengths.answer}, {STEPS} steps with AdamW, GB (10^9 bytes).",
        "",
        "| plan | weights, predicted | weights | peak, predicted | peak | off by |",
        "|---|---|---|---|---|---|",
    ]
    for plan in args.plans:
        recipe = base.replace(plan=plan, micro_batch=args.batch, batch_size=args.batch)
        on_one = recipe.replace(plan="bf16") if plan == "split" else recipe
        predicted = predict_memory(on_one, config, 1, 1e12, tiles=args.tiles).devices[0]
        weights, peak = predicted.weights, predicted.total - WORKSPACE
        measured_weights, measured = measure(recipe, config, lengths)
        off = f"{peak / measured - 1:+.1%}"
        numbers = " | ".join(f"{size / 1e9:.2f}" for size in (weights, measured_weights, peak, measured))
        body.append(f"| {plan} | {numbers} | {off} |")
    Console().print("\n".join(body), markup=False)
    device, command = torch.device("cuda"), f"python -m benchmarks.memory {' '.join(sys.argv[1:])}".strip()
    print(
        "written:",
        write_result(f"memory-{args.recipe}-batch{args.batch}{'-all-logits' * args.all_logits}", device, command, body),
    )


def measure(recipe: Recipe, config: Any, lengths: Lengths) -> tuple[int, int]:
    """Bytes of the weights, and the peak of ten steps."""
    gc.collect()
    torch.cuda.empty_cache()
    host = build(recipe, config)
    weights = torch.cuda.memory_allocated()
    optimizer = build_optimizer(host)
    batch = inputs_of(recipe, config, lengths)
    torch.cuda.reset_peak_memory_stats()
    for _ in track(range(STEPS), description=recipe.plan, transient=True):
        with host.autocast(), logits_at_answers(host.model) if recipe.answer_logits else nullcontext():
            loss = host.model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        # Gradients stay, as they do between the parts of an accumulated batch, which the prediction is made for.
        optimizer.zero_grad(set_to_none=False)
    return weights, torch.cuda.max_memory_allocated()


def build(recipe: Recipe, config: Any) -> Host:
    """The host with random weights, placed and in the precision of its plan."""
    from transformers import AutoModelForImageTextToText

    spec = vlm_spec(recipe.family)
    dtype = getattr(torch, recipe.dtype)
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(dtype)
        try:
            model: Any = AutoModelForImageTextToText.from_config(config)
        finally:
            torch.set_default_dtype(torch.float32)
    if recipe.plan == "nf4":
        # Through a folder: weights become 4-bit as they are read.
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            gc.collect()
            torch.cuda.empty_cache()
            model = AutoModelForImageTextToText.from_pretrained(
                Path(folder),
                quantization_config=quantization(recipe, spec, skeleton(config, spec)),
                device_map={"": "cuda:0"},
                dtype=dtype,
            )
    check_loaded(model, spec, recipe.plan)
    if recipe.plan == "split":
        dispatch(model, split_map(spec.places(model), "cuda:0", "cuda:0"))
    return prepare(model, None, recipe)


def inputs_of(recipe: Recipe, config: Any, lengths: Lengths) -> dict[str, torch.Tensor]:
    """A batch of random inputs, of the greatest length that the recipe allows."""
    batch, vision = recipe.micro_batch, config.vision_config
    ids = torch.randint(3, 1000, (batch, lengths.sequence))
    ids[:, 2 : 2 + lengths.image] = config.image_token_id
    # As many labels as are predicted.
    labels = ids.where(torch.arange(lengths.sequence) >= lengths.sequence - lengths.answer, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    spec = vlm_spec(recipe.family)
    assert spec.image_tokens is not None
    if spec.images is not None and spec.images.token_grids is not None:
        raise SystemExit(f"Random inputs are made for hosts with a fixed grid and for Qwen, not for {spec.title}.")
    if spec.image_tokens.kind == "merged_groups":
        merge = vision.spatial_merge_size
        rows = max(r for r in range(1, int((lengths.image) ** 0.5) + 1) if lengths.image % r == 0)
        inputs["image_grid_thw"] = torch.tensor([[1, rows * merge, lengths.image // rows * merge]] * batch)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        inputs["pixel_values"] = torch.randn(batch * lengths.tower, lengths.pixels * 3 // lengths.tower)
    else:
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        tiles = lengths.pixels // side**2
        packed = spec.image_tokens.kind == "packed_tiles"
        shape = (batch, tiles) if packed or spec.image_tokens.apart else (batch * tiles,)
        inputs["pixel_values"] = torch.randn(*shape, 3, side, side)
        if packed:
            fitting = [p for p in config.image_grid_pinpoints if p[0] // side * (p[1] // side) == tiles - 1]
            inputs["image_sizes"] = torch.tensor([max(fitting)] * batch)
    return {name: tensor.cuda() for name, tensor in inputs.items()}


if __name__ == "__main__":
    main()
