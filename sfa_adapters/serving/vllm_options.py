"""Which adapter a server of vLLM was asked for, and what it cannot do with one."""

from __future__ import annotations

import logging
import os
from typing import Any

from sfa_adapters.errors import ServingError, SFAError
from sfa_adapters.serving.adapter import ServedAdapter, read_adapter
from sfa_adapters.serving.image_tokens import TOKENS, before_tower, token_rule

__all__ = [
    "ENVIRONMENT",
    "OPTION",
    "REDUCED",
    "adapter_of",
    "check_config",
    "check_image_tokens",
    "folder_of",
    "logger",
    "refuse",
]

OPTION, ENVIRONMENT = "sfa", "SFA_ADAPTER"
# Models that can leave out image tokens (`vllm_image_tokens`), and the modules of vLLM that they are in.
REDUCED = {"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl"}
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


def check_image_tokens(config: Any) -> None:
    """Refuses to leave out image tokens where a model cannot.

    Raises:
        ServingError: Its positions cannot have gaps, or an option gets in the way.
    """
    if token_rule() is None:
        return
    names = list(getattr(config.model_config, "architectures", None) or ())
    if not any(name in REDUCED for name in names):
        raise ServingError(
            f"{TOKENS} leaves gaps between the positions of tokens. It is offered for {', '.join(REDUCED)}; the model "
            f"is a {', '.join(names) or 'model of another kind'}. Serve it with smaller images instead."
        )
    multimodal = config.model_config.multimodal_config
    wrong = {
        "video_pruning_rate": getattr(multimodal, "video_pruning_rate", None),
        "cudagraph_mm_encoder": getattr(config.compilation_config, "cudagraph_mm_encoder", False),
    }
    if before_tower():
        data = getattr(multimodal, "mm_encoder_tp_mode", None) == "data"
        wrong["mm_encoder_tp_mode='data' (each process encodes other images)"] = data
    if on := [name for name, value in wrong.items() if value]:
        raise ServingError(f"{TOKENS} cannot be used with {' and '.join(on)}. Switch one of them off.")


def refuse(error: SFAError, what: str = "serve the adapter") -> ServingError:
    """Logs an error in one line, since vLLM prints it below the traces of three processes, and gives it back."""
    text = " ".join(str(error).split())
    logger.error("sfa-adapters cannot %s: %s", what, text)
    return ServingError(text)
