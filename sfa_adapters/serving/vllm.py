"""Plug-in for vLLM, found by the entry points `vllm.general_plugins`: serves a model with a structural bias.

    vllm serve MODEL --additional-config '{"sfa": "FOLDER"}'
    SFA_ADAPTER=FOLDER vllm serve MODEL

vLLM computes the attention of its vision towers in one layer class, `MMEncoderAttention`, and lets plug-ins put a class
of theirs in its place (`register_oot`). Ours writes phi into further channels of q and k and leaves the attention to
vLLM, whichever kernel it chooses. Without an adapter it is vLLM's own layer.

vLLM loads the plug-in in every process; `MMEncoderAttention` layers are built in those that run the model.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from sfa_adapters.errors import ServingError, SFAError
from sfa_adapters.serving.adapter import ServedAdapter, adapter_folder, read_adapter

__all__ = ["ENVIRONMENT", "OPTION", "register"]

OPTION, ENVIRONMENT = "sfa", "SFA_ADAPTER"


def register() -> None:
    """The entry point: puts our attention layer in the place of vLLM's; may be called more than once.

    Raises:
        ServingError: `SFA_ADAPTER` names no adapter, or another plug-in has replaced the layer.
    """
    folder = os.environ.get(ENVIRONMENT)
    if folder:
        adapter_folder(folder)  # said at once, and not when the engine builds its model
    from vllm.model_executor.custom_op import op_registry_oot  # pyright: ignore[reportMissingImports]

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


def folder_of(config: Any) -> str | None:
    """The folder that a user named, in `--additional-config` or in the environment; None where the bias is off.

    Raises:
        ServingError: The two differ, or the option is no text.
    """
    extra = getattr(config, "additional_config", None)
    option = extra.get(OPTION) if isinstance(extra, dict) else None
    environment = os.environ.get(ENVIRONMENT) or None
    if option is not None and not isinstance(option, str):
        raise ServingError(f"--additional-config: {OPTION!r} must be the folder of an adapter, not {option!r}.")
    if option and environment and option != environment:
        raise ServingError(
            f"--additional-config names the adapter {option}, and {ENVIRONMENT} names {environment}: give one. One "
            "server serves one adapter."
        )
    return option or environment


def adapter_of(config: Any) -> ServedAdapter | None:
    """The adapter that a configuration of vLLM asks for, or None.

    Raises:
        ServingError: It cannot be served; says why in one line.
    """
    folder = folder_of(config)
    if folder is None:
        return None
    check_config(config)
    model = config.model_config
    return read_adapter(folder, model.model, model.revision)


def check_config(config: Any) -> None:
    """Refuses what the layer cannot do, by name.

    Raises:
        ServingError: FP8 attention, CUDA graphs or compilation of the encoder are on.
    """
    compilation = config.compilation_config
    multimodal = getattr(config.model_config, "multimodal_config", None)
    wrong = {
        "mm_encoder_attn_dtype='fp8' (FP8 attention of the encoder)": getattr(multimodal, "mm_encoder_attn_dtype", None)
        == "fp8",
        "cudagraph_mm_encoder (CUDA graphs of the encoder)": getattr(compilation, "cudagraph_mm_encoder", False),
        "compile_mm_encoder (compilation of the encoder)": getattr(compilation, "compile_mm_encoder", False),
    }
    on = [name for name, value in wrong.items() if value]
    if on:
        raise ServingError(f"The structural bias cannot be served with {' and '.join(on)}. Switch it off.")


def refuse(error: SFAError) -> ServingError:
    """Logs an error in one line, since vLLM prints it below the traces of three processes, and gives it back."""
    text = " ".join(str(error).split())
    logger().error("sfa-adapters cannot serve the adapter: %s", text)
    return ServingError(text)


@cache
def logger() -> Any:
    """A logger below vLLM's own, so that its lines are shown as vLLM's are."""
    import logging

    return logging.getLogger("vllm.sfa_adapters")
