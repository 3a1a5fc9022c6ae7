"""`SFALayer`: the child module that holds one attention layer's structural scalars, and the hooks that apply them.

The layer sits **beside** the attention's own weights, as its child `sfa`: base state-dict keys stay as they are, LoRA
still finds `q_proj`, and detaching restores the model bit for bit. A forward pre-hook puts a lazy mask into the
attention's own mask argument; a forward hook checks that the mask was used.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.attention import Backend, dense_mask
from sfa_adapters.bias import BiasFactors, StructuralWeights, bias_factors
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import BiasNotAppliedError, LayoutError, SFAWarning
from sfa_adapters.forward_hooks import hidden_states_of
from sfa_adapters.forwards import Arrangement
from sfa_adapters.hooks import detach
from sfa_adapters.layout import TokenLayout
from sfa_adapters.mask import LazyMask, SegmentedMask, StructuralMask
from sfa_adapters.mask_argument import attach_to_attention, give_mask, given_mask, unused_mask
from sfa_adapters.packing import PackedMask, Packing, check_block_diagonal, check_hidden_padding
from sfa_adapters.scalar_layer import ScalarLayer
from sfa_adapters.state_keys import PEFT_PREFIX
from sfa_adapters.tower import SFA, TowerState

__all__ = ["CHILD_NAME", "SFALayer", "attach_layer", "detach_layer"]

CHILD_NAME = "sfa"


class SFALayer(ScalarLayer):
    """The structural scalars of one attention layer (a PEFT tuner layer), which builds the lazy mask from them.

    Args:
        num_heads: Heads of the attention layer.
        index: Number of the layer in its tower.
        name: Path of the attention module in the model.
        state: State that the layers of the tower share.
    """

    def __init__(self, num_heads: int, index: int, name: str, state: TowerState) -> None:
        super().__init__(num_heads, index, name)
        self.state = state
        self._dense: tuple[Any, Tensor, TokenLayout] | None = None
        self.saved_by_peft = False  # whether PEFT knows the adapters

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for adapter, config in self.configs.items() if not torch.compiler.is_compiling() else ():
            values = {key.removeprefix("sfa_"): tensor for key, tensor in self.tensors(adapter).items()}
            self.state.ramp_watch.see_state(config, values, config.strong_heads(self.index, self.num_heads))
        around = prefix.removesuffix(".".join((*filter(None, (self.name, CHILD_NAME)), "")))
        if around.endswith(PEFT_PREFIX) and not (self.saved_by_peft or self.state.warned):
            self.state.warned = True
            warnings.warn(
                "This model was wrapped by PEFT after SFA was injected, so PEFT saves it without SFA (or with tensors "
                "that its loader drops). Save the bias as well: save_sfa(model, folder), or wrap first and inject "
                "SFA into the wrapped model, which then saves both.",
                SFAWarning,
                stacklevel=2,
            )

    def train(self, mode: bool = True) -> SFALayer:
        """As `Module.train`; also drops the cached dense mask."""
        self._dense = None
        return super().train(mode)

    # -- the mask ---------------------------------------------------------------------------------------------------

    def build_mask(
        self, hidden_states: Tensor, attention_mask: Tensor | LazyMask | None, bounds: Tensor | None
    ) -> LazyMask | None:
        """Builds the mask for this forward; None when no adapter is active.

        Args:
            hidden_states: Input of the attention module, `[batch, tokens, width]`, or `[tokens, width]` for segmented
                towers.
            attention_mask: The mask that the model passed.
            bounds: Segment boundaries, `[segments + 1]`, for segmented towers.

        Raises:
            LayoutError: The layout of the tokens is not known, the mask of the model does not fit it, or active
                adapters have different blocks.
            WeightsError: The scalars of an active adapter were never loaded.
        """
        active = self.active
        if not active:
            return None
        if not torch.compiler.is_compiling():
            for name in active:
                trained = next((tensor for tensor in self.tensors(name).values() if tensor.requires_grad), None)
                self.state.ramp_watch.see_forward(self.index, name, self.configs[name], trained)
        device = hidden_states.device
        weights = [self.weights(name, device) for name in active]
        with_blocks = [name for name in active if "block" in self.configs[name].terms]
        config = self.configs[(with_blocks or active)[0]]
        block_map, key = config.block_map_tensor(), _block_key(config)
        if any(_block_key(self.configs[name]) != key for name in with_blocks):
            raise LayoutError(
                f"Adapters {with_blocks} cut the page into different blocks and cannot be active together."
            )
        backend: Backend = config.backend  # pyright: ignore[reportAssignmentType]
        arrangement = self.state.arrangement(hidden_states, self)
        joined = self.state.backbone.joined if isinstance(arrangement, Packing) else arrangement.joined
        if joined == "segments":
            assert not isinstance(arrangement, Packing)
            assert bounds is not None
            segments = self.state.segments(arrangement, tuple(bounds.tolist()), block_map, key, device)
            factors = [bias_factors(weights, layout, self.num_heads) for layout in segments]
            if len(factors) == 1 and segments[0].batch_size is not None:
                return SegmentedMask(_split_batch(factors[0]), backend)
            return SegmentedMask(factors, backend)
        if isinstance(arrangement, Packing) or arrangement.joined == "packed":
            layouts = self._packed_layouts(arrangement, attention_mask, block_map, key, device)
            # A mask that already keeps the images apart gets the biases, rather than a second mask.
            mask = attention_mask if isinstance(attention_mask, PackedMask) else PackedMask(arrangement.lengths)
            factors = {id(layout): bias_factors(weights, layout, self.num_heads) for layout in layouts}
            mask.biases = [factors[id(layout)] for layout in layouts]
            mask.backend = backend
            return mask
        assert not isinstance(attention_mask, LazyMask)
        if arrangement.joined == "padded" and any(image.padding for image in arrangement.images):
            self.state.check_mask(attention_mask, arrangement, check_hidden_padding, self.name)
        layout = self.state.layout(arrangement, block_map, key, device)
        bias = bias_factors(weights, layout, self.num_heads)
        budget = min(self.cache_bytes[name] for name in active)
        return StructuralMask(bias, attention_mask, backend, _CachedDense(self, bias, weights, budget))

    def _packed_layouts(
        self, arrangement: Arrangement, attention_mask: Any, block_map: Tensor, key: Any, device: torch.device
    ) -> Sequence[TokenLayout]:
        """The layout of each image of a packed sequence.

        Raises:
            LayoutError: The model's mask keeps other images apart than those of its input: nothing may replace it.
        """
        if isinstance(arrangement, Packing):
            return arrangement.layouts(block_map, key, device)
        self.state.check_mask(attention_mask, arrangement, check_block_diagonal, self.name)
        return self.state.image_layouts(arrangement, block_map, key, device)

    def dense_mask(self, bias: BiasFactors, weights: list[StructuralWeights], like: Tensor) -> Tensor:
        """The dense mask in the dtype of `like`, kept until a scalar or the layout changes."""
        key = (id(bias.layout), like.dtype, like.device, _fingerprint(weights))
        if self._dense is None or self._dense[0] != key:
            # The layout is kept in the entry, so that its id is not given to another one while the entry lives.
            with torch.inference_mode(False), torch.no_grad():  # a later training step may use it
                self._dense = (key, dense_mask(bias, like), bias.layout)
        return self._dense[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None}

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"layer={self.index}, num_heads={self.num_heads}, adapters={list(self.configs)}"


class _CachedDense:
    """Gives `StructuralMask` a dense mask that is kept between forwards, within a memory budget; see `DenseCache`."""

    def __init__(self, layer: SFALayer, bias: BiasFactors, weights: list[StructuralWeights], budget: float) -> None:
        self.layer, self.bias, self.weights, self.budget = layer, bias, weights, budget

    def __call__(self, query: Tensor) -> Tensor | None:
        layout = self.bias.layout
        needed = query.shape[1] * layout.num_tokens**2 * query.element_size() * (layout.batch_size or 1)
        if self.bias.requires_grad or needed > self.budget or torch.compiler.is_compiling():
            return None
        return self.layer.dense_mask(self.bias, self.weights, query)


def _block_key(config: SFAConfig) -> str:
    return str(config.block_map or config.block_grid)


def _split_batch(bias: BiasFactors) -> list[Tensor | BiasFactors]:
    """Dense masks of all short segments, computed together and cut to the length of each."""
    padding = bias.layout.padding
    phi = bias.dense()
    if padding is None:
        return [segment.unsqueeze(0) for segment in phi]
    lengths = (~padding).sum(-1).tolist()
    return [segment[None, :, :length, :length] for segment, length in zip(phi, lengths, strict=True)]


def _fingerprint(weights: list[StructuralWeights]) -> tuple[Any, ...]:
    """A cache key that changes whenever a scalar does.

    On a CPU it is the values themselves (a few hundred), since code that writes through `.data` does not raise version
    counters. On other devices reading values would wait for the device, so version counters are used; `train()` and
    `eval()` drop the mask in any case.
    """
    tensors = [t for w in weights for t in (w.row, w.col, w.dist, w.block) if t is not None]
    if all(t.device.type == "cpu" for t in tensors):
        return tuple(t.detach().view(torch.uint8).numpy().tobytes() for t in tensors)
    return tuple((t.data_ptr(), t._version) for t in tensors)


# -- attaching ------------------------------------------------------------------------------------------------------


def attach_layer(attention: nn.Module, layer: SFALayer) -> None:
    """Adds the layer to its attention module as a child, and attaches its hooks."""
    attention.add_module(CHILD_NAME, layer)
    argument = layer.state.backbone.argument_of(attention).name
    attach_to_attention(attention, SFA, layer.state, argument, add_bias, check_bias_used)
    layer.state.layers.append(layer)


def detach_layer(attention: nn.Module) -> None:
    """Removes the layer and its hooks from its attention module, which is then as it was."""
    layer: SFALayer = getattr(attention, CHILD_NAME)
    detach(attention, SFA)
    layer.state.layers.remove(layer)
    delattr(attention, CHILD_NAME)


def add_bias(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention module: merges the bias into its mask argument."""
    layer: SFALayer = getattr(attention, CHILD_NAME)
    hidden_states: Any = hidden_states_of(args, kwargs)
    segment_argument = layer.state.backbone.segment_argument
    # Towers that take images both in a batch and as segments name the boundaries in the latter case only.
    segmented = layer.state.backbone.joined == "segments"
    bounds = _segment_bounds(attention, layer, args, kwargs) if segmented else kwargs.get(segment_argument)
    layer.state.see_states(hidden_states, layer)
    mask = layer.build_mask(hidden_states, given_mask(attention, SFA, args, kwargs), bounds)
    return give_mask(attention, SFA, mask, args, kwargs)


def _segment_bounds(
    attention: nn.Module, layer: SFALayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The segment boundaries among the arguments of an attention module.

    Raises:
        LayoutError: There are none, and the layer would have used them.
    """
    name = layer.state.backbone.segment_argument
    parameters = list(inspect.signature(type(attention).forward).parameters)
    position = parameters.index(name) - 1 if name in parameters else len(args)
    bounds = kwargs.get(name, args[position] if position < len(args) else None)
    if bounds is None and layer.active:
        raise LayoutError(
            f"{layer.name} ({type(attention).__name__}) was called without {name!r}, from which backbone "
            f"{layer.state.backbone.name!r} reads where its segments begin and end (Backbone.segment_argument); it "
            f"got {len(args)} positional arguments and {sorted(kwargs)}. Call the tower itself, or pass {name}="
            "[0, end of segment 1, ...]; if the attention names it differently, set segment_argument in the record."
        )
    return bounds


def check_bias_used(attention: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attention module: an adapter that silently does nothing is an error.

    Raises:
        BiasNotAppliedError: The attention implementation dropped the mask; names the layer and the implementation.
    """
    if unused_mask(attention, SFA) is not None:
        layer: SFALayer = getattr(attention, CHILD_NAME)
        implementation = getattr(getattr(attention, "config", None), "_attn_implementation", "unknown")
        raise BiasNotAppliedError(
            f"{layer.name} ({type(attention).__name__}) ran without using its bias: the attention implementation "
            f"{implementation!r} drops the argument {layer.state.backbone.argument_of(attention).name!r}. "
            "Load the model with attn_implementation='sdpa', or call tower.set_attn_implementation('sdpa')."
        )
