"""Pretrained DINOv2-small: weights of an installed package in models of transformers and timm.

    tower = dinov2_tower()          # transformers' InternVLVisionModel: the same architecture, output equal to 0.0
    model = dinov2_timm()           # timm's vit_small_patch14_dinov2, 518 px

Both hold the same weights, 22.1 M parameters, 12 layers of 6 heads, patches of 14 px. At other sizes than 518 px
timm's output differs from that of transformers, because timm resamples position embeddings with antialiasing.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.errors import WeightsError
from sfa_adapters.install import install_command
from sfa_adapters.recipes.studies.wheels import DINOV2_FILE, wheel_path

__all__ = ["VISION", "dinov2_state", "dinov2_timm", "dinov2_tower", "internvl_state", "timm_state"]

LAYERS = 12
# DINOv2-small as options of transformers' InternVLVisionConfig.
VISION: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "image_size": [518, 518],
    "patch_size": [14, 14],
    "attention_bias": True,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "use_mean_pooling": False,
    "hidden_act": "gelu",
}
# Tensors that the export to ONNX folded, by the node whose input they are.
POSITIONS = {"/backbone/embeddings/Concat_6": "cls", "/backbone/embeddings/Reshape_1": "patches"}


def dinov2_tower() -> Any:
    """DINOv2-small as `InternVLVisionModel`, fp32, in eval mode.

    Raises:
        WeightsError: The package with the weights is missing or has another file.
    """
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    tower = InternVLVisionModel(InternVLVisionConfig(**VISION))
    tower.load_state_dict(internvl_state(dinov2_state()))
    return tower.eval()


def dinov2_timm(size: int = 518) -> Any:
    """DINOv2-small as timm's `vit_small_patch14_dinov2`, fp32, in eval mode.

    Args:
        size: Pixels of a side of the images; position embeddings of other sizes than 518 are resampled by timm.

    Raises:
        WeightsError: The package with the weights, or timm, is missing.
    """
    if find_spec("timm") is None:
        raise WeightsError(f"timm is missing. Run: {install_command('timm')}")
    import timm

    model: Any = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518)
    model.load_state_dict(timm_state(dinov2_state()))
    if size != 518:
        model.set_input_size((size, size))
    return model.eval()


def dinov2_state() -> dict[str, Tensor]:
    """The weights under the names of the checkpoint facebook/dinov2-small, without `mask_token`, which is unused.

    They are 222 tensors; the decoder in the file belongs to the package and is left out.

    Raises:
        WeightsError: The package with the weights, or `onnx`, is missing, or the file is another one.
    """
    path = wheel_path(DINOV2_FILE)
    return {name: tensor.clone() for name, tensor in _read(path).items()}


@cache
def _read(path: Path) -> dict[str, Tensor]:
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise WeightsError(
            f"The package onnx, which reads {path.name}, is missing. Run: {DINOV2_FILE.install}"
        ) from None

    graph = onnx.load(str(path)).graph
    arrays = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
    positions = {}
    for node in graph.node:
        read = next((name for name in node.input if name.startswith("onnx::") and name in arrays), None)
        if read is None:
            continue
        if node.name in POSITIONS:
            positions[POSITIONS[node.name]] = arrays[read]
        elif node.op_type == "MatMul":
            # The export left matrices without a name and transposed; the node's name is the path of the module.
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = arrays[read].T.contiguous()
    state["embeddings.position_embeddings"] = torch.cat((positions["cls"], positions["patches"]), 1)
    return state


def internvl_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of the published checkpoint to those of `InternVLVisionModel`.

    Args:
        state: From `dinov2_state`.

    Raises:
        WeightsError: A tensor is left over or missing.
    """
    rest, renamed = dict(state), {}
    inside = {
        **{f"attention.attention.{long}": f"attention.{long[0]}_proj" for long in ("query", "key", "value")},
        "attention.output.dense": "attention.projection_layer",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        renamed[name] = _take(rest, name)
    pairs = {name: name for name in ("embeddings.patch_embeddings.projection", "layernorm")}
    for layer in range(LAYERS):
        pairs |= {f"encoder.layer.{layer}.{old}": f"encoder.layer.{layer}.{new}" for old, new in inside.items()}
        for number in (1, 2):
            old = f"encoder.layer.{layer}.layer_scale{number}.lambda1"
            renamed[f"encoder.layer.{layer}.lambda_{number}"] = _take(rest, old)
    for old, new in pairs.items():
        for part in ("weight", "bias"):
            renamed[f"{new}.{part}"] = _take(rest, f"{old}.{part}")
    return _complete(rest, renamed)


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of the published checkpoint to those of timm: q, k and v become one matrix.

    Args:
        state: From `dinov2_state`.

    Raises:
        WeightsError: A tensor is left over or missing.
    """
    rest = dict(state)
    renamed = {
        "cls_token": _take(rest, "embeddings.cls_token"),
        "pos_embed": _take(rest, "embeddings.position_embeddings"),
    }
    inside = {
        "attention.output.dense": "attn.proj",
        **{name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    }
    pairs = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
    for layer in range(LAYERS):
        old, new = f"encoder.layer.{layer}.", f"blocks.{layer}."
        pairs |= {old + name: new + other for name, other in inside.items()}
        for number in (1, 2):
            renamed[f"{new}ls{number}.gamma"] = _take(rest, f"{old}layer_scale{number}.lambda1")
        for part in ("weight", "bias"):
            joined = [_take(rest, f"{old}attention.attention.{name}.{part}") for name in ("query", "key", "value")]
            renamed[f"{new}attn.qkv.{part}"] = torch.cat(joined)
    for old, new in pairs.items():
        for part in ("weight", "bias"):
            renamed[f"{new}.{part}"] = _take(rest, f"{old}.{part}")
    return _complete(rest, renamed)


def _take(rest: dict[str, Tensor], name: str) -> Tensor:
    if name not in rest:
        raise WeightsError(f"The weights of DINOv2-small have no tensor {name}, or it is used twice.")
    return rest.pop(name)


def _complete(rest: dict[str, Tensor], renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    if rest:
        raise WeightsError(f"{len(rest)} tensors of DINOv2-small are left over: {', '.join(sorted(rest)[:3])}, ...")
    return renamed
