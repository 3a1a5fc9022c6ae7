"""What the towers with one grid for all images refuse, and the hosts around some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sfa_adapters import describe, eject_sfa, inject_sfa
from sfa_adapters.errors import LayoutError, UnsupportedAttentionError
from sfa_adapters.registry import Backbone, Geometry
from sfa_adapters.testing.cases import images, lively
from sfa_adapters.tower_search import find_tower
from tests.support import compare

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
PIXELS = images(56, 56)(0)["pixel_values"]


def eva(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": 64}
    return timm.create_model("eva02_tiny_patch14_224", num_classes=0, init_values=1.0, **{**sizes, **options})


def open_clip_tower(**options: Any) -> Any:
    transformer = pytest.importorskip("open_clip.transformer")
    return transformer.VisionTransformer(56, 14, 32, 2, 4, 2.0, output_dim=32, **options)


def sequence_first() -> nn.Module:
    tower = open_clip_tower()
    tower.transformer.batch_first = False
    return tower


def words_only() -> nn.Module:
    config = transformers.LayoutLMv3Config(**SMALL, visual_embed=False, coordinate_size=6, shape_size=4)
    return transformers.LayoutLMv3Model(config)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: eva(patch_drop_rate=0.5), r"Eva drops patches in training.*patch_drop_rate=0\.5.*patch_drop_rate=0\."),
        (lambda: open_clip_tower(patch_dropout=0.5), r"drops patches in training.*Build it with patch_dropout=0\."),
        (sequence_first, "batch_first=False.*batch_first=True"),
        (words_only, "no image part.*visual_embed=True"),
    ],
    ids=["eva", "open_clip", "sequence first", "words"],
)
def test_towers_whose_tokens_cannot_be_placed_are_refused(build: Callable[[], nn.Module], text: str):
    tower = build()
    snapshot = compare.Snapshot(tower)
    with pytest.raises(UnsupportedAttentionError, match=text):
        inject_sfa(tower)
    snapshot.assert_unchanged(tower)


def test_mae_needs_its_random_numbers():
    tower: Any = inject_sfa(transformers.ViTMAEModel(transformers.ViTMAEConfig(**SMALL)))
    with pytest.raises(LayoutError, match=r"draws inside.*noise=torch\.rand\(images, patches\)"):
        tower(PIXELS)
    assert tower(PIXELS, noise=torch.rand(2, 16)).last_hidden_state.shape == (2, 5, 32)


@pytest.mark.parametrize(("number", "tiles"), [(9, 4), (-1, 4), (6, 2)])
def test_mllama_refuses_tiles_that_it_does_not_know(number: int, tiles: int):
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
    from transformers.models.mllama.modeling_mllama import MllamaVisionModel

    options: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MllamaVisionConfig(
        **options, num_global_layers=1, attention_heads=4, image_size=28, patch_size=14, intermediate_layers_indices=[0]
    )
    tower: Any = inject_sfa(MllamaVisionModel(config))
    with pytest.raises(LayoutError, match=rf"aspect_ratio_ids has {number}; ids are 0 .* to 8.*{tiles} tiles"):
        tower(torch.randn(1, 1, tiles, 3, 28, 28), torch.tensor([[number]]), torch.ones(1, 1, tiles))


def test_words_alone_have_no_place():
    """A LayoutLMv3 without an image computes what it does without SFA."""
    config = transformers.LayoutLMv3Config(**SMALL, input_size=56, vocab_size=50, coordinate_size=6, shape_size=4)
    model: Any = lively(lambda: transformers.LayoutLMv3Model(config))()
    words = {"input_ids": torch.tensor([[3, 4, 5]]), "bbox": torch.tensor([[[0, 0, 10, 10]] * 3])}
    with torch.no_grad():
        plain = model(**words).last_hidden_state
        inject_sfa(model, compare.strong_config())
        assert torch.allclose(model(**words).last_hidden_state, plain, atol=1e-6)
        with_image = model(**words, pixel_values=PIXELS[:1]).last_hidden_state
        eject_sfa(model)
        assert compare.difference(model(**words, pixel_values=PIXELS[:1]).last_hidden_state, with_image) > 1e-2


class Attention(nn.Module):
    """Stands for a class of attention that is used in several ways."""


def test_of_nested_attention_modules_the_inner_one_is_taken_and_paths_choose():
    tower = nn.ModuleDict({"layers": nn.ModuleList(nn.Module() for _ in range(2)), "pool": Attention()})
    for layer in tower["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
        layer.attention, layer.frames = Attention(), Attention()
        layer.attention.inner = Attention()
    options: Any = {"name": "nested", "towers": (), "attentions": ("*.Attention",), "layouts": lambda *_: None}
    options["geometry"] = lambda tower: Geometry(grid=None, prefix_tokens=0)
    every = Backbone(**options).attentions_of(tower)
    assert [path for path, _ in every] == [f"layers.{n}.{x}" for n in (0, 1) for x in ("attention.inner", "frames")] + [
        "pool"
    ]
    chosen = Backbone(**options, attention_paths=("layers.*.attention*",)).attentions_of(tower)
    assert [path for path, _ in chosen] == ["layers.0.attention.inner", "layers.1.attention.inner"]


# -- hosts -------------------------------------------------------------------------------------------------------------


def test_the_tower_in_a_timm_wrapper_of_transformers():
    """As in PerceptionLM: the timm model is the tower, reached by forward_features."""
    pytest.importorskip("timm")
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": 56, "patch_size": 14, "init_values": 1.0}
    config = transformers.TimmWrapperConfig(architecture="eva02_tiny_patch14_224", model_args=sizes, do_pooling=False)
    model: Any = lively(lambda: transformers.TimmWrapperModel(config))()
    plain = model(PIXELS).last_hidden_state
    inject_sfa(model, compare.strong_config())
    info = describe(model)
    assert (info.tower, info.backbone, info.num_layers, info.grid) == ("timm_model", "timm_eva", 2, (4, 4))
    assert compare.difference(model(PIXELS).last_hidden_state, plain) > 1e-2
    eject_sfa(model)
    assert torch.equal(model(PIXELS).last_hidden_state, plain)


def test_the_encoder_of_a_vision_encoder_decoder():
    decoder = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    encoder = transformers.DeiTConfig(**SMALL)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model: Any = lively(lambda: transformers.VisionEncoderDecoderModel(config))()
    inject_sfa(model, compare.strong_config())
    assert find_tower(model).name == "encoder"
    assert describe(model).prefix_tokens == 2
    compare.freeze_base(model)
    model(PIXELS, decoder_input_ids=torch.tensor([[1, 2], [3, 4]])).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in compare.structural(model).values())
