"""GLM-OCR (0.9B): a small reader of pages, its tower of 24 layers with a structural bias, and a language model of 16.

Command:    sfa train glm_ocr           the same on a CPU in minutes: sfa train glm_ocr --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train glm_ocr               two cards, one copy each
Hardware:   one card of 24 GB.
Expected:   nothing was published for this host with a structural bias. `sfa plan` predicts 10.7 GB.
Measured:   nothing on the full-size host. --nano: docs/recipes.md.
Sources:    its config.json and preprocessor_config.json, as public repositories quote them in full. The host then has
            1.107 billion parameters; 0.9B in its description leaves out input and output embeddings. The checkpoint
            has one more layer that predicts a second token, which transformers leaves out.
"""

from __future__ import annotations

from transformers import GlmOcrConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, merger and structural bias train on ChartQA; the language model is frozen in bfloat16."""
    return Recipe(name="glm_ocr", model="zai-org/GLM-OCR", family="glm_ocr", plan="bf16")


def architecture() -> GlmOcrConfig:
    """The full-size host."""
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 1536,
        "patch_size": 14,
        "image_size": 336,
    }
    text = {
        "vocab_size": 59_392,
        "hidden_size": 1536,  # the default of the class is another one
        "intermediate_size": 4608,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [16, 24, 24],
            "partial_rotary_factor": 1.0,
        },
        "eos_token_id": [59_246, 59_253],
        "pad_token_id": 59_246,
    }
    return GlmOcrConfig(vision_config=vision, text_config=text)


def main() -> None:
    """`sfa train glm_ocr` with the arguments of the command line."""
    train_as_command("glm_ocr")


if __name__ == "__main__":
    main()
