"""Which towers of the installed libraries the library takes: built from their default configurations, without weights.

Every image-text host of transformers, its vision models and a choice of timm's are built on the meta device, and
`find_tower` is asked about each. A tower counts as checked where the contract suite has a small tower of its class; the
rest is refused, with the reason that a user gets. New types that a release of transformers brings show up by
themselves. `scripts/draw-backbones` writes docs/backbones.md from it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from sfa_adapters.class_names import qualified_name
from sfa_adapters.errors import InjectionError, SFAError
from sfa_adapters.refusals import refusal_of
from sfa_adapters.registry import registered_backbones
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.registered import towers_or_reasons
from sfa_adapters.tower_search import FoundTower, find_tower

__all__ = [
    "Entry",
    "Verdict",
    "build_host",
    "build_timm",
    "build_vision_model",
    "checked_classes",
    "hosts",
    "survey",
    "timm_models",
    "vision_models",
]

# works      a registered backbone takes it, and the contract suite checks a small tower of its class
# unchecked  a registered backbone takes it, and nobody checks that the bias is exact there
# refused    it has vision attention, and the library raises an error with a reason
# none       it has no vision attention to bias
# unbuilt    its default configuration cannot be built, so nothing is known
Verdict = Literal["works", "unchecked", "refused", "none", "unbuilt"]

# Default configurations that cannot be built as they are, or have no tower: what to add. Only the tower matters here.
PERCEPTION_ENCODER = {
    "embed_dim": 1024, "depth": 2, "img_size": [448, 448], "global_pool": "", "use_post_transformer_norm": False,
    "init_values": 0.1, "ref_feat_shape": [32, 32],
}  # fmt: skip
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
ADDITIONS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROTARY}}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * 2, "num_hidden_layers": 2}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64, "num_hidden_layers": 6},
    },
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "gemma4": {"vision_config": {}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336",
            "model_args": PERCEPTION_ENCODER,
        },
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
            "indexer_compress_ratio": 64,
        },
    },
}  # fmt: skip
# Towers of timm: one of each class or kind that people use.
TIMM = (
    "vit_base_patch16_224", "vit_base_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224",
    "vit_intern300m_patch14_448", "vit_large_patch14_clip_336", "vit_so400m_patch14_siglip_384",
    "deit_base_patch16_224",
    "vit_base_patch16_rope_224", "vit_pe_core_base_patch16_224", "eva02_base_patch14_224", "eva_giant_patch14_clip_336",
    "vit_base_patch16_dinov3", "naflexvit_base_patch16_siglip", "beit_base_patch16_224",
    "vit_relpos_base_patch16_224", "vit_base_patch16_rpn_224", "samvit_base_patch16", "cait_s24_224",
    "swin_tiny_patch4_window7_224",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What was seen of one type.

    Attributes:
        name: Its `model_type`, or the name in timm.
        verdict: See `Verdict`.
        tower: Class of its tower; "" where none was found.
        path: Where the tower lies in the host.
        backbone: Name of the record that takes it.
        joined: How its images are put together.
        reason: Why it is refused, or cannot be built; one line.
    """

    name: str
    verdict: Verdict
    tower: str = ""
    path: str = ""
    backbone: str = ""
    joined: str = ""
    reason: str = ""


def survey(
    names: Iterable[str], build: Callable[[str], nn.Module], checked: set[str], only_vision: bool = False
) -> list[Entry]:
    """What the library says to each type.

    Args:
        names: The types.
        build: Builds one; called on the meta device.
        checked: Qualified names of the classes that the contract suite checks.
        only_vision: Whether all that a model has is a vision model, so that any attention in it is vision attention.
    """
    with _quiet():
        return [_entry(name, build, checked, only_vision) for name in names]


def _entry(name: str, build: Callable[[str], nn.Module], checked: set[str], only_vision: bool) -> Entry:
    try:
        with torch.device("meta"):
            model = build(name)
    except Exception as error:  # whatever a default configuration of somebody else raises
        return Entry(name, "unbuilt", reason=_line(error))
    try:
        towers = _towers(model)
    except SFAError as error:
        return Entry(name, "refused" if _attends(model, only_vision) else "none", reason=_line(error))
    first = towers[0]
    if any(tower.backbone.check is not None for tower in towers):
        try:
            for tower in towers:
                if tower.backbone.check is not None:
                    tower.backbone.check(tower.tower)
        except SFAError as error:
            return Entry(
                name, "refused", type(first.tower).__name__, first.name, first.backbone.name, reason=_line(error)
            )
    known = all(qualified_name(tower.tower) in checked for tower in towers)
    return Entry(
        name,
        "works" if known else "unchecked",
        " and ".join(dict.fromkeys(type(tower.tower).__name__ for tower in towers)),
        ", ".join(tower.name for tower in towers),
        " and ".join(dict.fromkeys(tower.backbone.name for tower in towers)),
        " and ".join(dict.fromkeys(tower.backbone.joined for tower in towers)),
    )


def _towers(model: nn.Module) -> list[FoundTower]:
    """The tower of a model, or all of them where it has several."""
    try:
        return [find_tower(model)]
    except InjectionError as error:
        backbones = registered_backbones().values()
        paths = [path for path, module in model.named_modules() if any(b.is_tower(module) for b in backbones)]
        outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
        if len(outer) < 2:
            raise
        try:
            return [find_tower(model, path) for path in outer]
        except SFAError:
            raise error from None


def _attends(model: nn.Module, only_vision: bool) -> bool:
    """Whether a model has vision attention: by the reason for its refusal, else by the names of its modules."""
    known = refusal_of(model)
    if known is not None:
        return known.refusal.attends
    words = ("vision", "visual", "image", "vit", "encoder", "sam", "patch", "pixel")
    return any(
        ("attention" in type(module).__name__.lower() or name.endswith("attn"))
        and (only_vision or any(word in f"{name}.{type(module).__name__}".lower() for word in words))
        for name, module in model.named_modules()
    )


def _line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, SFAError) else f"{type(error).__name__}: {text}"


def checked_classes() -> set[str]:
    """Qualified names of the tower classes that the contract suite has a small tower of."""
    entries = towers_or_reasons(runs=("everything", "bias", "nightly"))
    with _quiet():
        return {qualified_name(entry.build()) for entry in entries if isinstance(entry, TowerCase)}


# -- what is built ----------------------------------------------------------------------------------------------------


def hosts() -> list[str]:
    """`model_type` of every image-text host of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def build_host(name: str) -> nn.Module:
    """A host from its default configuration, with two layers of language model."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    config = _configuration(name)
    _shorten(getattr(config, "text_config", None))
    # By the name of its class: the automatic class does not know the configurations of all types in its own table.
    return getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])._from_config(config)


def vision_models() -> list[str]:
    """`model_type` of every model of the installed transformers that takes images and nothing else."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    vision = {name for name in list(CONFIG_MAPPING) if name.endswith(("_vision_model", "_vision"))}
    every = (vision | set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)) & set(MODEL_MAPPING_NAMES)
    return sorted(every - set(hosts()))


def build_vision_model(name: str) -> nn.Module:
    """A vision model from its default configuration."""
    from transformers import AutoModel

    return AutoModel.from_config(_configuration(name))


def timm_models() -> list[str]:
    """The models of timm that are looked at; empty without timm."""
    if find_spec("timm") is None:
        return []
    import timm

    return [name for name in TIMM if timm.is_model(name)]


def build_timm(name: str) -> nn.Module:
    """A model of timm."""
    import timm

    return timm.create_model(name)


def _configuration(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**ADDITIONS.get(name, {}))


def _shorten(text: Any) -> None:
    """Two layers of language model are enough to find the tower."""
    if text is None or not isinstance(getattr(text, "num_hidden_layers", None), int):
        return
    kinds = getattr(text, "layer_types", None)
    if isinstance(kinds, list):
        if len(set(kinds[:2])) < len(set(kinds)):
            return  # some models want one layer of each kind
        text.layer_types = kinds[:2]
    text.num_hidden_layers = 2


@contextmanager
def _quiet() -> Iterator[None]:
    """Default configurations warn and log a good deal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
