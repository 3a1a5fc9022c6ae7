"""How many tokens images become, how wide layers are, and what a layer keeps for its backward pass.

`MemoryRules` is what a record says about it. The functions here are the layers and projectors that several hosts
share; a record takes one of them or brings its own. All of them count in bytes.
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
    """Tokens of one question.

    Attributes:
        pixels: Pixels that the tower gets, over all tiles.
        tower: Tokens in the tower, over all tiles, with prefix tokens.
        image: Image tokens in the language model.
        text: Tokens of the text.
    """

    pixels: int
    tower: int
    image: int
    text: int = TEXT_TOKENS

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


# (sizes, precision, configuration, whether the tower has SFA) -> bytes per token of a layer beside its input.
LayerBytes = Callable[[Widths, Precision, Any, bool], int]
# (precision of the projector, that of the tower, configuration) -> bytes per image token.
ProjectorBytes = Callable[[Precision, Precision, Any], int]


@dataclass(frozen=True, kw_only=True)
class MemoryRules:
    """What memory is counted from, for one host. All functions get the configuration of the host.

    Attributes:
        lengths: Tokens of one question, from the configuration and the most tiles or pixels of an image.
        tower: Sizes of the tower's layers, as many as the host reads, without a structural bias.
        layer: What one of them keeps.
        projector: What the projector keeps.
        prefix_tokens: Leading tokens of a tower with a fixed grid, which widen its folded queries.
        fixed_grid: Whether the tower has a grid of patches, so that a bias is folded into its queries.
        output_read: Whether the projector reads the output of the last layer itself, not that of a norm behind it.
        norm_in_front: Whether a norm stands in front of the tower's layers.
    """

    lengths: Callable[[Any, int], Lengths]
    tower: Callable[[Any], Widths]
    layer: LayerBytes
    projector: ProjectorBytes
    prefix_tokens: int = 0
    fixed_grid: bool = True
    output_read: bool = False
    norm_in_front: bool = False


def read_layers(config: Any, layers: int) -> int:
    """How many layers of a tower `vision_feature_layer` lets a host read; all where it says nothing.

    Args:
        config: Of the host.
        layers: That the tower has.
    """
    entry = getattr(config, "vision_feature_layer", -1)
    entries = entry if isinstance(entry, list | tuple) else [entry]
    return min(layers, max(e if e >= 0 else layers + 1 + e for e in entries))


def vit_widths(config: Any) -> Widths:
    """Sizes of InternViT, SigLIP and CLIP."""
    vision = config.vision_config
    heads, width = vision.num_attention_heads, vision.hidden_size
    layers = read_layers(config, vision.num_hidden_layers)
    return Widths(layers, width, vision.intermediate_size, heads, width, width, width // heads)


def vit_layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    """A layer of InternViT, SigLIP and CLIP: two layer norms, attention, and an MLP with one activation."""
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = 4 * FLOAT + part.stream * width  # means and roots of two layer norms, and what the second one saw
    kept += 4 * sizes.heads * sizes.folded * compute + FLOAT * sizes.heads  # q, k, v, the output, log-sum-exp
    if sizes.folded * sizes.heads > sizes.attended:  # the extra channels are cut off again
        kept += compute * sizes.attended if part.trains else 0
    kept += part.product_inputs(width, 3) + part.product_inputs(width, 1)
    return kept + compute * inner * (1 + part.trains)


def mlp_projector(part: Precision, tower: Precision, config: Any) -> int:
    """Two linear layers with an activation between them, one token for each patch."""
    width, wide = config.vision_config.hidden_size, config.text_config.hidden_size
    return part.product_inputs(width, 1) + part.compute * wide * (1 + part.trains)
