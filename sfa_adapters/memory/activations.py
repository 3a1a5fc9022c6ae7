"""What a training step keeps for its backward pass, in bytes, counted tensor by tensor as the layers of the hosts do.

A layer that is checkpointed keeps its input; the rest of it is there again while its own gradient is computed. Tests
compare the counts with what autograd really saved (`torch.autograd.graph.saved_tensors_hooks`) on small hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.shapes import Lengths, Widths, text_widths, vision_widths

__all__ = ["Activations", "activations_of"]

FLOAT = 4
# Passes over the logits that are in float32 at once: log-softmax, its gradient, and what comes in between.
LOGIT_COPIES = 3


@dataclass(frozen=True)
class Activations:
    """Bytes of one half of a host (tower and projector, or language model) for one batch.

    Attributes:
        inputs: Inputs of all layers.
        outer: What is kept outside the layers: embeddings, projector, norms, loss.
        layer: What one layer keeps beside its input.
        layers: How many layers there are.
        transient: What a layer's backward pass needs beside that, at once.
        logits: Of the loss, at its largest; 0 for the tower.
    """

    inputs: int
    outer: int
    layer: int
    layers: int
    transient: int
    logits: int = 0

    def kept(self, checkpointing: bool) -> int:
        """What autograd holds at the end of the forward pass."""
        return self.inputs + self.outer + (0 if checkpointing else self.layer * self.layers)

    def peak(self, checkpointing: bool, casts: int = 0) -> int:
        """The most there is at once: behind the loss, in it, or in the backward pass of a layer.

        Args:
            checkpointing: Whether layers are checkpointed.
            casts: Copies of weights that autocast makes. Checkpointed layers give theirs back when the forward ends.
        """
        kept = self.kept(checkpointing)
        if not checkpointing:
            return kept + casts + max(self.logits, self.transient)
        return kept + max(self.logits, self.logits * 3 // 4 + casts, self.layer + self.transient)


@dataclass(frozen=True)
class Precision:
    """Bytes per number in one part of a host.

    Attributes:
        stream: Of the residual stream.
        compute: Of what linear layers give.
        trains: Whether weights of the part train.
        mixed: Whether its weights are float32 and are cast for every product (autocast).
    """

    stream: int
    compute: int
    trains: bool
    mixed: bool

    def product_inputs(self, width: int, products: int) -> int:
        """What linear layers keep of an input that `products` of them share; autocast casts it for each."""
        if not self.trains:
            return 0
        return self.compute * width * (products if self.mixed else 1)

    def rms_norm(self, width: int, groups: int = 1) -> int:
        """What an RMS norm keeps beside its input: a float32 copy, the root, and the result for a trained weight."""
        copy = 0 if self.stream == FLOAT else FLOAT * width
        return copy + FLOAT * groups + (self.stream * width if self.trains else 0)


def precision(recipe: Recipe, trains: bool) -> Precision:
    """Precision of a part; see `prepare`."""
    compute = FLOAT if recipe.dtype == "float32" else 2
    mixed = trains and compute != FLOAT
    return Precision(FLOAT if trains else compute, compute, trains, mixed)


def activations_of(recipe: Recipe, config: Any, lengths: Lengths, batch: int) -> tuple[Activations, Activations]:
    """Activations of tower with projector, and of the language model.

    Args:
        recipe: What trains, and in which precision.
        config: The host's configuration.
        lengths: Tokens of one question.
        batch: Questions at once.
    """
    return _vision(recipe, config, lengths, batch), _text(recipe, config, lengths, batch)


# -- tower and projector ----------------------------------------------------------------------------------------------


def _vision(recipe: Recipe, config: Any, lengths: Lengths, batch: int) -> Activations:
    sizes = vision_widths(recipe, config)
    part = precision(recipe, not recipe.freeze_vision)
    tokens, images = batch * lengths.tower, batch * lengths.image
    graph = part.trains or recipe.sfa
    qwen = recipe.family == "qwen2_5_vl"
    layer = _qwen_layer(recipe, config, sizes, part) if qwen else _vit_layer(recipe, sizes, part)
    layers = sizes.layers - (recipe.family == "llava")  # the last one is never read
    outer = _projector(recipe, config, part, images) if graph or not recipe.freeze_projector else 0
    if part.trains:
        outer += part.compute * 3 * batch * lengths.pixels  # what the patch embedding saw
    if recipe.family.startswith("llava"):
        stream = part.stream * sizes.width * tokens
        outer += stream if graph and not part.mixed else 0  # the projector reads the last layer's output itself
        outer += stream if part.trains and recipe.family == "llava" else 0  # a norm in front of the layers
    if not graph:
        return Activations(0, outer, 0, layers, layer * tokens)
    transient = (2 * part.compute * sizes.inner + 2 * part.stream * sizes.width) * tokens
    return Activations(part.stream * sizes.width * tokens * layers, outer, layer * tokens, layers, transient)


def _vit_layer(recipe: Recipe, sizes: Widths, part: Precision) -> int:
    """InternViT, SigLIP and CLIP: bytes per token beside the input."""
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = 4 * FLOAT + part.stream * width  # means and roots of two layer norms, and what the second one saw
    kept += 4 * sizes.heads * sizes.folded * compute + FLOAT * sizes.heads  # q, k, v, the output, log-sum-exp
    if sizes.folded * sizes.heads > sizes.attended:  # the extra channels are cut off again
        kept += compute * sizes.attended if part.trains else 0
    kept += part.product_inputs(width, 3) + part.product_inputs(width, 1)
    kept += compute * inner * (1 + part.trains + (recipe.family == "llava"))  # quick GELU keeps a sigmoid
    if recipe.family == "internvl" and part.trains:
        kept += 2 * compute * width  # layer scale
    return kept


def _qwen_layer(recipe: Recipe, config: Any, sizes: Widths, part: Precision) -> int:
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = 2 * part.rms_norm(width) + part.stream * width
    kept += 3 * compute * width  # v is a view of the fused product of q, k and v
    kept += (2 + 1 + part.trains) * compute * width + FLOAT * sizes.heads  # q and k turned, output, and it joined
    kept += part.product_inputs(width, 1) + part.product_inputs(width, 2) + (3 + part.trains) * compute * inner
    if recipe.sfa:
        window = (config.vision_config.window_size // config.vision_config.patch_size) ** 2
        kept += 2 * compute * sizes.heads * window  # short windows take phi as a matrix
    return kept


def _projector(recipe: Recipe, config: Any, tower: Precision, images: int) -> int:
    part = precision(recipe, not recipe.freeze_projector)
    width, wide = config.vision_config.hidden_size, config.text_config.hidden_size
    if recipe.family == "internvl":
        gathered = round(width / config.downsample_ratio**2)
        kept = tower.stream * gathered + 2 * FLOAT + part.product_inputs(gathered, 1)
        return images * (kept + part.compute * wide * (1 + part.trains))
    if recipe.family == "qwen2_5_vl":
        group = config.vision_config.spatial_merge_size**2
        kept = group * (tower.stream * width + tower.rms_norm(width) + part.product_inputs(width, 1))
        return images * (kept + part.compute * width * group * (1 + part.trains))
    return images * (part.product_inputs(width, 1) + part.compute * wide * (1 + part.trains))


# -- language model ---------------------------------------------------------------------------------------------------


def _text(recipe: Recipe, config: Any, lengths: Lengths, batch: int) -> Activations:
    sizes = text_widths(config)
    part = precision(recipe, not recipe.freeze_llm)
    tokens = batch * lengths.sequence
    vocabulary = config.text_config.vocab_size
    outer = part.stream * sizes.width + part.rms_norm(sizes.width) + part.product_inputs(sizes.width, 1)
    masked = lengths.sequence if batch > 1 else 0
    outer += FLOAT * vocabulary + masked
    logits = (LOGIT_COPIES - 1) * FLOAT * vocabulary * tokens
    layer = _decoder_layer(recipe, config, sizes, part, masked)
    transient = 3 * part.compute * sizes.inner + 2 * part.stream * sizes.width
    return Activations(
        part.stream * sizes.width * tokens * sizes.layers,
        outer * tokens,
        layer * tokens,
        sizes.layers,
        transient * tokens,
        logits,
    )


def _decoder_layer(recipe: Recipe, config: Any, sizes: Widths, part: Precision, masked: int) -> int:
    """Qwen2, Qwen3 and Llama: bytes per token beside the input."""
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = 2 * part.rms_norm(width) + part.stream * width
    # Rows of different length bring a mask: each layer makes numbers of it, and repeats keys and values for every head.
    keys = sizes.attended if masked else sizes.keys
    kept += compute * (2 * sizes.attended + 2 * keys + masked) + FLOAT * sizes.heads
    if config.text_config.model_type == "qwen3":  # norms of queries and keys, in float32
        normed = sizes.attended + sizes.keys
        groups = 2 * sizes.heads
        kept += FLOAT * normed + FLOAT * groups + (compute * normed if part.trains else 0)
    kept += 3 * compute * inner
    if part.trains or recipe.lora_llm:
        adapted = Precision(part.stream, compute, True, compute != FLOAT)
        kept += adapted.product_inputs(width, 3) + adapted.product_inputs(width, 2) + compute * inner
        if recipe.lora_llm:
            kept += 7 * compute * recipe.lora_llm
    return kept
