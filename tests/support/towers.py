"""Real tiny towers for every registered backbone, with inputs and one way to read their patch features.

A tower is listed here under the name of its backbone. `missing_backbones` tells which registered names have none, and
the contract suite fails on them: a new backbone is tested by existing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from timm.layers.config import set_reentrant_ckpt
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from sfa_adapters.registry import registered_backbones
from tests.support.remote.modeling_intern_vit import InternVisionConfig, InternVisionModel

Inputs = dict[str, Any]
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


@dataclass(frozen=True)
class TowerCase:
    """One tower under test.

    Attributes:
        name: Its name in test ids.
        backbone: The registered name that it must be found under.
        build: Makes the tower, in eval mode, with the same weights every time.
        inputs: Makes the inputs of a batch of two images from a seed.
        split: Cuts such inputs into inputs of one image each.
        hidden: Patch features of each image, `[tokens, width]`; never a pooled output.
        resized: Inputs of another, non-square image size, or None where the tower takes one size only.
        family: `hf`, `timm` or `remote`: how eager attention and checkpointing are switched.
        has_eager: Whether the eager attention of the tower takes the bias.
        lora_targets: Names of projections for LoRA.
        layers: How many attention layers the tower has.
        grid: Its grid, and below its prefix tokens, as `describe` must tell.
        compiles: Whether `torch.compile(fullgraph=True)` is expected to work (one per kind of attention, to save time).
    """

    name: str
    backbone: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    split: Callable[[Inputs], list[Inputs]]
    hidden: Callable[[nn.Module, Inputs], list[Tensor]]
    family: str = "hf"
    resized: Callable[[int], Inputs] | None = None
    has_eager: bool = True
    lora_targets: tuple[str, ...] = ("q_proj",)
    layers: int = 3
    grid: tuple[int, int] | None = (4, 4)
    prefix: int = 0
    compiles: bool = False

    def fresh(self) -> tuple[nn.Module, Inputs]:
        """A tower and the inputs that most tests use."""
        return self.build(), self.inputs(0)

    def __str__(self) -> str:
        return self.name


def lively(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Weights of a size at which attention is far from uniform; library defaults make tiny towers nearly linear."""

    def make() -> nn.Module:
        torch.manual_seed(7)
        tower = build()
        with torch.no_grad():
            for parameter in tower.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return tower.eval()

    return make


def images(height: int, width: int) -> Callable[[int], Inputs]:
    """Two different images per seed."""
    return lambda seed: {
        "pixel_values": torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    }


def with_interpolation(height: int, width: int) -> Callable[[int], Inputs]:
    return lambda seed: {**images(height, width)(seed), "interpolate_pos_encoding": True}


def split_batch(inputs: Inputs) -> list[Inputs]:
    batch = len(inputs["pixel_values"])
    return [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()} for i in range(batch)]


def read_last_hidden(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return list(model(**inputs).last_hidden_state)


# -- towers that pass a real mask --


def padded_images(seed: int) -> Inputs:
    """Two 5x4 canvases; the second image fills 3x3 patches of its canvas."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 3:] = False, False
    return {"pixel_values": torch.randn(2, 3, 70, 56, generator=generator), "patch_attention_mask": mask}


def read_unpadded(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    hidden = model(**inputs).last_hidden_state
    return [states[mask.flatten()] for states, mask in zip(hidden, inputs["patch_attention_mask"], strict=True)]


def idefics_case(name: str, tower: Any, config: Any, compiles: bool = False) -> TowerCase:
    options: dict[str, Any] = {**SMALL, "image_size": 70, "patch_size": 14}
    return TowerCase(
        name, "idefics", lively(lambda: tower(config(**options))), padded_images, split_batch, read_unpadded,
        grid=(5, 5), compiles=compiles,
    )  # fmt: skip


# -- Qwen2.5-VL: a flat sequence of patches of different sizes --

QWEN_SIZES = ((1, 6, 10), (1, 4, 4))


def flat_patches(seed: int, sizes: Iterable[tuple[int, int, int]] = QWEN_SIZES) -> Inputs:
    """Images of 6x10 and 4x4 patches: ragged windows of 4x4, 4x2, 2x4 and 2x2."""
    sizes = list(sizes)
    tokens = sum(math.prod(size) for size in sizes)
    generator = torch.Generator().manual_seed(seed)
    return {"hidden_states": torch.randn(tokens, 3 * 2 * 14 * 14, generator=generator), "grid_thw": torch.tensor(sizes)}


def split_flat(inputs: Inputs) -> list[Inputs]:
    lengths = inputs["grid_thw"].prod(-1).tolist()
    parts = inputs["hidden_states"].split(lengths)
    return [{"hidden_states": p, "grid_thw": g[None]} for p, g in zip(parts, inputs["grid_thw"], strict=True)]


def read_flat(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return list(model(**inputs).last_hidden_state.split(inputs["grid_thw"].prod(-1).tolist()))


def qwen_tower() -> nn.Module:
    return Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            depth=3,
            hidden_size=32,
            intermediate_size=64,
            num_heads=4,
            out_hidden_size=32,
            fullatt_block_indexes=[1],
            window_size=56,
        )
    )


# -- timm --


def read_timm(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The output of `forward` is every token where the tower is built with `global_pool=""`."""
    return list(model(inputs["pixel_values"]))


def timm_case(
    name: str, variant: str, prefix: int, patch: int = 16, compiles: bool = False, **kwargs: Any
) -> TowerCase:
    def build() -> nn.Module:
        return timm.create_model(
            variant, depth=3, embed_dim=32, num_heads=4, num_classes=0, global_pool="",
            img_size=(4 * patch, 6 * patch), dynamic_img_size=True, **kwargs,
        )  # fmt: skip

    return TowerCase(
        name, "timm_vit", lively(build), images(4 * patch, 6 * patch), split_batch, read_timm, "timm",
        resized=images(5 * patch, 3 * patch), lora_targets=("qkv",), grid=(4, 6), prefix=prefix, compiles=compiles,
    )  # fmt: skip


CASES: tuple[TowerCase, ...] = (
    TowerCase(
        "clip", "clip", lively(lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=56, patch_size=14))),
        images(56, 56), split_batch, read_last_hidden, resized=with_interpolation(42, 70), prefix=1, compiles=True,
    ),
    idefics_case("idefics2", Idefics2VisionTransformer, Idefics2VisionConfig),
    idefics_case("idefics3", Idefics3VisionTransformer, Idefics3VisionConfig),
    idefics_case("smolvlm", SmolVLMVisionTransformer, SmolVLMVisionConfig, compiles=True),
    TowerCase(
        "internvit", "internvit",
        lively(lambda: InternVLVisionModel(InternVLVisionConfig(**SMALL, image_size=56, attention_bias=True))),
        images(56, 56), split_batch, read_last_hidden, resized=images(70, 42), prefix=1, compiles=True,
    ),
    TowerCase(
        "internvit_qknorm", "internvit",
        lively(lambda: InternVLVisionModel(InternVLVisionConfig(**SMALL, image_size=56, use_qk_norm=True))),
        images(56, 56), split_batch, read_last_hidden, prefix=1,
    ),
    TowerCase(
        "internvit_remote", "internvit_remote", lively(lambda: InternVisionModel(InternVisionConfig())),
        images(56, 56), split_batch, read_last_hidden, "remote", resized=images(42, 70), has_eager=False,
        lora_targets=("qkv",), prefix=1, compiles=True,
    ),
    TowerCase(
        "internvit_remote_plain", "internvit_remote",
        lively(lambda: InternVisionModel(InternVisionConfig(qk_normalization=False, qkv_bias=True))),
        images(56, 56), split_batch, read_last_hidden, "remote", has_eager=False, lora_targets=("qkv",), prefix=1,
    ),
    TowerCase(
        "qwen2_5", "qwen2_5_vit", lively(qwen_tower), flat_patches, split_flat, read_flat,
        resized=lambda seed: flat_patches(seed, [(1, 10, 6), (2, 2, 4)]), has_eager=False, lora_targets=("qkv",),
        grid=None, compiles=True,
    ),
    TowerCase(
        "siglip", "siglip",
        lively(lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=56, patch_size=14))),
        images(56, 56), split_batch, read_last_hidden, resized=with_interpolation(42, 70), compiles=True,
    ),
    timm_case("timm_cls", "vit_tiny_patch16_224", prefix=1, compiles=True),
    timm_case("timm_reg4", "vit_base_patch14_reg4_dinov2", prefix=5, patch=14),
    timm_case("timm_siglip", "vit_base_patch16_siglip_224", prefix=0),
    timm_case("timm_clip", "vit_base_patch16_clip_224", prefix=1),
    timm_case("timm_qknorm", "vit_tiny_patch16_224", prefix=1, qk_norm=True),
    timm_case("timm_internvit", "vit_intern300m_patch14_448", prefix=1, patch=14),
)  # fmt: skip


every_tower = pytest.mark.parametrize("case", CASES, ids=str)


def missing_backbones() -> list[str]:
    """Registered backbones that no case covers."""
    return sorted(set(registered_backbones()) - {case.backbone for case in CASES})


def set_eager(case: TowerCase, tower: nn.Module) -> None:
    """Moves a tower from fused to eager attention."""
    if case.family == "timm":
        for module in tower.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010
    else:
        tower.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]


def set_checkpointing(case: TowerCase, tower: Any, reentrant: bool | None) -> None:
    """Switches gradient checkpointing on, or off for None; transformers renamed the methods between versions."""
    if case.family == "timm":
        set_reentrant_ckpt(bool(reentrant))
        tower.set_grad_checkpointing(reentrant is not None)
    elif case.family == "remote":
        tower.encoder.gradient_checkpointing = reentrant is not None
        tower.encoder.checkpoint_options.use_reentrant = reentrant
    else:
        verb = "disable" if reentrant is None else "enable"
        switch = getattr(tower, f"activation_checkpointing_{verb}", None) or getattr(
            tower, f"gradient_checkpointing_{verb}"
        )
        switch(*([] if reentrant is None else [{"use_reentrant": reentrant}]))
