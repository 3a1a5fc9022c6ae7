"""Qwen2.5-VL-7B: its own tower of 32 layers with a structural bias, and Qwen2.5-7B in 4-bit.

The tower takes images of any size. In 28 of its layers tokens attend within windows of 112 pixels, in 4 to all.

Command:    sfa train qwen2_5_vl_7b             the same on a CPU in minutes: sfa train qwen2_5_vl_7b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train qwen2_5_vl_7b         two cards, one copy each
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 23.0 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host. --nano, from nothing to the model card: 37 s of CPU time (docs/recipes.md).
"""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, merger and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(name="qwen2_5_vl_7b", model="Qwen/Qwen2.5-VL-7B-Instruct", family="qwen2_5_vl")


def architecture() -> Qwen2_5_VLConfig:
    """The full-size host: 8.29 billion parameters, 676.6 million of them in the tower and its merger."""
    vision = {
        "depth": 32,
        "hidden_size": 1280,  # the default of the class is another model's
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    text = {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
    }
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def main() -> None:
    """`sfa train qwen2_5_vl_7b` with the arguments of the command line."""
    train_as_command("qwen2_5_vl_7b")


if __name__ == "__main__":
    main()
