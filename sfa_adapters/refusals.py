"""Towers and hosts that are known and carry no bias: why, and what to do instead.

`find_tower` asks here when no registered backbone fits. A model that nobody wrote an entry for is refused with the list
of its attention modules, since somebody may add a record for it; these need no record.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sfa_adapters.class_names import matches

__all__ = ["REFUSALS", "KnownRefusal", "Refusal", "has_attention", "refusal_of"]


@dataclass(frozen=True)
class Refusal:
    """Why one kind of model carries no bias.

    Attributes:
        name: Unique name of the kind.
        classes: Patterns over `module.Class`, of the tower, or of the host where there is no tower.
        reason: Why, as a sentence about the module.
        advice: What to do.
        attends: Whether there is vision attention at all.
    """

    name: str
    classes: tuple[str, ...]
    reason: str
    advice: str
    attends: bool = True


@dataclass(frozen=True)
class KnownRefusal:
    """A module of a model that is known to carry no bias.

    Attributes:
        path: Its path in the model, "" for the model itself.
        kind: Name of its class.
        refusal: Why.
    """

    path: str
    kind: str
    refusal: Refusal

    def __str__(self) -> str:
        where = f"{self.path} is a {self.kind}" if self.path else f"It is a {self.kind}"
        return f"{where}: {self.refusal.reason} {self.refusal.advice}"


def _transformers(*names: str) -> tuple[str, ...]:
    """Patterns of classes of transformers, each "folder.Class"."""
    parts = (name.split(".") for name in names)
    return tuple(f"transformers.models.{folder}.*.{kind}" for folder, kind in parts)


def _timm(*names: str) -> tuple[str, ...]:
    """Patterns of classes of timm, each "file.Class"."""
    return tuple(f"timm.models.{name}" for name in names)


ANOTHER_TOWER = (
    "For SFA take a host whose tower attends over whole images, such as Qwen3-VL, Gemma 4, InternVL or a SigLIP host "
    "(docs/backbones.md lists them)."
)
LORA = "Fine-tune it with PEFT's LoRA alone. "

RELATIVE_BIAS = Refusal(
    "relative bias",
    _transformers(
        "sam.SamVisionEncoder", "sam_hq.SamHQVisionEncoder", "got_ocr2.GotOcr2VisionEncoder",
        "pp_formulanet.PPFormulaNetVisionModel", "slanext.SLANeXtVisionEncoder",
        "deepseek_ocr2.DeepseekOcr2SamVisionEncoder", "unlimited_ocr.UnlimitedOcrSamVisionEncoder",
    ) + _timm("vision_transformer_sam.VisionTransformerSAM", "vision_transformer_relpos.VisionTransformerRelPos"),
    "its attention has a learned bias over relative rows and columns already, which is what SFA would add.",
    "Nothing is missing there: train that bias (rel_pos_h and rel_pos_w; rel_pos in timm) beside LoRA. "
    + ANOTHER_TOWER,
)  # fmt: skip
WINDOWED_BIAS = Refusal(
    "relative bias in windows",
    _transformers(
        "swin.SwinModel", "swin.SwinBackbone", "swinv2.Swinv2Model", "swinv2.Swinv2Backbone", "swin2sr.Swin2SRModel",
        "donut.DonutSwinModel", "maskformer.MaskFormerSwinModel", "dinat.DinatModel", "levit.LevitModel",
    ) + _timm(
        "swin_transformer.SwinTransformer", "swin_transformer_v2.SwinTransformerV2", "maxxvit.MaxxVit",
        "swin_transformer_v2_cr.SwinTransformerV2Cr", "gcvit.GlobalContextVit", "mvitv2.MultiScaleVit",
        "levit.Levit", "tiny_vit.TinyVit", "efficientvit_msra.EfficientVitMsra", "efficientformer.EfficientFormer",
        "efficientformer_v2.EfficientFormerV2",
    ),
    "it attends inside small windows or on coarse maps, under a learned bias over relative positions of its own, which "
    "is what SFA would add.",
    "Nothing is missing there: that bias trains with the model (relative_position_bias_table in Swin and Donut). "
    + LORA + ANOTHER_TOWER,
)  # fmt: skip
POOLED = Refusal(
    "pooled attention",
    _transformers(
        "hiera.HieraModel", "hiera.HieraBackbone", "sam2.Sam2HieraDetModel", "segformer.SegformerModel",
        "pvt.PvtModel", "pvt_v2.PvtV2Model", "pvt_v2.PvtV2Backbone", "cvt.CvtModel", "glpn.GLPNModel",
    ) + _timm("hiera.Hiera", "hieradet_sam2.HieraDet", "pvt_v2.PyramidVisionTransformerV2", "twins.Twins"),
    "it pools queries or keys inside its attention, so that they lie on different grids, and the bias is one of a grid "
    "with itself.",
    LORA + ANOTHER_TOWER,
)  # fmt: skip
CHANNELS = Refusal(
    "windows and channels",
    _transformers("florence2.Florence2VisionBackbone") + _timm("davit.DaVit", "xcit.Xcit", "edgenext.EdgeNeXt"),
    "its attention runs over channels, or inside windows that it cuts itself and gives no mask; channels have no "
    "distance on the page.",
    LORA + ANOTHER_TOWER,
)
MIXED_HEADS = Refusal(
    "mixed heads",
    _timm("cait.Cait", "convit.ConVit"),
    "its attention mixes the logits of all heads, or gates them by position, around a softmax written by hand without "
    "a mask, so that a bias would not stay with its head.",
    LORA + "In timm take a plain ViT, an Eva or a NaFlexVit (vit_*, eva02_*, naflexvit_*).",
)
VIDEO = Refusal(
    "video",
    _transformers("vjepa2.VJEPA2Model", "videoprism.VideoPrismVisionModel"),
    "its tokens are patches through several frames, which attend to one another over time, and its attention takes no "
    "mask; the bias knows rows and columns of one page.",
    "For images take an image tower, such as DINOv2, SigLIP or Perception Encoder (docs/backbones.md lists them).",
)
HYBRID = Refusal(
    "convolutions with attention behind",
    _transformers("mobilevit.MobileViTModel", "mobilevitv2.MobileViTV2Model", "swiftformer.SwiftFormerModel")
    + _timm("fastvit.FastVit", "mobilenetv5.MobileNetV5*", "mobilevit.*", "nextvit.NextViT", "swiftformer.SwiftFormer")
    + _timm("metaformer.MetaFormer"),
    "it is a convolutional network; where its last stages attend, they do so on coarse feature maps and not on a "
    "sequence of patches.",
    LORA + ANOTHER_TOWER,
)
CUT_WINDOWS = Refusal(
    "windows without a bias",
    _transformers("sam3.Sam3ViTModel"),
    "most of its layers attend inside windows that it cuts out of the map, with padding and without a mask; rows "
    "and columns of a page end at their borders.",
    LORA + ANOTHER_TOWER,
)
NO_PAGE = Refusal(
    "tokens that are no patches",
    _transformers("imagegpt.ImageGPTModel", "perceiver.PerceiverModel"),
    "its tokens are single pixels that see only earlier ones (ImageGPT), or latents without a place (Perceiver).",
    LORA + ANOTHER_TOWER,
)
CONVOLUTIONS = Refusal(
    "no attention",
    ("transformers.modeling_utils.PreTrainedModel", "timm.models.*"),
    "it has no attention, only convolutions or other mixing layers, and SFA is a bias on the logits of attention.",
    LORA + ANOTHER_TOWER,
    attends=False,
)
DISCRETE = Refusal(
    "discrete image tokens",
    _transformers("chameleon.ChameleonVQVAE", "emu3.Emu3VQVAE", "apertus1p5.Apertus1p5VisionTokenizerModel"),
    "a convolutional autoencoder, without a vision transformer, turns images into discrete tokens, which the language "
    "model then reads like words.",
    ANOTHER_TOWER,
    attends=False,
)
NO_TOWER = Refusal(
    "no vision tower",
    _transformers(
        "fuyu.FuyuPreTrainedModel", "gemma4_unified.Gemma4UnifiedPreTrainedModel", "inkling.InklingPreTrainedModel"
    ),
    "it has no vision attention: patches are embedded by linear layers and go straight into the language model.",
    "SFA adapts vision towers only. " + ANOTHER_TOWER,
    attends=False,
)
NO_IMAGES = Refusal(
    "no images",
    _transformers("mistral4.Mistral4PreTrainedModel", "evolla.EvollaPreTrainedModel"),
    "it reads no images (Mistral 4 is text only, Evolla reads proteins).",
    "Pass a vision-language model, or a vision tower.",
    attends=False,
)
DOCUMENT_ENCODER = Refusal(
    "layout in the text encoder",
    _transformers("udop.UdopPreTrainedModel", "layoutlmv2.LayoutLMv2Model"),
    "words and patches share one encoder, whose attention has learned biases over horizontal and vertical distance "
    "already.",
    "Nothing is missing there: those biases train with the model. " + ANOTHER_TOWER,
    attends=False,
)

REFUSALS = (
    RELATIVE_BIAS, WINDOWED_BIAS, POOLED, CHANNELS, MIXED_HEADS, CUT_WINDOWS, VIDEO, HYBRID, DISCRETE, NO_PAGE,
    NO_TOWER, NO_IMAGES, DOCUMENT_ENCODER, CONVOLUTIONS,
)  # fmt: skip


def has_attention(module: nn.Module) -> bool:
    """Whether a module, or one inside it, is called attention by its class or its name."""
    named = module.named_modules()
    return any("attention" in type(m).__name__.lower() or "attn" in n.rpartition(".")[2].lower() for n, m in named)


def refusal_of(model: nn.Module) -> KnownRefusal | None:
    """The first module of a model, from the outside, that is known to carry no bias; None where none is known.

    Args:
        model: A tower, or a host.
    """
    modules = list(model.named_modules())
    for name, module in modules:
        for refusal in REFUSALS:
            if refusal is not CONVOLUTIONS and matches(module, refusal.classes):
                return KnownRefusal(name, type(module).__name__, refusal)
    for name, module in modules:
        # A patch embedding has no attention either: only whole models count.
        whole = not name or matches(module, CONVOLUTIONS.classes[:1])
        if whole and matches(module, CONVOLUTIONS.classes) and _convolves(module) and not has_attention(module):
            return KnownRefusal(name, type(module).__name__, CONVOLUTIONS)
    return None


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv2d) for child in module.modules())
