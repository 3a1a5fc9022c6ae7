"""Gemma-4-E2B: its own tower of 16 layers with a structural bias, a projector, and a language model in 4-bit.

The recipe's million pixels are 280 image tokens, as in the checkpoint; max_pixels=2580480 gives 1120, the most. The
tower for audio stays frozen. Embeddings, of which every layer has its own, do not go into 4-bit.

Sources:    the configuration of the checkpoint as the tests of a public runtime have it; the towers are also the
            defaults of `Gemma4VisionConfig` and `Gemma4AudioConfig`. Published are 5.1 billion parameters.
Command:    sfa train gemma4_e2b                the same on a CPU in minutes: sfa train gemma4_e2b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train gemma4_e2b
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 12.3 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host. --nano, from nothing to the model card: 89 s of CPU time (docs/recipes.md).
"""

from __future__ import annotations

from transformers import Gemma4AudioConfig, Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(name="gemma4_e2b", model="google/gemma-4-E2B-it", family="gemma4")


def architecture() -> Gemma4Config:
    """The full-size host: 5,104,297,504 parameters, 167.4 million of them in the tower."""
    text = Gemma4TextConfig(
        vocab_size=262_144,
        hidden_size=1536,
        num_hidden_layers=35,
        intermediate_size=6144,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        global_head_dim=512,  # pyright: ignore[reportCallIssue] - a keyword of its own handling
        max_position_embeddings=131_072,
        sliding_window=512,
        layer_types=[*["sliding_attention"] * 4, "full_attention"] * 7,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262_144,
        final_logit_softcapping=30.0,
    )
    return Gemma4Config(
        vision_config=Gemma4VisionConfig(use_clipped_linears=True),
        text_config=text,
        audio_config=Gemma4AudioConfig(),
    )


def main() -> None:
    """`sfa train gemma4_e2b` with the arguments of the command line."""
    train_as_command("gemma4_e2b")


if __name__ == "__main__":
    main()
