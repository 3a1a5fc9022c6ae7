"""Gemma-3-4B: SigLIP-400M at 896 pixels with a structural bias, a projector, and Gemma-3-4B in 4-bit.

With pan and scan: the page as one picture, and in up to 4 crops along its longer side. The checkpoint has it off.

Sources:    heads, vocabulary and image tokens: defaults of `Gemma3TextConfig` and `Gemma3Config`. Tower, picture of 896
            pixels, window of 1024: the technical report, arXiv 2503.19786. Not checked against the checkpoint: width
            2560, 34 layers and an MLP of 10,240, which give the 4.3 billion parameters that the checkpoint has, and the
            linear scaling of the rotation.
Command:    sfa train gemma3_4b                 the same on a CPU in minutes: sfa train gemma3_4b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train gemma3_4b
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 17.1 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host.
"""

from __future__ import annotations

from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(name="gemma3_4b", model="google/gemma-3-4b-it", family="gemma3", max_tiles=4)


def architecture() -> Gemma3Config:
    """The full-size host: 4,300,079,472 parameters, 416.9 million of them in the tower."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
        vision_use_head=False,
    )
    text = Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=2560,
        num_hidden_layers=34,
        intermediate_size=10_240,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131_072,
        sliding_window=1024,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    return Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=256)


def main() -> None:
    """`sfa train gemma3_4b` with the arguments of the command line."""
    train_as_command("gemma3_4b")


if __name__ == "__main__":
    main()
