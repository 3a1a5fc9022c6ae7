"""SmolVLM2-2.2B: SigLIP-400M with a structural bias, pixel shuffle, one linear layer, and SmolLM2-1.7B in 4-bit.

Sources:    tower (SigLIP-SO400M/14-384), language model (SmolLM2-1.7B) and 81 image tokens for each tile: the paper,
            arXiv 2504.05299. Vocabulary and image token: as in the 500M checkpoint. Not checked against the file of the
            checkpoint: the base of the rotation, and that the head is not tied, which its 2.2 billion parameters say.
Command:    sfa train smolvlm2_2_2b             the same on a CPU in minutes: sfa train smolvlm2_2_2b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train smolvlm2_2_2b
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 13.7 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host.
"""

from __future__ import annotations

from transformers import LlamaConfig, SmolVLMConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(
        name="smolvlm2_2_2b",
        model="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        family="smolvlm",
        max_tiles=16,  # as the checkpoint's own processor: four tiles along the longer side
    )


def architecture() -> SmolVLMConfig:
    """The full-size host: 2,246,784,880 parameters, 413.0 million of them in the tower."""
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    text = LlamaConfig(
        vocab_size=49_280,
        hidden_size=2048,
        num_hidden_layers=24,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 130_000.0},
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return SmolVLMConfig(
        vision_config=vision, text_config=text, scale_factor=3, image_token_id=49_190, tie_word_embeddings=False
    )


def main() -> None:
    """`sfa train smolvlm2_2_2b` with the arguments of the command line."""
    train_as_command("smolvlm2_2_2b")


if __name__ == "__main__":
    main()
