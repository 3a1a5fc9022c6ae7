"""Qwen3-VL in three sizes: its tower with a structural bias in every layer, and Qwen3.

The tower takes images of any size. Features of three of its layers, beside the last, go into the first layers of the
language model (deepstack), so the bias reaches the language model early.

Command:    sfa train qwen3_vl_2b       also qwen3_vl_4b, qwen3_vl_8b; on a CPU in minutes: sfa train qwen3_vl_2b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train qwen3_vl_8b           two cards, one copy each
Hardware:   one or two cards; which size fits which card is in the table of docs/recipes.md.
Expected:   nothing was published for these hosts with a structural bias.
            `sfa plan` predicts 12.4 GB on one card for 2B (language model in bfloat16), and in NF4 11.9 GB for 4B
            and 18.5 GB for 8B.
Measured:   nothing on the full-size hosts. --nano: docs/recipes.md.
Sources:    4B: its config.json, which several public repositories quote in full. 2B: text from a quoted config.json;
            layers, width and heads of its tower from two implementations that name it, the rest is that of the 4B. 8B:
            the tower and the language model from quoted parts of its config.json; its MLP (12,288) is that of Qwen3-8B,
            as one quotation has the default of transformers instead. Parameters: 2.128, 4.438 and 8.767 billion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import Qwen3VLConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["SIZES", "Size", "architecture", "main", "recipe"]

Size = Literal["2b", "4b", "8b"]
_SMALL_TOWER: Mapping[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}
_LARGE_TOWER: Mapping[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}
# Tower; width, MLP, layers and query heads of the language model; whether input and output embeddings are one.
SIZES: Mapping[Size, tuple[Mapping[str, Any], tuple[int, int, int, int], bool]] = {
    "2b": (_SMALL_TOWER, (2048, 6144, 28, 16), True),
    "4b": (_SMALL_TOWER, (2560, 9728, 36, 32), True),
    "8b": (_LARGE_TOWER, (4096, 12_288, 36, 32), False),
}


def recipe(size: Size) -> Recipe:
    """Tower, mergers and structural bias train on ChartQA; the language model is frozen, in NF4 from 4B on.

    Args:
        size: Of the host.
    """
    model = f"Qwen/Qwen3-VL-{size.upper()}-Instruct"
    return Recipe(name=f"qwen3_vl_{size}", model=model, family="qwen3_vl", plan="bf16" if size == "2b" else "nf4")


def architecture(size: Size) -> Qwen3VLConfig:
    """The full-size host.

    Args:
        size: Of the host.
    """
    tower, (width, inner, layers, heads), tied = SIZES[size]
    text = {
        "vocab_size": 151_936,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": tied,
    }
    return Qwen3VLConfig(vision_config={**tower, "out_hidden_size": width}, text_config=text, tie_word_embeddings=tied)


def main() -> None:
    """`sfa train qwen3_vl_2b` with the arguments of the command line."""
    train_as_command("qwen3_vl_2b")


if __name__ == "__main__":
    main()
