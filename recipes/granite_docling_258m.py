"""Granite-Docling-258M: SigLIP2-B/16-512 with a structural bias, pixel shuffle, one linear layer, Granite in 4-bit.

Its class is Idefics3. The later Granite-for-Docling is of another one, `granite_docling`, which has no record.

Sources:    tower, projector and size of the language model: the model card. Its other numbers are those of the
            language model of SmolDocling with Granite's vocabulary, which gives the published 258 million parameters.
            Not checked against the checkpoint: these, the image token and the base of the rotation.
Command:    sfa train granite_docling_258m      the same on a CPU in minutes: sfa train granite_docling_258m --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train granite_docling_258m
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 4.7 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host.
"""

from __future__ import annotations

from transformers import Idefics3Config, LlamaConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(
        name="granite_docling_258m",
        model="ibm-granite/granite-docling-258M",
        family="idefics3",
        max_tiles=16,  # four tiles along the longer side
    )


def architecture() -> Idefics3Config:
    """The full-size host: 257,517,120 parameters, 86.4 million of them in the tower."""
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    text = LlamaConfig(
        vocab_size=100_352,
        hidden_size=576,
        num_hidden_layers=30,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        pad_token_id=100_257,
        tie_word_embeddings=True,
    )
    return Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=4, image_token_id=100_270, tie_word_embeddings=True
    )


def main() -> None:
    """`sfa train granite_docling_258m` with the arguments of the command line."""
    train_as_command("granite_docling_258m")


if __name__ == "__main__":
    main()
