"""Which adapter a server of vLLM was asked for, and what it cannot do with one."""

from __future__ import annotations

import logging
import os
from typing import Any

from sfa_adapters.errors import ServingError, SFAError
from sfa_adapters.serving.adapter import ServedAdapter, read_adapter

__all__ = ["ENVIRONMENT", "OPTION", "adapter_of", "check_config", "folder_of", "logger", "refuse"]

OPTION, ENVIRONMENT = "sfa", "SFA_ADAPTER"
# Below vLLM's own logger, so that its lines are shown as vLLM's are.
logger = logging.getLogger("vllm.sfa_adapters")


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
    logger.error("sfa-adapters cannot serve the adapter: %s", text)
    return ServingError(text)
