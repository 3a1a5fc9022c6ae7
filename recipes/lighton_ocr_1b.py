"""LightOnOCR-1B: Pixtral's tower with a structural bias, 2 x 2 patches merged behind it, and Qwen3-0.6B in 4-bit.

Pages of any size, up to 1540 pixels along a side. The recipe shrinks them to a million pixels; for A4 as the
checkpoint reads it set max_pixels=1811040.

Sources:    all numbers are the defaults of `LightOnOcrConfig`, which says that they are this checkpoint's.
Command:    sfa train lighton_ocr_1b            the same on a CPU in minutes: sfa train lighton_ocr_1b --nano
            torchrun --nproc-per-node 2 -m sfa_adapters train lighton_ocr_1b
Hardware:   one or two A100-40GB.
Expected:   nothing was published for this host. `sfa plan` predicts 11.5 GB; a time was neither published nor measured.
Measured:   nothing on the full-size host. --nano, from nothing to the model card: 26 s of CPU time (docs/recipes.md).
"""

from __future__ import annotations

from transformers import LightOnOcrConfig

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.as_command import train_as_command

__all__ = ["architecture", "main", "recipe"]


def recipe() -> Recipe:
    """Tower, projector and structural bias train on ChartQA; the language model is frozen in NF4."""
    return Recipe(name="lighton_ocr_1b", model="lightonai/LightOnOCR-1B-1025", family="lighton_ocr")


def architecture() -> LightOnOcrConfig:
    """The full-size host: 1,005,647,872 parameters, 403.3 million of them in the tower."""
    return LightOnOcrConfig()  # the defaults of the class are this checkpoint's


def main() -> None:
    """`sfa train lighton_ocr_1b` with the arguments of the command line."""
    train_as_command("lighton_ocr_1b")


if __name__ == "__main__":
    main()
