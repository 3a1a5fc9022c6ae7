"""Qwen3.5 in three small sizes: its tower with a structural bias, and a language model with linear attention.

Of four layers of the language model, three are linear attention (Gated DeltaNet) and one attends to all tokens.

Command:    sfa train qwen3_5_0_8b      also qwen3_5_2b, qwen3_5_4b; on a CPU in minutes: sfa train qwen3_5_0_8b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train qwen3_5_4b            two cards, one copy each
Hardware:   one or two cards; which size fits which card is in the table of docs/recipes.md.
Expected:   nothing was published for these hosts with a structural bias. `sfa plan` predicts 7.5 GB on one card for
            0.8B and 13.8 GB for 2B (language model in bfloat16), and 13.3 GB for 4B in NF4; with the kernels of
            flash-linear-attention it is less.
Measured:   nothing on the full-size hosts. --nano: docs/recipes.md.
Sources:    0.8B and 4B: their config.json, as public repositories quote it. 2B: widths, layers and heads from a quoted
            excerpt; its linear heads are those of 0.8B, and MLP and heads of its tower those of 4B, which was not
            checked. They then have 0.853, 2.213 and 4.539 billion parameters; a layer that predicts a second token is
            left out, as transformers does. Published are 0.8, 2 and 4 billion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from transformers import Qwen3_5Config

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["SIZES", "Size", "architecture", "main", "recipe"]

Size = Literal["0_8b", "2b", "4b"]
# Layers, width, MLP and heads of the tower; width, MLP, layers, query heads, heads of keys, and heads of the values of
# linear attention of the language model.
SIZES: Mapping[Size, tuple[tuple[int, int, int, int], tuple[int, int, int, int, int, int]]] = {
    "0_8b": ((12, 768, 3072, 12), (1024, 3584, 24, 8, 2, 16)),
    "2b": ((24, 1024, 4096, 16), (2048, 6144, 24, 8, 2, 16)),
    "4b": ((24, 1024, 4096, 16), (2560, 9216, 32, 16, 4, 32)),
}


def recipe(size: Size) -> Recipe:
    """Tower, merger and structural bias train on ChartQA; the language model is frozen, in NF4 for 4B.

    Args:
        size: Of the host.
    """
    model = f"Qwen/Qwen3.5-{size.upper().replace('_', '.')}"
    return Recipe(name=f"qwen3_5_{size}", model=model, family="qwen3_5", plan="nf4" if size == "4b" else "bf16")


def architecture(size: Size) -> Qwen3_5Config:
    """The full-size host.

    Args:
        size: Of the host.
    """
    (depth, across, mlp, tower_heads), (width, inner, layers, heads, keys, values) = SIZES[size]
    vision = {
        "depth": depth,
        "hidden_size": across,
        "intermediate_size": mlp,
        "num_heads": tower_heads,
        "out_hidden_size": width,
    }
    text = {
        "vocab_size": 248_320,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": values,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
        "tie_word_embeddings": True,
    }
    return Qwen3_5Config(vision_config=vision, text_config=text, tie_word_embeddings=True)


def main() -> None:
    """`sfa train qwen3_5_0_8b` with the arguments of the command line."""
    train_as_command("qwen3_5_0_8b")


if __name__ == "__main__":
    main()
