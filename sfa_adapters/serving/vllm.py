"""Plug-in for vLLM, found by the entry points `vllm.general_plugins`: serves a model with a structural bias.

    vllm serve MODEL --additional-config '{"sfa": "FOLDER"}'
    SFA_ADAPTER=FOLDER vllm serve MODEL
    SFA_IMAGE_TOKENS=0.5 vllm serve MODEL                 half of the image tokens reach the language model

vLLM computes the attention of its vision towers in one layer class, `MMEncoderAttention`, and lets plug-ins put a class
of theirs in its place (`register_oot`). Ours writes phi into further channels of q and k and leaves the attention to
vLLM, whichever kernel it chooses. Without an adapter it is vLLM's own layer.

vLLM loads the plug-in in every process; `MMEncoderAttention` layers are built in those that run the model.
"""

from __future__ import annotations

import os
from functools import cache

from sfa_adapters.errors import ServingError
from sfa_adapters.serving.adapter import adapter_folder
from sfa_adapters.serving.image_tokens import token_rule
from sfa_adapters.serving.vllm_options import ENVIRONMENT, REDUCED

__all__ = ["register"]


def register() -> None:
    """The entry point: puts our attention layer in the place of vLLM's; may be called more than once.

    Raises:
        ServingError: `SFA_ADAPTER` names no adapter, `SFA_IMAGE_TOKENS` is no share, or another plug-in has replaced
            the layer.
    """
    folder = os.environ.get(ENVIRONMENT)
    if folder:
        adapter_folder(folder)  # said at once, and not when the engine builds its model
    fewer_tokens = token_rule() is not None  # a wrong share, too
    from vllm.model_executor.custom_op import op_registry_oot  # pyright: ignore[reportMissingImports]

    if fewer_tokens:
        _register_models()
    there = op_registry_oot.get("MMEncoderAttention")
    if there is None:
        _register_layer()
    elif there.__name__ != "SFAEncoderAttention" and folder:
        raise ServingError(
            f"{there.__module__}.{there.__name__} has replaced vLLM's MMEncoderAttention, so the bias has no place. "
            "Run vLLM without that plug-in (VLLM_PLUGINS=sfa)."
        )


@cache
def _register_layer() -> None:
    from vllm.model_executor.layers.attention import MMEncoderAttention  # pyright: ignore[reportMissingImports]

    from sfa_adapters.serving.vllm_attention import SFAEncoderAttention, parents

    MMEncoderAttention.register_oot(SFAEncoderAttention)
    parents.watch()


@cache
def _register_models() -> None:
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]

    for name in REDUCED:
        ModelRegistry.register_model(name, f"sfa_adapters.serving.vllm_image_tokens:{name}")
