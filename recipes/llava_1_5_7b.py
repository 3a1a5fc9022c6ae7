"""LLaVA-1.5-7B: CLIP ViT-L/14-336 with a structural bias, a projector, and Vicuna-7B in 4-bit.

The host reads the layer before the last of its tower (`vision_feature_layer=-2`): 23 of 24 layers get a bias and train.

Command:    sfa train llava_1_5_7b              the same on a CPU in minutes: sfa train llava_1_5_7b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train llava_1_5_7b          two cards, one copy each
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 12.2 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host. --nano, from nothing to the model card: 33 s of CPU time (docs/recipes.md).
"""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(name="llava_1_5_7b", model="llava-hf/llava-1.5-7b-hf", family="llava")


def architecture() -> LlavaConfig:
    """The full-size host: 7.06 billion parameters, 303.5 million of them in the tower."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32_064,
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=11_008,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32_000, vision_feature_layer=-2)


def main() -> None:
    """`sfa train llava_1_5_7b` with the arguments of the command line."""
    train_as_command("llava_1_5_7b")


if __name__ == "__main__":
    main()
