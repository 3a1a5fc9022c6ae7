"""Lets hosts join text and image features that have different precision.

`prepare` keeps what trains in float32 and the rest in `recipe.dtype`. Most hosts cast image features to the dtype of
the text. Idefics3 and SmolVLM cast them to the dtype of their first weight, which is the tower's: the text then has to
have it too, until the language model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.hooks import attach, state_of
from sfa_adapters.vlm.places import Places

__all__ = ["join_in_one_dtype"]

JOIN = "join_dtype"  # the name of the feature, for `sfa_adapters.hooks`


@dataclass(eq=False)
class JoinState:
    """What the two hooks share.

    Attributes:
        core: The module that joins tower and language model, in the dtype of its first weight.
        embedding: The embedding of the text.
    """

    core: nn.Module
    embedding: nn.Module

    @property
    def joined(self) -> torch.dtype:
        """The dtype in which the core joins."""
        return next(p.dtype for p in self.core.parameters() if p.is_floating_point())

    @property
    def text(self) -> torch.dtype:
        """The dtype of the language model."""
        return next(p.dtype for p in self.embedding.parameters())


def join_in_one_dtype(model: nn.Module, places: Places) -> None:
    """Casts embeddings of the text to the dtype in which a host joins, and what is joined back.

    Args:
        model: A host whose core casts image features to its own dtype.
        places: Its parts.
    """
    core = model.get_submodule(places.tower.rpartition(".")[0])
    language_model: Any = model.get_submodule(places.language_model)
    state = JoinState(core, language_model.get_input_embeddings())
    attach(state.embedding, JOIN, state, post=_widen)
    for projector in places.projector:  # before transformers 5.21 nobody cast what autocast made of them
        attach(model.get_submodule(projector), JOIN, state, post=_widen)
    attach(language_model, JOIN, state, pre=_narrow)


def _widen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    state: JoinState = state_of(module, JOIN)
    return output.to(state.joined)


def _narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: JoinState = state_of(module, JOIN)
    embeds = kwargs.get("inputs_embeds")
    return None if embeds is None else (args, {**kwargs, "inputs_embeds": embeds.to(state.text)})
