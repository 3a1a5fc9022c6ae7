"""A nano host whose text model has 16 attention heads in each of its 4 layers, so that 5% of the heads can be pruned.

    python -m sfa_adapters.recipes.nano.many_heads      (trains it from the nano host; one CPU core: half an hour)

`llava_onevision` has 4 heads in a layer: no head plan can remove 5% of those, and `uniform` none below 12.5%. Here
every head of 32 channels became four of 16, which start from halves of its queries and keys and halves of its values,
and the text model was trained on; tower and projector are those of the nano host, untouched.

The weights that come with the package were made in two runs: the first 1,000 steps had a schedule of 3,000, the other
600 the one below, so the command makes weights like them, not the same file. Of 300 validation questions it answers
57.3% [52.0, 62.7]; the nano host it came from, 56.0% [50.3, 61.7].
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from sfa_adapters.recipes.nano.models import NanoHost, load_nano
from sfa_adapters.recipes.nano.weights import put_weights, read_weights

__all__ = ["build_many_heads", "load_many_heads", "split_heads"]

HEADS, SIZE = 16, 16
WEIGHTS = Path(__file__).with_name("nano_many_heads.safetensors")
SHA256 = "86c3e53fb7bd65f1ea3b248b37a808fff957ec47a9c0e606b6852091103a56b4"


def split_heads(state: dict[str, Tensor], old_heads: int, old_size: int) -> dict[str, Tensor]:
    """Splits each head of a text model into four heads of half the size.

    Each of the four takes every other rotary pair of the queries and keys, and one half of the values. New head
    `(pairs * 2 + values) * old_heads + head` comes from head `head`.

    Args:
        state: Names and tensors of a nano host.
        old_heads: Heads of a layer.
        old_size: Channels of a head, even.

    Returns:
        The same names; queries, keys, values and output projections have twice as many channels.
    """
    half = old_size // 2
    pairs = [torch.cat((torch.arange(a, half, 2), torch.arange(a, half, 2) + half)) for a in (0, 1)]
    values = [torch.arange(b * half, (b + 1) * half) for b in (0, 1)]
    weights = {}
    for name, tensor in state.items():
        kind = name.split(".")[-2]
        if "language_model" not in name or kind not in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[name] = tensor
            continue
        if kind == "o_proj":  # columns; two heads share each half of the values, so each gives half of it
            heads = tensor.unflatten(1, (old_heads, old_size))
            weights[name] = torch.cat([heads[:, :, values[b]].flatten(1) / 2 for _ in (0, 1) for b in (0, 1)], 1)
            continue
        heads = tensor.unflatten(0, (old_heads, old_size))
        chosen = pairs if kind in ("q_proj", "k_proj") else values
        parts = [chosen[a if kind != "v_proj" else b] for a in (0, 1) for b in (0, 1)]
        # Half of the products divided by sqrt(16), not sqrt(32): queries grow by sqrt(2) to keep the logits' size.
        scale = 2**0.5 if kind == "q_proj" else 1.0
        weights[name] = torch.cat([heads[:, part].flatten(0, 1) * scale for part in parts])
    return weights


def build_many_heads() -> NanoHost:
    """The host before it is trained, with weights from the nano host."""
    nano = load_nano()
    config: Any = nano.model.config.__class__.from_dict(nano.model.config.to_dict())
    text = config.text_config
    old_heads, old_size = text.num_attention_heads, text.head_dim
    text.num_attention_heads = text.num_key_value_heads = HEADS
    text.head_dim = SIZE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(config)
    weights = split_heads({n: p.detach() for n, p in nano.model.named_parameters()}, old_heads, old_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.generation_config = nano.model.generation_config
    return NanoHost(nano.name, model.eval(), nano.tokenizer, nano.image_tokens)


def load_many_heads(path: Path | None = None) -> NanoHost:
    """Loads the trained host.

    Args:
        path: Weights of the text model; by default those of the package, whose hash is checked.

    Raises:
        WeightsError: The weights are missing, damaged, or do not fit.
    """
    host = build_many_heads()
    core: Any = host.model.model
    command = "python -m sfa_adapters.recipes.nano.many_heads"
    stored = read_weights(WEIGHTS, command, SHA256) if path is None else read_weights(path, command)
    put_weights(core.language_model, stored, path or WEIGHTS)
    return host


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    from rich.console import Console

    from sfa_adapters.recipes.nano.pretrain import STAGES, Stage, Trainer, ship

    parser = argparse.ArgumentParser(description="Retrain the nano host with 16 heads in a layer.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where rendered charts are kept")
    parser.add_argument("--run", type=Path, default=Path("runs/many-heads"), help="where checkpoints are kept")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--every", type=int, default=200, help="steps between two checkpoints")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    host = build_many_heads()
    core: Any = host.model.model
    core.vision_tower.requires_grad_(False)
    core.multi_modal_projector.requires_grad_(False)
    answer = STAGES[-1]
    stage = Stage("many heads", options.steps, answer.batch, 0.0, answer.shards, answer.questions, answer.rate)
    trainer = Trainer(host, options.data, options.run)
    trainer.resume()
    trainer.train(options.every, [stage])
    Console().print(f"{options.out}: sha256 {ship(core.language_model, options.out)}")


if __name__ == "__main__":
    main()
