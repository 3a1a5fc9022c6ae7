"""LLaVA-OneVision-7B: SigLIP-400M with a structural bias, a projector, and Qwen2-7B in 4-bit.

Command:    sfa train llava_onevision_7b        the same on a CPU in minutes: sfa train llava_onevision_7b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train llava_onevision_7b    two cards, one copy each
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 19.9 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host. --nano, from nothing to the model card: 54 s of CPU time (docs/recipes.md).
"""

from __future__ import annotations

from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(
        name="llava_onevision_7b",
        model="llava-hf/llava-onevision-qwen2-7b-ov-hf",
        family="llava_onevision",
        max_tiles=9,  # the host was made with anyres_max_9
    )


def architecture() -> LlavaOnevisionConfig:
    """The full-size host: 8.03 billion parameters, 397.7 million of them in the tower."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        num_hidden_layers=28,
        intermediate_size=18_944,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
    )
    return LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def main() -> None:
    """`sfa train llava_onevision_7b` with the arguments of the command line."""
    train_as_command("llava_onevision_7b")


if __name__ == "__main__":
    main()
