"""Adapters under PEFT, accelerate and casts: they stay whole and in float32, or a named error says why not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from sfa_adapters import SFAConfig, describe, eject_sfa, inject_sfa, load_sfa, save_sfa
from sfa_adapters.errors import InjectionError, MergeError, SFAWarning, WeightsError
from sfa_adapters.install import install_for_others
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.hosts import HOSTS, logits_of
from tests.support.towers import CASES, TowerCase, every_tower

CLIP, SIGLIP = (next(case for case in CASES if case.name == name) for name in ("clip", "siglip"))
SECOND_TIME = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
HOST = next(case for case in HOSTS if case.name == "llava_onevision")  # a SigLIP tower in a host


def peft_tower(**options: Any) -> Any:
    model: Any = SIGLIP.build()
    return get_peft_model(model, compare.strong_config(**options)).eval()


def read(model: nn.Module) -> torch.Tensor:
    return compare.read(SIGLIP, model, SIGLIP.inputs(0))


# -- float32 -------------------------------------------------------------------------------------------------------

CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to dtype and device": lambda model: model.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("way", ["inject", "peft"])
def test_scalars_keep_float32_through_every_cast_of_the_model(cast: str, way: str):
    model = inject_sfa(SIGLIP.build(), compare.strong_config()) if way == "inject" else peft_tower()
    before = {name: p.detach().clone() for name, p in compare.structural(model).items()}
    for parameter in compare.structural(model).values():
        parameter.grad = torch.full_like(parameter, 0.2501)
    CASTS[cast](model)
    for name, parameter in compare.structural(model).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    others = {p.dtype for name, p in model.named_parameters() if name not in before}
    assert others == {torch.bfloat16 if cast in ("to", "bfloat16") else torch.float16}


def test_a_step_of_the_size_that_bfloat16_swallows_arrives():
    model = inject_sfa(SIGLIP.build(), SFAConfig()).to(torch.bfloat16)
    compare.fill(model, 0.25)
    scalars = list(compare.structural(model).values())
    optimizer = torch.optim.AdamW(scalars, lr=4e-4, weight_decay=0.0)
    for parameter in scalars:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.allclose(p, torch.tensor(0.2496), atol=1e-6) for p in scalars)
    assert (torch.tensor(0.25, dtype=torch.bfloat16) - 4e-4).item() == 0.25  # what bfloat16 would have made of it


def test_whoever_insists_gets_the_cast():
    model = inject_sfa(SIGLIP.build(), SFAConfig(keep_float32=False))
    inject_sfa(model, SFAConfig(), adapter_name="kept")
    model.to(torch.bfloat16)
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in compare.structural(model).items()}
    assert kinds == {"default": torch.bfloat16, "kept": torch.float32}


def test_a_half_model_runs_with_float32_scalars_and_float64_is_allowed():
    model = inject_sfa(SIGLIP.build(), compare.strong_config()).to(torch.bfloat16)
    out: Any = model(SIGLIP.inputs(0)["pixel_values"].bfloat16())
    assert out.last_hidden_state.dtype == torch.bfloat16
    assert {p.dtype for p in compare.structural(model.double()).values()} == {torch.float64}


# -- loading on the meta device, offloading ------------------------------------------------------------------------


def test_a_layer_has_no_weight():
    layer = injected_layers(peft_tower())[0][2]
    assert not hasattr(layer, "weight")
    assert not hasattr(layer, "bias")
    assert layer.get_base_layer() is layer


def test_low_cpu_mem_usage(tmp_path: Path):
    model = peft_tower()
    expected = read(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(SIGLIP.build(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(read(again), expected)
    other = peft_tower()
    other.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    other.set_adapter("second")
    assert torch.equal(read(other), expected)
    plain: Any = inject_adapter_in_model(SFAConfig.published(), SIGLIP.build(), low_cpu_mem_usage=True)
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(read(plain.eval()), expected)
    assert all(not p.is_meta and p.dtype == torch.float32 for p in plain.parameters())


def test_scalars_that_were_never_loaded_are_an_error_at_the_first_forward(tmp_path: Path):
    peft_tower().save_pretrained(tmp_path)
    model: Any = get_peft_model(SIGLIP.build(), SFAConfig.from_pretrained(str(tmp_path)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightsError, match=r"'default' was read from a folder, but its scalars were never loaded"):
        read(model)
    empty: Any = inject_adapter_in_model(SFAConfig(), SIGLIP.build(), low_cpu_mem_usage=True)
    with pytest.raises(WeightsError, match="never loaded"):
        read(empty)


def test_a_configuration_can_serve_two_models():
    config = compare.strong_config()
    for _ in range(2):
        model: Any = get_peft_model(SIGLIP.build(), config)  # pyright: ignore[reportArgumentType]
        read(model)
    assert config.tower is None
    assert config.target_modules is None


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_models(when: str, kind: str, tmp_path: Path):
    def offload(model: nn.Module) -> nn.Module:
        if kind == "cpu":
            return cpu_offload(model, torch.device("cpu"))
        return disk_offload(model, str(tmp_path / "weights"), torch.device("cpu"))

    torch.manual_seed(1)
    kept = inject_sfa(CLIP.build(), compare.strong_config())
    expected = compare.read(CLIP, kept, CLIP.inputs(0))
    save_sfa(kept, tmp_path / "adapter")
    if when == "before":
        model = load_sfa(offload(CLIP.build()), tmp_path / "adapter")
    else:
        model = offload(load_sfa(CLIP.build(), tmp_path / "adapter"))
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(compare.read(CLIP, model, CLIP.inputs(0)), expected)
    save_sfa(model, tmp_path / "again")
    again = load_sfa(CLIP.build(), tmp_path / "again")
    assert torch.equal(compare.read(CLIP, again, CLIP.inputs(0)), expected)


# -- merging, unloading --------------------------------------------------------------------------------------------


def lora(model: Any) -> Any:
    targets = list(SIGLIP.lora_targets)
    return get_peft_model(model, LoraConfig(target_modules=targets, r=2, init_lora_weights=False))


def test_lora_merges_and_sfa_stays():
    model = inject_sfa(lora(SIGLIP.build()), compare.strong_config()).eval()
    expected = read(model)
    model.merge_adapter()
    assert all(layer.active == ["default"] for _, _, layer in injected_layers(model))
    assert any(module.merged for module in model.modules() if hasattr(module, "lora_A"))
    compare.assert_close(read(model), expected)
    model.unmerge_adapter()
    compare.assert_close(read(model), expected)
    merged = model.merge_and_unload()
    assert describe(merged).num_layers == 3
    compare.assert_close(read(merged), expected)


def test_sfa_itself_has_nothing_to_unmerge():
    model = peft_tower()
    with pytest.raises(MergeError, match="never merged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("way", ["unload", "eject"])
def test_modules_to_save_are_given_back(way: str):
    base = SIGLIP.build()
    snapshot = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model: Any = get_peft_model(base, SFAConfig(modules_to_save=["post_layernorm"]))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    expected = read(model)
    with torch.no_grad():
        for parameter in compare.structural(model).values():
            parameter.zero_()
    expected = read(model)
    given = model.unload() if way == "unload" else eject_sfa(model)
    assert not injected_layers(given)
    compare.assert_close(read(given), expected)  # as with every PEFT method, what was trained stays
    changed = {name for name, tensor in given.state_dict().items() if not torch.equal(tensor, snapshot[name])}
    assert changed == {"post_layernorm.weight", "post_layernorm.bias"}


def test_modules_to_save_around_the_attention_are_refused():
    model = SIGLIP.build()
    snapshot = compare.Snapshot(model)
    with pytest.raises(InjectionError, match=r"modules_to_save=\['encoder'\]: 'encoder' holds encoder\.layers\.0"):
        get_peft_model(model, SFAConfig(modules_to_save=["encoder"]))  # pyright: ignore[reportArgumentType]
    snapshot.assert_unchanged(model)


# -- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, [1]])
def test_inject_adapter_in_model_with_a_state_dict(layers: list[int] | None):
    model = peft_tower(layers_to_transform=layers)
    state = get_peft_model_state_dict(model)
    plain: Any = inject_adapter_in_model(SFAConfig.published(), SIGLIP.build(), state_dict=state)
    assert describe(plain).num_layers == (3 if layers is None else 1)
    set_peft_model_state_dict(plain, state)
    assert torch.equal(read(plain), read(model))


@torch.no_grad()
def test_an_adapter_of_a_host_on_its_bare_tower_and_back(tmp_path: Path):
    host: Any = HOST.build()
    inject_sfa(host, compare.strong_config())
    tower = host.model.vision_tower
    image = torch.randn(1, 3, 56, 56)
    expected = tower(pixel_values=image).last_hidden_state
    save_sfa(host, tmp_path / "host")
    for load in (load_sfa, PeftModel.from_pretrained):
        ejected: Any = eject_sfa(copy.deepcopy(host))
        bare: Any = load(ejected.model.vision_tower, tmp_path / "host")
        assert torch.equal(bare(pixel_values=image).last_hidden_state, expected)
        save_sfa(bare, tmp_path / "tower")
        again: Any = load(eject_sfa(copy.deepcopy(host)), tmp_path / "tower")
        assert torch.equal(logits_of(again, HOST.inputs()), logits_of(host, HOST.inputs()))


@every_tower
def test_save_sfa_of_a_peft_model(case: TowerCase, tmp_path: Path):
    model: Any = get_peft_model(case.build(), compare.strong_config()).eval()  # pyright: ignore[reportArgumentType]
    expected = compare.read(case, model, case.inputs(0))
    save_sfa(model, tmp_path)
    for load in (load_sfa, PeftModel.from_pretrained):
        assert torch.equal(compare.read(case, load(case.build(), tmp_path).eval(), case.inputs(0)), expected)


@SECOND_TIME
def test_adapters_of_inject_sfa_do_not_mix_into_the_file_of_another(tmp_path: Path):
    base: Any = inject_sfa(SIGLIP.build(), compare.strong_config(), adapter_name="mine")
    model: Any = get_peft_model(base, compare.strong_config(terms=["row"]))
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(SIGLIP.build(), tmp_path)
    assert describe(again).num_parameters == 3 * 4
    assert torch.equal(read(again), read(model))
    model.set_adapter("mine")
    mine = load_sfa(SIGLIP.build(), tmp_path / "mine")
    assert torch.equal(read(mine), read(model))


def test_a_state_dict_of_other_blocks_is_refused():
    model = inject_sfa(SIGLIP.build(), SFAConfig.published(block_grid=(2, 8)))
    other = inject_sfa(SIGLIP.build(), SFAConfig.published())
    with pytest.raises(ValueError, match=r"saved with block_grid=\[2, 8\], but the model has block_grid=\[4, 4\]"):
        other.load_state_dict(model.state_dict(), strict=False)
    state = {name: value for name, value in model.state_dict().items() if "_extra_state" not in name}
    other.load_state_dict(state)  # saved before there was a record


def test_a_partial_state_dict_is_refused_and_one_without_sfa_is_not():
    model = inject_sfa(SIGLIP.build(), compare.strong_config())
    state = model.state_dict()
    del state["encoder.layers.1.self_attn.sfa.sfa_dist.default"]
    with pytest.raises(ValueError, match=r"encoder\.layers\.1\.self_attn\.sfa\.sfa_dist needs \(4,\), found nothing"):
        model.load_state_dict(state, strict=False)
    model.load_state_dict(SIGLIP.build().state_dict(), strict=False)


@SECOND_TIME
def test_peft_around_an_injected_model_warns_when_it_is_saved(tmp_path: Path):
    model = lora(inject_sfa(SIGLIP.build(), compare.strong_config()))
    with pytest.warns(SFAWarning, match=r"wrapped by PEFT after SFA was injected.*save_sfa\(model, folder\)"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # once
    save_sfa(model, tmp_path / "sfa")
    both = load_sfa(PeftModel.from_pretrained(SIGLIP.build(), tmp_path), tmp_path)
    assert torch.equal(read(both), read(model))


# -- one clear line each -------------------------------------------------------------------------------------------


def test_adapters_for_each_sample_are_refused():
    model = peft_tower()
    with pytest.raises(InjectionError, match=r"adapter_names=\['default', 'nonsense'\]: SFA applies its active"):
        model(**SIGLIP.inputs(0), adapter_names=["default", "nonsense"])


def test_target_modules_are_refused():
    with pytest.raises(InjectionError, match=r"target_modules=\['q_proj'\].*layers_to_transform"):
        SFAConfig(target_modules=["q_proj"])


def test_weighted_adapters_hot_swap_and_mixed_models(tmp_path: Path):
    model = peft_tower()
    with pytest.raises(MergeError, match="not combined into a new one"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"[Hh]otswapping only supports|LORA"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(
        ValueError, match=r"SFA is not supported for mixed models|is not compatible with the|SFA.*not compatible"
    ):
        get_peft_model(SIGLIP.build(), SFAConfig(), mixed=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"SFA is not supported for mixed models|is not compatible with the|SFA.*not compatible"
    ):
        PeftMixedModel.from_pretrained(SIGLIP.build(), str(tmp_path))


def test_the_model_card_names_sfa(tmp_path: Path):
    model = peft_tower()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("A structural attention bias (SFA)") == 1
    assert install_for_others() in card
    assert "PeftModel.from_pretrained" in card


@pytest.mark.parametrize("name", ["a.b", "keys", "training", 7])
def test_names_that_cannot_name_an_adapter(name: Any):
    model = SIGLIP.build()
    snapshot = compare.Snapshot(model)
    with pytest.raises(InjectionError, match=r"adapter_name=.* cannot name an adapter"):
        inject_sfa(model, adapter_name=name)
    snapshot.assert_unchanged(model)


def test_the_record_in_a_state_dict_is_readable():
    model = inject_sfa(SIGLIP.build(), SFAConfig.published(block_grid=(2, 8)))
    record = model.state_dict()["encoder.layers.0.self_attn.sfa._extra_state"]
    content = json.loads(bytes(record.tolist()))
    assert content["adapters"]["default"]["block_grid"] == [2, 8]
    assert content["format_version"] == 1
