"""`MemoryRules`: how a record predicts token counts, widths of layers, and the bytes that a layer keeps for backward.

The functions here are for layers and projectors that several hosts share; a record takes one of them or brings its own.
They count bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "FLOAT",
    "TEXT_TOKENS",
    "Lengths",
    "MemoryRules",
    "Precision",
    "Widths",
    "adapted_layer",
    "decoder_layer",
    "gemma_attention",
    "gemma_norms",
    "mlp_projector",
    "read_layers",
    "vit_layer",
    "vit_widths",
]

FLOAT = 4
# Chat template, question and answer of a ChartQA row; the longest of its questions is about twice that.
TEXT_TOKENS = 96


@dataclass(frozen=True)
class Lengths:
    """Token counts of one question with its image.

    Attributes:
        pixels: Pixels that the tower gets, over all tiles.
        tower: Tokens in the tower, over all tiles, with prefix tokens.
        image: Image tokens in the language model.
        text: Tokens of the text.
        answer: Tokens of the text that have a label. The answer is a part of the text, so by default they are all of
            it: an upper bound.
    """

    pixels: int
    tower: int
    image: int
    text: int = TEXT_TOKENS
    answer: int = TEXT_TOKENS

    @property
    def sequence(self) -> int:
        """Tokens in the language model."""
        return self.image + self.text


@dataclass(frozen=True)
class Widths:
    """Sizes of one kind of layer.

    Attributes:
        layers: How many.
        width: Of the residual stream.
        inner: Of the MLP.
        heads: Of the queries.
        attended: Width of all queries together.
        keys: Width of all keys together.
        folded: Width of a query with a structural bias folded in; of a plain one without.
    """

    layers: int
    width: int
    inner: int
    heads: int
    attended: int
    keys: int
    folded: int


@dataclass(frozen=True)
class Precision:
    """Bytes per number in one part of a host.

    Attributes:
        stream: Of the residual stream.
        compute: Of the outputs of linear layers.
        trains: Whether weights of the part train.
        mixed: Whether its weights are float32 and are cast for every product (autocast).
    """

    stream: int
    compute: int
    trains: bool
    mixed: bool

    def product_inputs(self, width: int, products: int) -> int:
        """Bytes per token that linear layers keep of an input; autocast casts it for each.

        Args:
            width: Width of the input.
            products: How many linear layers share it.
        """
        if not self.trains:
            return 0
        return self.compute * width * (products if self.mixed else 1)

    def rms_norm(self, width: int, groups: int = 1) -> int:
        """Bytes per token that an RMS norm keeps beside its input: a float32 copy, the root, and the normalised input.

        Args:
            width: Width of the input.
            groups: Roots per token.
        """
        copy = 0 if self.stream == FLOAT else FLOAT * width
        return copy + FLOAT * groups + (self.stream * width if self.trains else 0)


# (sizes, precision, configuration, whether the tower has SFA) -> bytes per token of a layer beside its input.
LayerBytes = Callable[[Widths, Precision, Any, bool], int]
# (precision of the projector, that of the tower, configuration) -> bytes per image token.
ProjectorBytes = Callable[[Precision, Precision, Any], int]
# (recipe, configuration, sizes, precision, tokens that a mask has a number for, or 0) -> bytes per token of a layer of
# the language model beside its input; one number, or one for each layer.
DecoderBytes = Callable[[Any, Any, Widths, Precision, int], int | tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class MemoryRules:
    """Functions from which the memory of one host is predicted. All of them get its configuration.

    Attributes:
        lengths: Tokens of one question, from the configuration and the most tiles or pixels of an image.
        tower: Widths and number of the tower's layers that the host reads, without a structural bias.
        layer: Bytes per token that one of them keeps beside its input.
        projector: Bytes per image token that the projector keeps.
        prefix_tokens: Leading tokens of a tower with a fixed grid, which widen its folded queries.
        fixed_grid: Whether the tower has a grid of patches, so that a bias is folded into its queries.
        grid: Rows and columns of patches of the largest page, from the configuration and the limit, where pages have a
            grid each and a bias is folded into the queries of each page.
        outer: Bytes that a tower with gradients keeps outside its layers beside what all of them keep, from the recipe,
            the configuration, the lengths of a question, the precision, and the questions of a forward.
        decoder: Bytes per token that a layer of the language model keeps, where it is no Llama, Qwen2 or Qwen3.
        decoder_outer: Bytes per token that it keeps outside its layers beside what all of them keep.
        decoder_logits: Bytes per token with logits that it keeps of these beside what all of them keep.
        masks: How many masks the language model has for prompts of one length; the others need none there.
        output_read: Whether the projector reads the output of the last layer itself, not that of a norm after it.
        norm_in_front: Whether there is a norm before the tower's layers.
        narrow_stream: Whether the residual stream of the tower begins with the output of a product, and so has its
            precision under autocast, too; else it is float32 where the tower trains.
    """

    lengths: Callable[[Any, int], Lengths]
    tower: Callable[[Any], Widths]
    layer: LayerBytes
    projector: ProjectorBytes
    prefix_tokens: int = 0
    fixed_grid: bool = True
    grid: Callable[[Any, int], tuple[int, int]] | None = None
    narrow_stream: bool = False
    outer: Callable[[Any, Any, Lengths, Precision, int], int] | None = None
    decoder: DecoderBytes | None = None
    decoder_outer: Callable[[Any, Precision], int] | None = None
    decoder_logits: Callable[[Any, Precision], int] | None = None
    masks: int = 0
    output_read: bool = False
    norm_in_front: bool = False


def read_layers(config: Any, layers: int) -> int:
    """How many layers of a tower a host reads, by its `vision_feature_layer`; all where there is none.

    Args:
        config: Configuration of the host.
        layers: Layers of the tower.
    """
    entry = getattr(config, "vision_feature_layer", -1)
    entries = entry if isinstance(entry, list | tuple) else [entry]
    return min(layers, max(e if e >= 0 else layers + 1 + e for e in entries))


def vit_widths(config: Any) -> Widths:
    """Widths of InternViT, SigLIP and CLIP, from the configuration of a host."""
    vision = config.vision_config
    heads, width = vision.num_attention_heads, vision.hidden_size
    layers = read_layers(config, vision.num_hidden_layers)
    return Widths(layers, width, vision.intermediate_size, heads, width, width, width // heads)


def vit_layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    """Bytes per token of a layer of InternViT, SigLIP and CLIP: two norms, attention, an MLP with one activation."""
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = 4 * FLOAT + part.stream * width  # means and roots of two layer norms, and what the second one saw
    kept += 4 * sizes.heads * sizes.folded * compute + FLOAT * sizes.heads  # q, k, v, the output, log-sum-exp
    if sizes.folded * sizes.heads > sizes.attended:  # the extra channels are cut off again
        kept += compute * sizes.attended if part.trains else 0
    kept += part.product_inputs(width, 3) + part.product_inputs(width, 1)
    return kept + compute * inner * (1 + part.trains)


def mlp_projector(part: Precision, tower: Precision, config: Any) -> int:
    """Bytes per image token of two linear layers with an activation between them, one token for each patch."""
    width, wide = config.vision_config.hidden_size, config.text_config.hidden_size
    return part.product_inputs(width, 1) + part.compute * wide * (1 + part.trains)


def decoder_layer(recipe: Any, config: Any, sizes: Widths, part: Precision, masked: int) -> int:
    """Bytes per token of a layer of Qwen2, Llama and their kin, and of Qwen3 with its norms of queries and keys."""
    width, compute = sizes.width, part.compute
    kept = 2 * part.rms_norm(width) + part.stream * width
    # Rows of different length bring a mask: each layer makes numbers of it, and repeats keys and values for every head.
    keys = sizes.attended if masked else sizes.keys
    kept += compute * (2 * sizes.attended + 2 * keys + masked) + FLOAT * sizes.heads
    if config.text_config.model_type in ("qwen3", "qwen3_vl_text"):  # norms of queries and keys, in float32
        normed = sizes.attended + sizes.keys
        groups = 2 * sizes.heads
        kept += FLOAT * normed + FLOAT * groups + (compute * normed if part.trains else 0)
    return kept + 3 * compute * sizes.inner + adapted_layer(recipe, sizes, part)


def adapted_layer(recipe: Any, sizes: Widths, part: Precision) -> int:
    """Bytes per token that a layer of the language model keeps for its own weights, or for those of a LoRA on them."""
    if not (part.trains or recipe.lora_llm):
        return 0
    compute = part.compute
    adapted = Precision(part.stream, compute, True, compute != FLOAT)
    kept = adapted.product_inputs(sizes.width, 3) + adapted.product_inputs(sizes.width, 2) + compute * sizes.inner
    return kept + 7 * compute * recipe.lora_llm


def gemma_norms(width: int, part: Precision, fresh: int, passed: int) -> int:
    """Bytes per token of the norms of Gemma, which multiply by their weight before they leave float32.

    Args:
        width: Width of the inputs.
        part: Precision.
        fresh: Norms of the output of a linear layer, which nothing else keeps.
        passed: Norms of the residual stream, which is kept anyway where it is float32.
    """
    copies = fresh + (0 if part.stream == FLOAT else passed)
    weighted = (fresh + passed) * FLOAT * width if part.trains else 0
    return copies * FLOAT * width + (fresh + passed) * FLOAT + weighted


def gemma_attention(attended: int, keys: int, heads: int, part: Precision, masked: int) -> int:
    """Bytes per token of attention of Gemma, from the norms of queries and keys on.

    Args:
        attended: Width of all queries.
        keys: Width of all keys.
        heads: Number of queries.
        part: Precision.
        masked: Tokens that a mask has a number for; then keys and values are repeated for every head.
    """
    normed = attended + keys
    kept = FLOAT * normed + 2 * FLOAT * heads + (FLOAT * normed if part.trains else 0)
    spread = attended if masked else keys
    return kept + part.compute * (2 * attended + 2 * spread + masked) + FLOAT * heads
