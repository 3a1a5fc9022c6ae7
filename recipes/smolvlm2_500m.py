"""SmolVLM2-500M: SigLIP-B/16-512 with a structural bias, pixel shuffle, one linear layer, SmolLM2-360M in 4-bit.

Sources:    all numbers as a public exporter checks them in the configuration of the checkpoint. Not checked: that the
            head is not tied, which the published half a billion parameters say.
Command:    sfa train smolvlm2_500m             the same on a CPU in minutes: sfa train smolvlm2_500m --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train smolvlm2_500m
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 5.0 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host. --nano, from nothing to the model card: 32 s of CPU time (docs/recipes.md).
"""

from __future__ import annotations

from transformers import LlamaConfig, SmolVLMConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(
        name="smolvlm2_500m",
        model="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        family="smolvlm",
        max_tiles=16,  # as the checkpoint's own processor: four tiles along the longer side
    )


def architecture() -> SmolVLMConfig:
    """The full-size host: 507,482,304 parameters, 86.4 million of them in the tower."""
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    text = LlamaConfig(
        vocab_size=49_280,
        hidden_size=960,
        num_hidden_layers=32,
        intermediate_size=2560,
        num_attention_heads=15,
        num_key_value_heads=5,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=4, image_token_id=49_190, tie_word_embeddings=False
    )


def main() -> None:
    """`sfa train smolvlm2_500m` with the arguments of the command line."""
    train_as_command("smolvlm2_500m")


if __name__ == "__main__":
    main()
