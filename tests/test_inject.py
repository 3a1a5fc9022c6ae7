"""Every mistake gets a named error that says what was found, and leaves the model as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from sfa_adapters import (
    SFAAttention,
    SFAConfig,
    SFAError,
    StructuralBias,
    TokenLayout,
    describe,
    eject_sfa,
    inject_sfa,
    load_sfa,
    register_backbone,
    save_sfa,
)
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import (
    AdapterMismatchError,
    InjectionError,
    LayoutError,
    MergeError,
    NoMatchingBackboneError,
    UnsupportedAttentionError,
    WeightsError,
)
from sfa_adapters.layer import SFALayer
from sfa_adapters.registry import Backbone, registered_backbones
from sfa_adapters.testing.modeling_intern_vit import InternVisionConfig, InternVisionModel
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.towers import CASES, TowerCase, every_tower

CLIP, SIGLIP = (next(case for case in CASES if case.name == name) for name in ("clip", "siglip"))
WAYS = pytest.mark.parametrize("way", [inject_sfa, get_peft_model], ids=["inject", "peft"])


def refused(model: nn.Module, error: type[Exception], text: str, act: Callable[[], Any]) -> None:
    """The error is raised, is one of ours, and the model is as before in every respect."""
    snapshot = compare.Snapshot(model)
    with pytest.raises(error, match=text) as raised:
        act()
    assert isinstance(raised.value, SFAError)
    snapshot.assert_unchanged(model)


@WAYS
def test_a_model_without_a_known_tower(way: Any):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
    seen = r"MultiheadAttention: 2 modules, e\.g\. layers\.0\.self_attn"
    text = rf"(?s)No registered backbone fits TransformerEncoder\. Registered: .*clip.*{seen}.*register_backbone"
    refused(model, NoMatchingBackboneError, text, lambda: way(model, SFAConfig()))
    refused(model, ValueError, "No registered backbone", lambda: way(model, SFAConfig()))


@WAYS
def test_two_towers_in_one_model(way: Any):
    model = nn.ModuleDict({"left": CLIP.build(), "right": SIGLIP.build()})
    text = r"several vision towers: left \(clip\), right \(siglip\)"
    refused(model, InjectionError, text, lambda: way(model, SFAConfig()))
    inject_sfa(model["right"])
    assert [name.split(".")[0] for name, _, _ in injected_layers(model)] == ["right"] * 3


@WAYS
@pytest.mark.parametrize("layers", [3, -4, [0, 7], []])
def test_unknown_layers(way: Any, layers: Any):
    model = CLIP.build()
    text = r"layers_to_transform=.* must name layers of the tower, 0\.\.2"
    refused(model, InjectionError, text, lambda: way(model, SFAConfig(layers_to_transform=layers)))


def test_a_layer_named_twice():
    model = CLIP.build()
    act = lambda: inject_sfa(model, SFAConfig(layers_to_transform=[0, -3]))  # noqa: E731
    refused(model, InjectionError, "names a layer twice", act)


@every_tower
def test_injecting_twice_under_one_name(case: TowerCase):
    model, inputs = compare.injected(case)
    expected = compare.read(case, model, inputs)
    refused(model, InjectionError, "already has an SFA adapter named 'default'", lambda: inject_sfa(model))
    assert torch.equal(compare.read(case, model, inputs), expected)


def test_ejecting_what_is_not_there():
    model = CLIP.build()
    refused(model, InjectionError, "CLIPVisionModel has no SFA adapter", lambda: eject_sfa(model))
    inject_sfa(model)
    text = r"no SFA adapter named 'forms'; adapters: \['default'\]"
    refused(model, InjectionError, text, lambda: eject_sfa(model, "forms"))
    refused(model, InjectionError, "no SFA adapter named 'forms' to save", lambda: save_sfa(model, "never", "forms"))


@every_tower
@WAYS
@pytest.mark.parametrize(("adapters_before", "failing"), [(0, 1), (0, 3), (2, 2)])
def test_an_error_in_the_middle_of_injection(
    case: TowerCase, way: Any, adapters_before: int, failing: int, monkeypatch: pytest.MonkeyPatch
):
    model, inputs = case.fresh()
    for number in range(adapters_before):  # the last one is active, not the first in the alphabet
        inject_sfa(model, compare.strong_config(), adapter_name=f"before{number}")
    expected, snapshot = compare.read(case, model, inputs), compare.Snapshot(model)
    update, calls = SFALayer.update_layer, []

    def fail(layer: SFALayer, *args: Any) -> None:
        calls.append(layer)
        if len(calls) == failing:
            raise MemoryError("no room for one more layer")
        update(layer, *args)

    monkeypatch.setattr(SFALayer, "update_layer", fail)
    way = PeftModel if way is get_peft_model else way  # get_peft_model warns where adapters are
    with pytest.raises(MemoryError, match="no room"):
        way(model, SFAConfig(), adapter_name="broken")
    assert len(calls) == failing
    snapshot.assert_unchanged(model)
    assert torch.equal(compare.read(case, model, inputs), expected)
    monkeypatch.undo()
    assert describe(inject_sfa(model, adapter_name="second try")).num_layers == case.layers


# -- saved adapters ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_sfa(compare.injected(CLIP)[0], tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def both_loaders_refuse(folder: Path, text: str, case: TowerCase = CLIP) -> None:
    for load in (load_sfa, PeftModel.from_pretrained):
        model = case.build()
        refused(model, AdapterMismatchError, text, lambda load=load, model=model: load(model, folder))


def test_an_adapter_of_a_newer_format(saved: Path):
    edit(saved, format_version=2)
    both_loaders_refuse(saved, r"format_version=2; this version of sfa-adapters reads up to 1\. Upgrade")


def test_an_adapter_of_another_tower(saved: Path):
    both_loaders_refuse(saved, "belongs to another tower.*backbone: adapter 'clip', model 'siglip'", SIGLIP)
    edit(saved, tower={**json.loads((saved / "adapter_config.json").read_text())["tower"], "num_heads": 8})
    both_loaders_refuse(saved, "num_heads: adapter 8, model 4")


def test_an_adapter_whose_tensors_do_not_fit(saved: Path):
    edit(saved, block_grid=[2, 2], num_blocks=4)
    model = CLIP.build()
    text = r"sfa_block needs \(4, 4\), found shape \(4, 16\)"
    refused(model, AdapterMismatchError, text, lambda: load_sfa(model, saved))


def test_a_refused_file_leaves_other_adapters_active(saved: Path):
    model, inputs = CLIP.fresh()
    for name in ("first", "second"):
        inject_sfa(model, compare.strong_config(), adapter_name=name)
    expected = compare.read(CLIP, model, inputs)
    edit(saved, block_grid=[2, 2], num_blocks=4)
    refused(model, AdapterMismatchError, "sfa_block needs", lambda: load_sfa(model, saved))
    assert describe(model).active == ("second",)
    assert torch.equal(compare.read(CLIP, model, inputs), expected)


def test_loading_under_a_taken_name_keeps_the_adapter_that_has_it(saved: Path):
    model = inject_sfa(CLIP.build(), compare.strong_config())
    refused(model, InjectionError, "already has an SFA adapter named 'default'", lambda: load_sfa(model, saved))
    assert describe(model).active == ("default",)


def test_an_adapter_with_tensors_for_more_layers(saved: Path):
    edit(saved, layers_to_transform=[0])
    model = CLIP.build()
    refused(
        model,
        AdapterMismatchError,
        r"SFA scalars for 3 layers .*the adapter here has 1 ",
        lambda: load_sfa(model, saved),
    )


def test_a_folder_without_weights(saved: Path):
    (saved / "adapter_model.safetensors").unlink()
    model = CLIP.build()
    refused(model, WeightsError, "has no adapter_model.safetensors", lambda: load_sfa(model, saved))
    refused(model, WeightsError, r"has no adapter_config\.json", lambda: load_sfa(model, saved / "nowhere"))


# -- towers that cannot carry a bias -----------------------------------------------------------------------------------


@WAYS
def test_remote_flash_attention(way: Any):
    model = InternVisionModel(InternVisionConfig(use_flash_attn=True))
    text = r"encoder\.layers\.0\.attn runs its own flash attention \(use_flash_attn=True\).*use_flash_attn=False"
    refused(model, UnsupportedAttentionError, text, lambda: way(model, SFAConfig()))


def test_merging_is_refused():
    model: Any = get_peft_model(CLIP.build(), SFAConfig())  # pyright: ignore[reportArgumentType]
    refused(model, MergeError, "cannot be merged", model.merge_adapter)
    refused(model, MergeError, "cannot be merged", model.merge_and_unload)
    refused(model, NotImplementedError, "Keep the adapter attached", model.base_model.merge_and_unload)
    assert describe(model).num_layers == 3


def test_tokens_that_are_no_known_grid():
    model, _ = compare.injected(CLIP)
    layer: Any = injected_layers(model)[0][1]
    with pytest.raises(LayoutError, match=r"clip layer got 12 tokens; the tower's grids have 4x4\+1=17"):
        layer(torch.randn(1, 12, 32), None)
    qwen = compare.injected(next(case for case in CASES if case.backbone == "qwen2_5_vit"))[0]
    layer = injected_layers(qwen)[0][1]
    with pytest.raises(LayoutError, match="12 tokens that bypassed the forward of its tower"):
        layer(torch.randn(12, 32), cu_seqlens=torch.tensor([0, 12]), position_embeddings=None)


def test_adapters_with_different_partitions_cannot_act_together():
    from peft.functional import set_adapter

    model, inputs = compare.injected(CLIP)
    inject_sfa(model, SFAConfig.published(block_grid=(2, 8)), adapter_name="other")
    set_adapter(model, ["default", "other"])
    with pytest.raises(LayoutError, match="cut the page into different blocks"):
        compare.read(CLIP, model, inputs)


@pytest.mark.parametrize("order", [("default", "rows"), ("rows", "default")])
def test_blocks_of_an_adapter_without_the_block_term_do_not_matter(order: tuple[str, str]):
    from peft.functional import set_adapter

    alone, inputs = compare.injected(CLIP, block_grid=(2, 8))
    both, _ = compare.injected(CLIP, block_grid=(2, 8))
    inject_sfa(both, compare.strong_config(terms=["row"], init_std=0.0), adapter_name="rows")
    set_adapter(both, list(order))
    assert torch.equal(compare.read(CLIP, both, inputs), compare.read(CLIP, alone, inputs))


def test_without_the_block_term_a_layout_may_have_any_blocks():
    layout = TokenLayout.regular(6, 6, block_map=torch.arange(36).view(6, 6))
    assert StructuralBias(2)(layout).shape == (1, 2, 36, 36)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"terms": ["row", "diagonal"]}, r"terms=.* must name at least one of .*unknown: \['diagonal'\]"),
        ({"terms": []}, "must name at least one of"),
        ({"terms": "row"}, r"terms='row' must be a list, e\.g\. terms=\['row'\]"),
        ({"backend": "flash"}, r"backend='flash' must be one of \['auto', 'dense', .*, 'triton'\]"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"num_blocks": 10}, r"num_blocks=10 is not a square.*block_grid"),
        ({"num_blocks": 8, "block_grid": (3, 3)}, "num_blocks=8 is too few for the 9 blocks"),
        ({"block_grid": (0, 4)}, r"block_grid=\(0, 4\) must be two numbers of at least 1"),
        ({"block_grid": (2, 2), "block_map": [[0]]}, "block_map and block_grid=.* exclude each other"),
        ({"block_map": [[0, -1]]}, r"block_map is not a map.*Block ids start at 0"),
        ({"block_map": [[0.5]]}, "block_map is not a map"),
        ({"block_map": [[0], [1, 2]]}, "block_map is not a map"),
        ({"block_map": [[0, 5]], "num_blocks": 5}, "num_blocks=5 is too few for the 6 blocks"),
        ({"block_grid": (2, 8)}, r"block_grid=\(2, 8\) belongs to the term block, .* terms=\['row', 'col', 'block'\]"),
        ({"num_blocks": 9, "terms": ["dist"]}, r"block_grid=\(3, 3\) belongs to the term block, which is off"),
        ({"num_blocks": 20, "block_grid": (4, 4)}, r"num_blocks=20 belongs to the term block"),
        ({"block_map": [[0, 1]]}, r"block_map belongs to the term block"),
        ({"init_std": -0.1}, "init_std=-0.1 must be a number of at least 0"),
        ({"init_std": float("nan")}, "init_std=nan"),
        ({"mask_cache_mb": -1}, "mask_cache_mb=-1 must be at least 0"),
    ],
)
def test_wrong_options_name_the_field_and_the_value(options: dict[str, Any], text: str):
    with pytest.raises(InjectionError, match=text):
        SFAConfig(**options)


def test_options_of_layers_that_people_build_themselves():
    with pytest.raises(InjectionError, match="num_heads=3 must divide dim=32"):
        SFAAttention(32, num_heads=3)
    with pytest.raises(InjectionError, match="num_heads=0"):
        SFAAttention(32, num_heads=0)
    with pytest.raises(LayoutError, match="needs a layout"):
        SFAAttention(32, num_heads=4)(torch.zeros(1, 4, 32))
    with pytest.raises(LayoutError, match=r"layout has 4 tokens \(grid \(2, 2\), 0 prefix\), but the attention sees 5"):
        SFAAttention(32, num_heads=4, grid=(2, 2))(torch.zeros(1, 5, 32))
    with pytest.raises(InjectionError, match="num_heads=0 must be at least 1"):
        StructuralBias(0)
    with pytest.raises(LayoutError, match=r"block id 15, but the bias has num_blocks=4"):
        StructuralBias(2, num_blocks=4, terms=TERMS)(TokenLayout.regular(4, 4))
    with pytest.raises(InjectionError, match=r"num_blocks=4 belongs to the term block, which is off"):
        StructuralBias(2, num_blocks=4)


def test_layouts_that_cannot_be():
    one = torch.ones(1)
    for act, text in (
        (lambda: TokenLayout.regular(0, 3), "A layout needs tokens"),
        (lambda: TokenLayout.regular(-1, 3), "A layout needs tokens"),
        (lambda: TokenLayout.regular(2, 2, block_map=torch.tensor([0.0])), "block_map must be a non-empty"),
        (lambda: TokenLayout.from_boxes(one, one, one / 2, (4, 4)), "at least 1 finest cell; the smallest is 0.5"),
        (lambda: TokenLayout.from_boxes(3 * one, one, 2 * one, (4, 4)), "outside the 4x4 grid"),
        (lambda: TokenLayout.from_boxes(one, torch.ones(2), one, (4, 4)), r"\(1,\), column \(2,\)"),
        (lambda: TokenLayout.batch([]), "at least one layout"),
        (lambda: TokenLayout.batch([TokenLayout.regular(1, 1, n) for n in (0, 1)]), r"prefix; found \[0, 1\]"),
        (lambda: TokenLayout.regular(2, 2, 1).select(torch.tensor([1, 0])), "must stay in front"),
    ):
        with pytest.raises(LayoutError, match=text):
            act()


def test_a_backbone_registered_twice(monkeypatch):
    record = registered_backbones()["clip"]
    with pytest.raises(InjectionError, match="named 'clip' is registered already"):
        register_backbone(record)
    with pytest.raises(InjectionError, match="must say how tokens lie once"):
        register_backbone(Backbone(name="new", towers=(), attentions=(), geometry=record.geometry))
    assert "new" not in registered_backbones()
