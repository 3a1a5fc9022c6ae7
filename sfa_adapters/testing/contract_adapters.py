"""The contract of every tower, part two: adapters are saved, loaded, switched, copied, and work beside LoRA."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.functional import set_adapter
from safetensors import safe_open
from torch import nn

from sfa_adapters.choices import TERMS
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import AdapterMismatchError
from sfa_adapters.inject import describe, eject_sfa, inject_sfa, load_sfa, save_sfa
from sfa_adapters.testing import compare
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.registered import small_towers
from sfa_adapters.testing.suite import Suite
from sfa_adapters.tower_search import find_tower

__all__ = ["AdapterContract"]


class AdapterContract(Suite):
    """Checks of adapters: saving and loading, several by name, copies, and other methods beside them."""

    @pytest.mark.parametrize("writer", ["sfa", "peft"])
    @pytest.mark.parametrize("reader", ["sfa", "peft"])
    def test_saved_and_loaded_is_bit_exact(self, case: TowerCase, writer: str, reader: str, tmp_path: Path) -> None:
        """An adapter written by this library or by PEFT gives the same outputs when either of them reads it."""
        tower, inputs = case.fresh()
        torch.manual_seed(5)
        if writer == "sfa":
            inject_sfa(tower, compare.strong_config())
            expected = compare.read(case, tower, inputs)
            save_sfa(tower, tmp_path)
        else:
            model = get_peft_model(tower, compare.strong_config())  # pyright: ignore[reportArgumentType]
            expected = compare.read(case, model, inputs)
            model.save_pretrained(str(tmp_path))
        other: Any = case.build()
        plain = compare.read(case, other, inputs)
        other = load_sfa(other, tmp_path) if reader == "sfa" else PeftModel.from_pretrained(other, str(tmp_path))
        assert torch.equal(compare.read(case, other, inputs), expected)
        assert not torch.equal(plain, expected)
        with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:  # nothing but the scalars is saved
            assert sum(file.get_tensor(name).numel() for name in file.keys()) == describe(other).num_parameters  # noqa: SIM118

    def test_two_named_adapters_switch_save_and_load(self, case: TowerCase, tmp_path: Path) -> None:
        """Two adapters of one tower are switched, saved, loaded and removed one by one."""
        tower, inputs = case.fresh()
        plain = compare.read(case, tower, inputs)
        outputs: dict[str, torch.Tensor] = {}
        for seed, name in enumerate(("charts", "forms")):
            torch.manual_seed(seed)
            inject_sfa(tower, compare.strong_config(), adapter_name=name)
            assert describe(tower).active == (name,)
            outputs[name] = compare.read(case, tower, inputs)
        assert not torch.equal(outputs["charts"], outputs["forms"])
        for name in ("charts", "forms", "charts"):
            set_adapter(tower, name)
            assert torch.equal(compare.read(case, tower, inputs), outputs[name])
        for name in ("charts", "forms"):
            save_sfa(tower, tmp_path / name, adapter_name=name)
        loaded = case.build()
        for name in ("forms", "charts"):
            load_sfa(loaded, tmp_path / name, adapter_name=name)
        for name in ("forms", "charts"):
            set_adapter(loaded, name)
            assert torch.equal(compare.read(case, loaded, inputs), outputs[name])
        set_adapter(loaded, "forms")
        eject_sfa(loaded, "charts")
        assert torch.equal(compare.read(case, loaded, inputs), outputs["forms"])
        eject_sfa(loaded, "forms")
        assert torch.equal(compare.read(case, loaded, inputs), plain)

    def test_two_adapters_of_a_peft_model(self, case: TowerCase, tmp_path: Path) -> None:
        """The same through PEFT's own methods."""
        tower, inputs = case.fresh()
        model: Any = get_peft_model(tower, compare.strong_config(), adapter_name="charts")  # pyright: ignore[reportArgumentType]
        first = compare.read(case, model, inputs)
        model.add_adapter("forms", compare.strong_config())
        assert torch.equal(compare.read(case, model, inputs), first), "a new adapter of a PeftModel is not active yet"
        model.set_adapter("forms")
        second = compare.read(case, model, inputs)
        model.save_pretrained(str(tmp_path))
        loaded: Any = PeftModel.from_pretrained(case.build(), str(tmp_path / "charts"), adapter_name="charts")
        loaded.load_adapter(str(tmp_path / "forms"), adapter_name="forms")
        assert torch.equal(compare.read(case, loaded, inputs), first)
        loaded.set_adapter("forms")
        assert torch.equal(compare.read(case, loaded, inputs), second)
        loaded.set_adapter("charts")
        loaded.delete_adapter("forms")
        assert torch.equal(compare.read(case, loaded, inputs), first)

    def test_two_active_adapters_add_up(self, case: TowerCase) -> None:
        """Two active adapters add their biases, the same on either backend."""
        tower, inputs = compare.injected(case, backend="dense")
        inject_sfa(tower, compare.strong_config(backend="dense"), adapter_name="second")
        set_adapter(tower, ["default", "second"])
        both = compare.read(case, tower, inputs)
        compare.set_backend(tower, "folded")
        compare.assert_close(compare.read(case, tower, inputs), both)
        with torch.no_grad():
            for name, parameter in compare.structural(tower).items():
                if name.endswith("second"):
                    parameter.zero_()
        set_adapter(tower, ["default"])
        alone = compare.read(case, tower, inputs)
        set_adapter(tower, ["default", "second"])
        compare.assert_close(compare.read(case, tower, inputs), alone)
        assert compare.difference(both, alone) > 1e-2

    @pytest.mark.parametrize("reader", ["sfa", "peft"])
    def test_adapter_of_another_tower_is_refused_and_changes_nothing(
        self, case: TowerCase, reader: str, tmp_path: Path
    ) -> None:
        """An adapter of this tower does not load into one of another kind."""
        save_sfa(compare.injected(case)[0], tmp_path)
        other = small_towers("clip" if case.backbone != "clip" else "siglip")[0]
        tower, inputs = other.fresh()
        snapshot, plain = compare.Snapshot(tower), compare.read(other, tower, inputs)
        with pytest.raises(
            AdapterMismatchError, match=f"backbone: adapter '{case.backbone}', model '{other.backbone}'"
        ):
            load_sfa(tower, tmp_path) if reader == "sfa" else PeftModel.from_pretrained(tower, str(tmp_path))  # pyright: ignore[reportArgumentType]
        snapshot.assert_unchanged(tower)
        assert torch.equal(compare.read(other, tower, inputs), plain)

    # peft warns about it when SFA was injected first
    @pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
    @pytest.mark.parametrize("order", ["lora first", "sfa first"])
    def test_lora_lives_beside_sfa(self, case: TowerCase, order: str) -> None:
        """LoRA and SFA act and train together in either order, and ejecting SFA leaves LoRA as it was."""
        tower, inputs = case.fresh()
        if order == "lora first":
            model: Any = get_peft_model(tower, lora_of(case, tower))  # pyright: ignore[reportArgumentType]
            inject_sfa(model, compare.strong_config())
        else:
            inject_sfa(tower, compare.strong_config())
            model = get_peft_model(tower, lora_of(case, tower))  # pyright: ignore[reportArgumentType]
        lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert len(lora) == 2 * case.layers
        trained = {*lora, *compare.structural(model)}
        for name, parameter in model.named_parameters():  # versions of peft differ in what they freeze here
            parameter.requires_grad_(name in trained)
        together = compare.read(case, model, inputs)
        gradients = compare.gradients(case, model, inputs)
        assert set(gradients) == trained
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())

        scalars = {name: p.detach().clone() for name, p in compare.structural(model).items()}
        compare.fill(model, 0.0)
        lora_alone = compare.read(case, model, inputs)
        for name, parameter in compare.structural(model).items():
            parameter.data.copy_(scalars[name])
        assert compare.difference(together, lora_alone) > 1e-2
        eject_sfa(model)
        assert not compare.structural(model)
        compare.assert_close(compare.read(case, model, inputs), lora_alone)
        assert set(compare.gradients(case, model, inputs)) == set(lora)

    def test_lora_merged_under_sfa(self, case: TowerCase) -> None:
        """LoRA can be merged into the weights under a bias."""
        tower, inputs = case.fresh()
        model: Any = get_peft_model(tower, lora_of(case, tower))  # pyright: ignore[reportArgumentType]
        inject_sfa(model, compare.strong_config())
        together = compare.read(case, model, inputs)
        merged = model.merge_and_unload()
        compare.assert_close(compare.read(case, merged, inputs), together)
        assert describe(merged).num_layers == case.layers - case.unread
        assert not [name for name, _ in merged.named_parameters() if "lora_" in name]

    def test_a_deep_copy_is_independent(self, case: TowerCase) -> None:
        """A copy has its own scalars, layouts and hooks."""
        tower, inputs = compare.injected(case)
        expected = compare.read(case, tower, inputs)
        twin = copy.deepcopy(tower)
        assert torch.equal(compare.read(case, twin, inputs), expected)
        compare.fill(twin, 0.25)
        changed = compare.read(case, twin, inputs)
        assert not torch.equal(changed, expected)
        assert torch.equal(compare.read(case, tower, inputs), expected)
        eject_sfa(tower)
        assert torch.equal(compare.read(case, twin, inputs), changed)
        eject_sfa(twin)
        assert torch.equal(compare.read(case, twin, inputs), compare.read(case, tower, inputs))
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in twin.modules())

    def test_a_pickle_gives_the_same_model(self, case: TowerCase) -> None:
        """A pickled tower comes back with its bias."""
        tower, inputs = compare.injected(case)
        expected = compare.read(case, tower, inputs)
        loaded = pickle.loads(pickle.dumps(tower))  # noqa: S301 - written here
        assert torch.equal(compare.read(case, loaded, inputs), expected)
        eject_sfa(loaded)
        assert torch.equal(compare.read(case, loaded, inputs), compare.read(case, eject_sfa(tower), inputs))

    def test_state_dict_loads_into_an_injected_tower(self, case: TowerCase) -> None:
        """The state dict holds the scalars."""
        tower, inputs = compare.injected(case)
        other = inject_sfa(case.build(), SFAConfig(terms=list(TERMS)))
        assert not torch.equal(compare.read(case, other, inputs), compare.read(case, tower, inputs))
        other.load_state_dict(tower.state_dict())
        assert torch.equal(compare.read(case, other, inputs), compare.read(case, tower, inputs))


def lora_of(case: TowerCase, tower: nn.Module) -> LoraConfig:
    """LoRA on one projection of each attention layer."""
    targets = list(case.lora_targets)
    if not targets:
        name, attention = find_tower(tower).attentions[0]
        linear = next((path for path, module in attention.named_modules() if isinstance(module, nn.Linear)), None)
        if linear is None:
            pytest.skip(f"{name} has no linear layer for LoRA")
        targets = [f"{name.rpartition('.')[2]}.{linear}"]
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
