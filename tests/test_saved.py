"""Files that `load_sfa` reads: whole models, shards, LoRA folders; and broken or foreign ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from sfa_adapters import SFAConfig, SFAError, beside_peft, describe, eject_sfa, inject_sfa, load_sfa, save_sfa
from sfa_adapters.errors import AdapterMismatchError, InjectionError, WeightsError
from sfa_adapters.registry import Backbone, registered_backbones
from tests.support import compare
from tests.support.towers import CASES

SIGLIP = next(case for case in CASES if case.name == "siglip")


def read(model: nn.Module) -> torch.Tensor:
    return compare.read(SIGLIP, model, SIGLIP.inputs(0))


def strong(**options: Any) -> Any:
    return inject_sfa(SIGLIP.build(), compare.strong_config(**options))


def unnamed(folder: Path) -> Path:
    """Takes the configuration out of the weights, as a trainer does that consolidates parameters only."""
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "_extra_state" not in k}, file, metadata={"format": "pt"})
    return folder


def refused(text: str, error: type[SFAError], act: Any, model: nn.Module) -> None:
    snapshot = compare.Snapshot(model)
    with pytest.raises(error, match=text):
        act()
    snapshot.assert_unchanged(model)


def test_a_model_in_shards(tmp_path: Path):
    model = strong(block_grid=(2, 8))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(read(load_sfa(SIGLIP.build(), tmp_path)), read(model))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = next(file for name, file in index["weight_map"].items() if ".sfa." in name)
    (tmp_path / shard).unlink()
    base = SIGLIP.build()
    refused(f"{shard} is missing", WeightsError, lambda: load_sfa(base, tmp_path), base)


def test_one_file(tmp_path: Path):
    model = strong()
    model.save_pretrained(tmp_path)
    assert torch.equal(read(load_sfa(SIGLIP.build(), tmp_path / "model.safetensors")), read(model))


def test_a_file_without_the_configuration_needs_one(tmp_path: Path):
    model = strong(block_grid=(2, 8))
    model.save_pretrained(tmp_path)
    unnamed(tmp_path)
    base = SIGLIP.build()
    text = r"SFA scalars of 3 layers, but not their configuration.*config=SFAConfig"
    refused(text, WeightsError, lambda: load_sfa(base, tmp_path), base)
    again = load_sfa(base, tmp_path, config=SFAConfig.published(block_grid=(2, 8)))
    assert torch.equal(read(again), read(model))


def test_several_adapters_in_one_model(tmp_path: Path):
    model = inject_sfa(strong(), compare.strong_config(), adapter_name="second")
    model.save_pretrained(tmp_path)
    base = SIGLIP.build()
    text = r"holds the SFA adapters \['default', 'second'\]; say which one"
    refused(text, WeightsError, lambda: load_sfa(base, tmp_path, adapter_name="third"), base)
    for name in ("default", "second"):
        again = load_sfa(SIGLIP.build(), tmp_path, adapter_name=name)
        eject_sfa(other := _copy(model), ({"default", "second"} - {name}).pop())
        assert torch.equal(read(again), read(other))


def _copy(model: Any) -> Any:
    import copy

    return copy.deepcopy(model)


def test_a_model_without_sfa_and_folders_that_hold_nothing(tmp_path: Path):
    base = SIGLIP.build()
    base.save_pretrained(tmp_path / "plain")  # pyright: ignore[reportCallIssue]
    refused("holds no SFA scalars", WeightsError, lambda: load_sfa(base, tmp_path / "plain"), base)
    refused("is not a saved adapter", WeightsError, lambda: load_sfa(base, tmp_path), base)
    refused("is not a saved adapter", WeightsError, lambda: load_sfa(base, tmp_path / "nowhere"), base)


def lora_and_sfa(folder: Path) -> Any:
    model: Any = get_peft_model(SIGLIP.build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))  # pyright: ignore[reportArgumentType]
    inject_sfa(model.eval(), compare.strong_config())
    model.save_pretrained(folder)
    return model


def test_a_lora_folder_asks_for_its_lora(tmp_path: Path):
    model = lora_and_sfa(tmp_path)
    base = SIGLIP.build()
    text = r"also holds a LORA adapter.*load_sfa\(PeftModel\.from_pretrained\(model, folder\), folder\)"
    refused(text, AdapterMismatchError, lambda: load_sfa(base, tmp_path), base)
    again = load_sfa(PeftModel.from_pretrained(base, tmp_path).eval(), tmp_path)
    assert torch.equal(read(again), read(model))


def test_a_lora_folder_without_sfa(tmp_path: Path):
    model: Any = get_peft_model(SIGLIP.build(), LoraConfig(target_modules=["q_proj"]))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(tmp_path)
    base = SIGLIP.build()
    refused("holds a LORA adapter, not SFA", AdapterMismatchError, lambda: load_sfa(base, tmp_path), base)


def test_ejecting_ends_saving_beside_lora(tmp_path: Path):
    model = lora_and_sfa(tmp_path / "both")
    eject_sfa(model)
    model.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora" / "sfa").exists()
    assert not {"save_pretrained", "load_adapter"} & vars(model).keys()


@pytest.mark.parametrize("skips", [True, False])
def test_a_trainer_that_loads_only_folders_gets_lora_too(
    skips: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `Trainer` before transformers 5.23 resumes so: without help it would go on with the LoRA that it began with."""
    monkeypatch.setattr(beside_peft, "resume_skips_outer_adapter", lambda: skips)
    model = lora_and_sfa(tmp_path)
    again: Any = get_peft_model(SIGLIP.build(), LoraConfig(target_modules=["q_proj"]))  # pyright: ignore[reportArgumentType]
    inject_sfa(again, SFAConfig.published())
    again.load_adapter(str(tmp_path / "sfa"), "sfa", is_trainable=False)
    assert torch.equal(read(again.eval()), read(model)) is skips
    assert all(parameter.requires_grad for name, parameter in again.named_parameters() if "lora" in name)


def test_named_adapters_beside_lora(tmp_path: Path):
    model: Any = get_peft_model(SIGLIP.build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))  # pyright: ignore[reportArgumentType]
    inject_sfa(model, compare.strong_config(), adapter_name="forms")
    model.save_pretrained(tmp_path)
    again = load_sfa(PeftModel.from_pretrained(SIGLIP.build(), tmp_path).eval(), tmp_path, "forms")
    assert torch.equal(read(again), read(model.eval()))


# -- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense", b'{"peft_type": 3}']
)
def test_corrupt_files_are_named(file: str, content: bytes, tmp_path: Path):
    save_sfa(strong(), tmp_path)
    (tmp_path / file).write_bytes(content)
    base = SIGLIP.build()
    refused(str(tmp_path), SFAError, lambda: load_sfa(base, tmp_path), base)


def test_options_in_a_saved_configuration_that_are_of_the_wrong_type(tmp_path: Path):
    save_sfa(strong(), tmp_path)
    file = tmp_path / "adapter_config.json"
    for change in ({"block_grid": "four"}, {"terms": 3}, {"tower": "siglip"}, {"num_blocks": None, "block_grid": [2]}):
        text = file.read_text()
        file.write_text(json.dumps({**json.loads(text), **change}))
        base = SIGLIP.build()
        refused(".", SFAError, lambda base=base: load_sfa(base, tmp_path), base)
        file.write_text(text)


def test_saving_onto_a_file(tmp_path: Path):
    (tmp_path / "taken").write_text("something else")
    model = strong()
    with pytest.raises(WeightsError, match=r"cannot be written to .*taken"):
        save_sfa(model, tmp_path / "taken")
    with pytest.raises(WeightsError, match=r"cannot be written to .*taken"):
        save_sfa(model, tmp_path / "taken" / "below")


def test_a_failed_save_leaves_the_adapter_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = strong()
    save_sfa(model, tmp_path)
    expected = read(model)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sfa_adapters.saved.save_file", full)
    compare.fill(model, 1.0)
    with pytest.raises(WeightsError, match="No space left on device"):
        save_sfa(model, tmp_path)
    assert torch.equal(read(load_sfa(SIGLIP.build(), tmp_path)), expected)


# -- wrong types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "OpenGVLab/InternVL3_5-8B-HF", {"model": 1}, SFAConfig()])
@pytest.mark.parametrize(
    "act", [inject_sfa, eject_sfa, describe, lambda m: save_sfa(m, "x"), lambda m: load_sfa(m, "x")]
)
def test_what_is_no_model(model: Any, act: Any):
    with pytest.raises(InjectionError, match=r"is a \w+, not a torch\.nn\.Module") as raised:
        act(model)
    assert ("from_pretrained" in str(raised.value)) == isinstance(model, str)


@pytest.mark.parametrize("config", [{"terms": ["row"]}, LoraConfig(), "normal", SFAConfig])
def test_what_is_no_configuration(config: Any):
    model = SIGLIP.build()
    refused(r"pass an SFAConfig", InjectionError, lambda: inject_sfa(model, config), model)


# -- pickles -----------------------------------------------------------------------------------------------------------


def test_a_record_with_lambdas_is_pickled_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pickle

    siglip = registered_backbones()["siglip"]
    record = Backbone(
        name="lambdas", towers=("tests.test_saved.*",), attentions=siglip.attentions,
        geometry=lambda tower: siglip.geometry(tower), layouts=lambda *given: siglip.layouts(*given),  # noqa: PLW0108  # pyright: ignore[reportOptionalCall]
    )  # fmt: skip
    with pytest.raises(InjectionError, match="'lambdas' is not registered"):
        pickle.dumps(record)
    monkeypatch.setattr("sfa_adapters.registry._BACKBONES", {"lambdas": record})
    monkeypatch.setattr("sfa_adapters.registry._loaded_entry_points", {*registered_backbones(), "lambdas"})
    model = inject_sfa(_Tower(SIGLIP.build()), compare.strong_config())
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert again(SIGLIP.inputs(0)["pixel_values"]).shape == (2, 16, 32)
    assert pickle.loads(pickle.dumps(record)) is record
    text = pickle.dumps(record)
    monkeypatch.setattr("sfa_adapters.registry._BACKBONES", {})
    with pytest.raises(InjectionError, match="'lambdas' is not registered"):
        pickle.loads(text)


class _Tower(nn.Module):
    """A tower of somebody's own around the layers of SigLIP."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.inner(pixel_values).last_hidden_state
