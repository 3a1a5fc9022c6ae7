"""PaddleOCR-VL (0.9B; versions 1.0 to 1.6): a tower of 27 layers with a structural bias, and ERNIE-4.5-0.3B.

Command:    sfa train paddleocr_vl      the same on a CPU in minutes: sfa train paddleocr_vl --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train paddleocr_vl          two cards, one copy each
Hardware:   one card of 24 GB.
Expected:   nothing was published for this host with a structural bias. `sfa plan` predicts 10.4 GB.
Measured:   nothing on the full-size host. --nano: docs/recipes.md.
Sources:    the defaults of transformers' PaddleOCRVLConfig, which name this checkpoint; they agree with the config.json
            of version 1.5 as a public repository quotes it. That one says that input and output embeddings are two,
            the defaults that they are one: the count here follows the checkpoint. Version 1.6 was not looked at.
"""

from __future__ import annotations

from transformers import PaddleOCRVLConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in bfloat16."""
    return Recipe(name="paddleocr_vl", model="PaddlePaddle/PaddleOCR-VL-1.5", family="paddleocr_vl", plan="bf16")


def architecture() -> PaddleOCRVLConfig:
    """The full-size host."""
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    text = {
        "vocab_size": 103_424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
    }
    return PaddleOCRVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def main() -> None:
    """`sfa train paddleocr_vl` with the arguments of the command line."""
    train_as_command("paddleocr_vl")


if __name__ == "__main__":
    main()
