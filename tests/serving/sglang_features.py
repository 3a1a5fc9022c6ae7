"""Features of a tower of SGLang itself, on a CPU.

    python -m tests.serving.sglang_features HOST PATCHES FEATURES PORT RANK RANKS

A program of its own, since SGLang keeps the model and its hooks for the life of a process. It loads plug-ins as a
server of SGLang does, by entry points, and the weights by SGLang's own loader.
"""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def features(host: str, patches: str, target: str, port: int, rank: int, ranks: int) -> None:
    """Writes the features of the images in a file: `pixels` `[patches, width]` and `grids` `[images, 3]`.

    With several ranks each has a share of the heads, as under `--tp-size`.
    """
    from sglang.srt import runtime_context  # pyright: ignore[reportMissingImports]
    from sglang.srt.configs.device_config import DeviceConfig  # pyright: ignore[reportMissingImports]
    from sglang.srt.configs.load_config import LoadConfig  # pyright: ignore[reportMissingImports]
    from sglang.srt.configs.model_config import ModelConfig  # pyright: ignore[reportMissingImports]
    from sglang.srt.distributed import (  # pyright: ignore[reportMissingImports]
        init_distributed_environment,
        initialize_model_parallel,
    )
    from sglang.srt.distributed.device_communicators import pynccl  # pyright: ignore[reportMissingImports]
    from sglang.srt.model_loader import get_model  # pyright: ignore[reportMissingImports]
    from sglang.srt.plugins import load_plugins  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import ServerArgs  # pyright: ignore[reportMissingImports]

    logging.basicConfig(level=logging.INFO)
    # Without a GPU, layers of rotary embedding look for a kernel of vLLM. Towers read their tables only.
    sys.modules["vllm"] = sys.modules["vllm._custom_ops"] = SimpleNamespace(rotary_embedding=None)  # type: ignore[assignment]
    load_plugins()
    args = ServerArgs(model_path=host, device="cpu", dtype="float32", mm_attention_backend="sdpa", tp_size=ranks)
    places = dict.fromkeys(runtime_context.SpawnRanks.__struct_fields__, 0)
    places |= {name: rank for name in places if "tp_rank" in name or name == "world_rank"}
    runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(**places))
    init_distributed_environment(
        world_size=ranks, rank=rank, local_rank=rank, distributed_init_method=f"tcp://127.0.0.1:{port}", backend="gloo"
    )
    pynccl.PyNcclCommunicator = lambda **_: None  # it needs GPUs; sums go through gloo
    initialize_model_parallel()
    config = ModelConfig.from_server_args(args)
    model: Any = get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))
    given = load_file(patches)
    with torch.no_grad():
        save_file({"features": model.visual(given["pixels"], grid_thw=given["grids"]).contiguous()}, target)


if __name__ == "__main__":
    _, host, patches, target, port, rank, ranks = sys.argv
    features(host, patches, target, int(port), int(rank), int(ranks))
