"""InternVL3.5-8B: InternViT-300M with a structural bias, a projector, and Qwen3-8B in 4-bit.

Command:    sfa train internvl3_5_8b            the same on a CPU in minutes: sfa train internvl3_5_8b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train internvl3_5_8b        two cards, one copy each
Hardware:   one or two A100-40GB.
Expected:   published for the language model in NF4, one question per forward, tiles not reported: 8.3 GB on one card
            and 12 hours. Here what trains is float32, and images have up to 12 tiles: `sfa plan` predicts 17.4 GB.
Measured:   nothing on the full-size host. --nano, from nothing to the model card: 32 s of CPU time (docs/recipes.md).
"""

from __future__ import annotations

from transformers import InternVLConfig, InternVLVisionConfig, Qwen3Config

from sfa_adapters.choices import TERMS
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "published", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(name="internvl3_5_8b", model="OpenGVLab/InternVL3_5-8B-HF", family="internvl")


def published() -> Recipe:
    """The published run: 2e-5 for everything, structural scalars too, and 28,299 questions 3 times in 2,652 steps.

    Its number of tiles was not reported; its baseline was evaluated with one.
    """
    return recipe().replace(
        name="internvl3_5_8b_published",
        sfa_terms=TERMS,
        init="normal",
        lr=2e-5,
        sfa_lr=2e-5,
        batch_size=32,
        epochs=3,
        warmup_steps=100,
        max_tiles=1,
    )


def architecture() -> InternVLConfig:
    """The full-size host: 8,528,318,464 parameters, and 768 more with a bias in every layer of the tower."""
    vision = InternVLVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=448,
        patch_size=14,
        attention_bias=True,
        use_mask_token=False,
    )
    text = Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        num_hidden_layers=36,
        intermediate_size=12_288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
    )
    return InternVLConfig(vision_config=vision, text_config=text, image_token_id=151_671, tie_word_embeddings=False)


def main() -> None:
    """`sfa train internvl3_5_8b` with the arguments of the command line."""
    train_as_command("internvl3_5_8b")


if __name__ == "__main__":
    main()
