"""Activation memory: the bytes that a training step keeps for its backward pass, counted tensor by tensor.

A checkpointed layer keeps its input only; the rest is recomputed while its own gradient is computed. Tests compare the
counts with what autograd saves (`torch.autograd.graph.saved_tensors_hooks`) on small hosts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.shapes import Lengths, memory_rules, text_widths, vision_widths
from sfa_adapters.vlm.sizes import FLOAT, Precision, decoder_layer

__all__ = ["Activations", "activations_of"]

# Passes over the logits that are in float32 at once: log-softmax, its gradient, and what comes in between.
LOGIT_COPIES = 3


@dataclass(frozen=True)
class Activations:
    """Bytes of one half of a host (tower and projector, or language model) for one batch.

    Attributes:
        inputs: Inputs of all layers.
        outer: What is kept outside the layers: embeddings, projector, norms, loss.
        layer: What one layer keeps beside its input, in the mean where layers differ.
        layers: How many layers there are.
        transient: What the backward pass of one layer needs beside that, at its peak.
        logits: What the loss makes of the logits, at its peak; 0 for the tower.
        heaviest: What the layer keeps that keeps most; 0 where all keep the same.
    """

    inputs: int
    outer: int
    layer: int
    layers: int
    transient: int
    logits: int = 0
    heaviest: int = 0

    def kept(self, checkpointing: bool) -> int:
        """Bytes that autograd holds at the end of the forward pass."""
        return self.inputs + self.outer + (0 if checkpointing else self.layer * self.layers)

    def peak(self, checkpointing: bool, casts: int = 0) -> int:
        """Bytes at the peak, which is after the loss, in it, or in the backward pass of a layer.

        Args:
            checkpointing: Whether layers are checkpointed.
            casts: Copies of weights that autocast makes. Checkpointed layers free theirs when the forward ends.
        """
        kept = self.kept(checkpointing)
        if not checkpointing:
            return kept + casts + max(self.logits, self.transient)
        return kept + max(self.logits, self.logits * 3 // 4 + casts, max(self.layer, self.heaviest) + self.transient)


def precision(recipe: Recipe, trains: bool) -> Precision:
    """Precision of a part of the host, as `prepare` sets it."""
    compute = FLOAT if recipe.dtype == "float32" else 2
    mixed = trains and compute != FLOAT
    return Precision(FLOAT if trains else compute, compute, trains, mixed)


def activations_of(recipe: Recipe, config: Any, lengths: Lengths, batch: int) -> tuple[Activations, Activations]:
    """Activations of tower with projector, and of the language model.

    Args:
        recipe: What trains, and in which precision.
        config: The host's configuration.
        lengths: Tokens of one question.
        batch: Questions per forward.
    """
    return _vision(recipe, config, lengths, batch), _text(recipe, config, lengths, batch)


# -- tower and projector ----------------------------------------------------------------------------------------------


def _vision(recipe: Recipe, config: Any, lengths: Lengths, batch: int) -> Activations:
    sizes, rules = vision_widths(recipe, config), memory_rules(recipe)
    part, projector = precision(recipe, not recipe.freeze_vision), precision(recipe, not recipe.freeze_projector)
    part = replace(part, stream=part.compute) if rules.narrow_stream else part
    tokens, images = batch * lengths.tower, batch * lengths.image
    graph = part.trains or recipe.sfa
    layer, layers = rules.layer(sizes, part, config, recipe.sfa), sizes.layers
    outer = images * rules.projector(projector, part, config) if graph or projector.trains else 0
    if part.trains:
        outer += part.compute * 3 * batch * lengths.pixels  # what the patch embedding saw
    if rules.outer is not None and graph:
        outer += rules.outer(recipe, config, lengths, part, batch)
    stream = part.stream * sizes.width * tokens
    outer += stream if rules.output_read and graph and not part.mixed else 0
    outer += stream if rules.norm_in_front and part.trains else 0
    if not graph:
        return Activations(0, outer, 0, layers, layer * tokens)
    transient = (2 * part.compute * sizes.inner + 2 * part.stream * sizes.width) * tokens
    return Activations(stream * layers, outer, layer * tokens, layers, transient)


# -- language model ---------------------------------------------------------------------------------------------------


def _text(recipe: Recipe, config: Any, lengths: Lengths, batch: int) -> Activations:
    sizes, rules = text_widths(config), memory_rules(recipe)
    part = precision(recipe, not recipe.freeze_llm)
    tokens = batch * lengths.sequence
    scored = batch * lengths.answer if recipe.answer_logits else tokens  # tokens with logits
    vocabulary = config.text_config.vocab_size
    masked = lengths.sequence if batch > 1 or rules.masks else 0
    outer = part.stream * sizes.width + part.rms_norm(sizes.width) + masked * max(1, rules.masks)
    outer += rules.decoder_outer(config, part) if rules.decoder_outer else 0
    head = part.product_inputs(sizes.width, 1) + FLOAT * vocabulary
    head += rules.decoder_logits(config, part) if rules.decoder_logits else 0
    logits = (LOGIT_COPIES - 1) * FLOAT * vocabulary * scored
    each = (rules.decoder or decoder_layer)(recipe, config, sizes, part, masked)
    each = each if isinstance(each, tuple) else (each,)
    layer = sum(each) // len(each)
    transient = 3 * part.compute * sizes.inner + 2 * part.stream * sizes.width
    return Activations(
        part.stream * sizes.width * tokens * sizes.layers,
        outer * tokens + head * scored,
        layer * tokens,
        sizes.layers,
        transient * tokens,
        logits,
        max(each) * tokens,
    )
