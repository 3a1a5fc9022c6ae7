"""Groups the tokens of a prompt into text, image and neither, and finds the attention layers of the language model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.attention_call import AttentionCall
from sfa_adapters.errors import DataError, ObservationError
from sfa_adapters.observe import attention_modules
from sfa_adapters.vlm.parts import ID_NAMES, plain_model

__all__ = ["IMAGE", "NEITHER", "TEXT", "Aligned", "TokenKinds", "answer_lengths", "decoder_layers", "prompt_groups"]

TEXT, IMAGE, NEITHER = 0, 1, -1


@dataclass(frozen=True)
class TokenKinds:
    """Token ids by group; all others are text.

    Attributes:
        image: Ids of the placeholders of images and videos.
        left_out: Ids that are in neither group.
    """

    image: frozenset[int]
    left_out: frozenset[int]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        image_token_id: int | Collection[int] | None,
        include_bos: bool,
        include_special: bool,
        special_ids: Collection[int] | None,
        tokenizer: Any,
    ) -> TokenKinds:
        """Reads the ids of a model from its configs, unless the arguments give them; as in `modality_dominance`.

        Raises:
            DataError: The image token is not known, or BOS or special tokens that are to be left out.
        """
        config: Any = getattr(model, "config", None)
        configs = [config, getattr(model, "generation_config", None)]
        configs.append(config.get_text_config() if hasattr(config, "get_text_config") else None)
        image = _ids(image_token_id) or _read(configs[:1], ID_NAMES)
        if not image:
            raise DataError(
                f"The config of {type(model).__name__} names no image token (image_token_id, image_token_index). Say "
                "which placeholder stands for the image: image_token_id=...."
            )
        bos = _ids(getattr(tokenizer, "bos_token_id", None)) or _read(configs, ("bos_token_id",))
        left_out: set[int] = set()
        if not include_bos:
            if not bos:
                raise DataError("include_bos=False, but neither the model nor a tokenizer names a BOS token.")
            left_out |= bos
        if not include_special:
            names = ("eos_token_id", "pad_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
            special = _ids(special_ids) or _ids(getattr(tokenizer, "all_special_ids", None)) or _read(configs, names)
            if not special:
                raise DataError("include_special=False, but no special token is known: give special_ids=[...].")
            left_out |= special - bos
        return cls(frozenset(image), frozenset(left_out - image))


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(v) for v in value} if isinstance(value, Iterable) else {int(value)}


def _read(configs: Iterable[Any], names: Iterable[str]) -> set[int]:
    return set().union(*(_ids(getattr(config, name, None)) for config in configs for name in names))


def prompt_groups(inputs: Mapping[str, Any], kinds: TokenKinds, sample: int = 0) -> Tensor:
    """The group of every prompt token: `TEXT`, `IMAGE`, or `NEITHER` (padding and left-out ids).

    Args:
        inputs: With `input_ids` `[B, L]`, and `attention_mask` `[B, L]` where there is padding.
        kinds: Token ids by group.
        sample: Number of the first prompt, for messages.

    Returns:
        int64 `[B, L]`.

    Raises:
        DataError: Ids are missing or have no batch dimension, or the mask has another length.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        described = f"is {tuple(ids.shape)}" if isinstance(ids, Tensor) else "is missing"
        raise DataError(f"Sample {sample}: input_ids {described}; prompts are needed as [batch, length].")
    if mask is not None and mask.shape != ids.shape:
        raise DataError(
            f"Sample {sample}: attention_mask {tuple(mask.shape)} does not fit input_ids {tuple(ids.shape)}; it must "
            "have one entry per token."
        )
    groups = torch.full_like(ids, TEXT)
    groups[_among(ids, kinds.left_out)] = NEITHER
    groups[_among(ids, kinds.image)] = IMAGE
    return groups if mask is None else groups.masked_fill(mask == 0, NEITHER)


def _among(ids: Tensor, wanted: Collection[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(wanted), dtype=ids.dtype, device=ids.device))


def answer_lengths(new: Tensor, model: nn.Module) -> Tensor:
    """Length of each answer up to and including its end token.

    Args:
        new: Generated ids, `[B, n]`; padding behind an end token.
        model: The model; its generation config names the end tokens.

    Returns:
        int64 `[B]`.
    """
    ends = _ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    ended = _among(new, ends)
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
    return first.to(torch.int64)


def decoder_layers(model: nn.Module) -> tuple[str, ...]:
    """Paths of the attention modules of the language model, in order of execution.

    The attention of a resampler between tower and language model, whose projections have the same names, is left out.

    Raises:
        ObservationError: There are none.
    """
    names = tuple(attention_modules(model, "language"))
    inner: Any = plain_model(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    modules = dict(model.named_modules())
    return tuple(name for name in names if id(modules[name]) in inside) or names


class Aligned:
    """A reader of `observe` that checks that the prompt has the same length inside the model as outside.

    It fails for models that expand one image placeholder into several tokens internally.

    Args:
        length: Tokens of the prompt.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, call: AttentionCall) -> None:
        """Checks one attention call.

        Raises:
            ObservationError: The prompt has another length here.
        """
        if not call.past and call.num_queries != self.length:
            raise ObservationError(
                f"The prompt has {self.length} tokens, but {call.layer} attends over {call.num_queries}: the "
                "model expands its image placeholder inside. Let its processor write one placeholder per image token."
            )
