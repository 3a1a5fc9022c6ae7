"""SFA on towers with unequally pruned layers: against zero-gated towers, through files, in errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from sfa_adapters import describe, eject_sfa, inject_sfa, load_sfa, save_sfa
from sfa_adapters.cli.main import main
from sfa_adapters.errors import AdapterMismatchError, InjectionError, RecipeError
from sfa_adapters.figures import bias_table, plot_bias
from sfa_adapters.heads import HeadPlan, load_pruned, prune_heads, save_pruned
from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.observe import attention_modules
from sfa_adapters.recipes.inspect_model import inspect_model
from sfa_adapters.reduction import DyMUConfig, inject_dymu
from sfa_adapters.sharing.export import export_baked
from sfa_adapters.tuner import injected_layers
from tests.support.compare import (
    Snapshot,
    assert_close,
    difference,
    freeze_base,
    gradients,
    injected,
    loss_of,
    read,
    strong_config,
    structural,
)
from tests.support.hosts import HOSTS, lm_loss, logits_of
from tests.support.towers import CASES, TowerCase

BY_NAME = {case.name: case for case in CASES}
# One of each kind of tower whose heads can go.
TOWERS = pytest.mark.parametrize(
    "case", [BY_NAME[n] for n in ("clip", "siglip", "internvit", "qwen2_5", "timm_cls", "timm_qknorm")], ids=str
)
SIGLIP = BY_NAME["siglip"]
KEPT = ((0, 1, 3), (2,), (0, 1, 2, 3))  # of the 4 heads of 3 layers


def cut(model: nn.Module, kept: tuple[tuple[int, ...], ...] = KEPT) -> HeadPlan:
    """The plan that leaves these heads of the tower."""
    paths = list(attention_modules(model, "vision"))
    gone = {p: tuple(h for h in range(4) if h not in left) for p, left in zip(paths, kept, strict=True)}
    return HeadPlan(gone, dict.fromkeys(gone, 4), dict.fromkeys(gone, 4))


def pruned(case: TowerCase, kept: tuple[tuple[int, ...], ...] = KEPT) -> nn.Module:
    model = case.build()
    return prune_heads(model, cut(model, kept))


@contextmanager
def gated(model: nn.Module) -> Iterator[None]:
    """Zeros where the heads that would go enter the output projection."""
    handles = []
    for path, heads in cut(model).removed.items():
        geometry = read_geometry(path, model.get_submodule(path))
        mask = torch.ones(geometry.num_heads, geometry.head_dim)
        mask[list(heads)] = 0

        def hook(_: nn.Module, args: Any, mask: Tensor = mask) -> Any:
            return (args[0] * mask.flatten(), *args[1:])

        output = getattr(model.get_submodule(path), geometry.kind.output)
        handles.append(output.register_forward_pre_hook(hook))
    yield
    for handle in handles:
        handle.remove()


# -- trained after pruning --------------------------------------------------------------------------------------------


@TOWERS
def test_outputs_and_gradients_are_those_of_the_zero_gated_tower(case: TowerCase) -> None:
    whole, inputs = injected(case)
    small = pruned(case)
    bare = read(case, small, inputs)
    torch.manual_seed(4)
    inject_sfa(small, strong_config())
    with torch.no_grad():
        for (_, _, ours), (_, _, theirs), left in zip(
            injected_layers(small), injected_layers(whole), KEPT, strict=True
        ):
            assert ours.num_heads == len(left)
            for name in ours.adapter_layer_names:
                getattr(theirs, name)["default"][list(left)] = getattr(ours, name)["default"]
    with gated(whole):
        assert_close(read(case, small, inputs), read(case, whole, inputs))
        expected = gradients(case, whole, inputs)
    assert difference(read(case, small, inputs), bare) > 1e-2
    grads = gradients(case, small, inputs)
    assert set(structural(small)) <= set(grads)
    for (path, _, _), left in zip(injected_layers(small), KEPT, strict=True):
        for term in ("row", "col", "dist", "block"):
            name = f"{path}.sfa.sfa_{term}.default"
            assert grads[name].abs().max(dim=-1).values.min() > 0 if term == "block" else grads[name].abs().min() > 0
            assert difference(grads[name], expected[name][list(left)]) < 1e-5 * max(
                1.0, float(expected[name].abs().max())
            )
            gone = [head for head in range(4) if head not in left]
            assert not expected[name][gone].any()


@TOWERS
def test_a_step_of_training_lowers_the_loss(case: TowerCase) -> None:
    model, inputs = inject_sfa(pruned(case), strong_config()), case.inputs(0)
    freeze_base(model)
    before = {name: p.detach().clone() for name, p in structural(model).items()}
    optimizer = torch.optim.SGD(structural(model).values(), lr=0.1)
    loss = loss_of(case.hidden(model, inputs))
    loss.backward()
    optimizer.step()
    assert loss_of(case.hidden(model, inputs)) < loss
    assert all(not torch.equal(p, before[name]) for name, p in structural(model).items())


@TOWERS
@pytest.mark.parametrize("writer", ["sfa", "peft"])
def test_saved_and_loaded_is_bit_exact(case: TowerCase, writer: str, tmp_path: Path) -> None:
    model: Any = pruned(case)
    inputs = case.inputs(0)
    plain = read(case, model, inputs)
    torch.manual_seed(5)
    if writer == "sfa":
        save_sfa(inject_sfa(model, strong_config()), tmp_path / "sfa")
    else:
        model = get_peft_model(model, strong_config())
        model.save_pretrained(str(tmp_path / "sfa"))
    expected = read(case, model, inputs)
    assert json.loads((tmp_path / "sfa" / "adapter_config.json").read_text())["tower"]["num_heads"] == [3, 1, 4]
    again = load_sfa(pruned(case), tmp_path / "sfa")
    assert torch.equal(read(case, again, inputs), expected)
    assert torch.equal(read(case, eject_sfa(again), inputs), plain)
    loaded = PeftModel.from_pretrained(pruned(case), str(tmp_path / "sfa"))  # pyright: ignore[reportArgumentType]
    assert torch.equal(read(case, loaded, inputs), expected)
    assert describe(loaded).num_parameters == 8 * 19


def test_on_a_host_whose_last_layer_nobody_reads(tmp_path: Path) -> None:
    case = next(host for host in HOSTS if host.name == "llava")
    host: Any = case.build()
    folder = save_pruned(prune_heads(host, cut(host)), tmp_path / "pruned")
    torch.manual_seed(3)
    inject_sfa(host, strong_config())
    assert [layer.num_heads for _, _, layer in injected_layers(host)] == [3, 1]
    freeze_base(host)
    lm_loss(host, case.inputs()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in structural(host).values())
    save_sfa(host, tmp_path / "sfa")
    again = load_sfa(load_pruned(case.build(), folder), tmp_path / "sfa")
    assert torch.equal(logits_of(again, case.inputs()), logits_of(host, case.inputs()))


# -- trained before pruning -------------------------------------------------------------------------------------------


@TOWERS
@pytest.mark.parametrize("peft", [False, True], ids=["sfa", "peft"])
def test_an_adapter_that_was_cut_with_its_tower_is_saved_as_what_it_is(
    case: TowerCase, peft: bool, tmp_path: Path
) -> None:
    model, inputs = case.fresh()
    torch.manual_seed(6)
    subject: Any = get_peft_model(model, strong_config()) if peft else inject_sfa(model, strong_config())  # pyright: ignore[reportArgumentType]
    prune_heads(subject, cut(model))
    expected = read(case, subject, inputs)
    base = save_pruned(subject, tmp_path / "base")
    subject.save_pretrained(str(tmp_path / "sfa")) if peft else save_sfa(subject, tmp_path / "sfa")
    for load in (load_sfa, PeftModel.from_pretrained):
        again = load(load_pruned(case.build(), base), tmp_path / "sfa")  # pyright: ignore[reportArgumentType]
        assert torch.equal(read(case, again, inputs), expected)


def test_load_pruned_cuts_an_adapter_and_what_is_told_of_it(tmp_path: Path) -> None:
    base = save_pruned(pruned(SIGLIP), tmp_path / "base")
    whole, inputs = injected(SIGLIP)
    again = load_pruned(whole, base)
    save_sfa(again, tmp_path / "sfa")
    assert describe(again).num_heads == (3, 1, 4)
    loaded = load_sfa(pruned(SIGLIP), tmp_path / "sfa")
    assert torch.equal(read(SIGLIP, loaded, inputs), read(SIGLIP, again, inputs))


def test_layers_without_a_bias_are_told_too(tmp_path: Path) -> None:
    model, inputs = injected(SIGLIP, layers_to_transform=[2])
    prune_heads(model, cut(model))
    expected = read(SIGLIP, model, inputs)
    save_sfa(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tower"]["num_heads"] == [3, 1, 4]
    assert torch.equal(read(SIGLIP, load_sfa(pruned(SIGLIP), tmp_path), inputs), expected)


def test_heads_of_a_part_of_a_tower(tmp_path: Path) -> None:
    model, inputs = injected(SIGLIP)
    part: Any = model.get_submodule("encoder")
    names = ["layers.0.self_attn", "layers.2.self_attn"]
    prune_heads(part, HeadPlan({names[0]: (1,), names[1]: (0, 2)}, dict.fromkeys(names, 4), dict.fromkeys(names, 4)))
    save_sfa(model, tmp_path)
    again = load_sfa(pruned(SIGLIP, ((0, 2, 3), (0, 1, 2, 3), (1, 3))), tmp_path)
    assert torch.equal(read(SIGLIP, again, inputs), read(SIGLIP, model, inputs))


def test_equal_counts_stay_one_number(tmp_path: Path) -> None:
    model, inputs = injected(SIGLIP)
    save_sfa(model, tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["tower"]["num_heads"] == 4
    equal = ((0, 1, 3), (0, 2, 3), (1, 2, 3))
    prune_heads(model, cut(model, equal))
    save_sfa(model, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["tower"]["num_heads"] == 3
    again = load_sfa(pruned(SIGLIP, equal), tmp_path / "cut")
    assert torch.equal(read(SIGLIP, again, inputs), read(SIGLIP, model, inputs))


# -- what does not fit ------------------------------------------------------------------------------------------------

FIRST, SAME, OTHER = "load the adapter first", "remove the same ones first", "not those of the model"
FOUR = ((0, 1, 2, 3),) * 3
EQUAL, MIXED = ((0, 1, 2), (1, 2, 3), (0, 1, 3)), ((0, 1), (0, 1, 2), (0, 1, 2, 3))


@pytest.mark.parametrize("load", [load_sfa, PeftModel.from_pretrained], ids=["sfa", "peft"])
@pytest.mark.parametrize(
    ("made", "there", "message", "advice"),
    [
        (FOUR, KEPT, "num_heads of layer 0: adapter 4, model 3; 2 of 3 layers differ", FIRST),
        (FOUR, EQUAL, "num_heads: adapter 4, model 3", FIRST),
        (KEPT, FOUR, "num_heads of layer 0: adapter 3, model 4; 2 of 3 layers differ", SAME),
        (KEPT, MIXED, "num_heads of layer 0: adapter 3, model 2; 2 of 3 layers differ", OTHER),
        (EQUAL, KEPT, "num_heads of layer 1: adapter 3, model 1; 2 of 3 layers differ", OTHER),
        (KEPT, (KEPT[0], (0, 1), KEPT[2]), "num_heads of layer 1: adapter 1, model 2)", SAME),
    ],
)
def test_an_adapter_of_other_heads_is_refused_with_what_to_do(
    load: Callable[..., Any], made: Any, there: Any, message: str, advice: str, tmp_path: Path
) -> None:
    source = SIGLIP.build() if made == FOUR else pruned(SIGLIP, made)
    save_sfa(inject_sfa(source), tmp_path)
    model = SIGLIP.build() if there == FOUR else pruned(SIGLIP, there)
    snapshot = Snapshot(model)
    with pytest.raises(AdapterMismatchError) as raised:
        load(model, tmp_path)
    assert message in str(raised.value)
    assert advice in str(raised.value)
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize("saved", ["4", None, [4, 4], [[4], 4, 4], {}])
def test_a_signature_that_is_none(saved: Any, tmp_path: Path) -> None:
    save_sfa(injected(SIGLIP)[0], tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "tower": {**settings["tower"], "num_heads": saved}}))
    with pytest.raises(AdapterMismatchError, match="num_heads"):
        load_sfa(SIGLIP.build(), tmp_path)


def test_a_list_of_equal_counts_is_one_number(tmp_path: Path) -> None:
    save_sfa(injected(SIGLIP)[0], tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "tower": {**settings["tower"], "num_heads": [4, 4, 4]}}))
    assert describe(load_sfa(SIGLIP.build(), tmp_path)).num_heads == 4


def test_another_tower_is_not_taken_for_a_pruned_one(tmp_path: Path) -> None:
    save_sfa(inject_sfa(pruned(SIGLIP)), tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"backbone.*num_heads.*model it was trained with"):
        load_sfa(BY_NAME["clip"].build(), tmp_path)


def test_attention_that_does_not_say_its_heads() -> None:
    model: Any = SIGLIP.build()
    model.encoder.layers[1].self_attn.num_heads = 0
    with pytest.raises(InjectionError, match=r"encoder\.layers\.1\.self_attn \(SiglipAttention\).*num_heads"):
        inject_sfa(model)


def test_what_is_for_whole_towers_only(tmp_path: Path) -> None:
    model = inject_sfa(pruned(SIGLIP))
    with pytest.raises(RecipeError, match=r"lost attention heads.*save_pruned"):
        export_baked(model, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
    with pytest.raises(InjectionError, match=r"\[1, 3, 4\] heads"):
        inject_dymu(eject_sfa(model), DyMUConfig(thresholds=(0.9, 0.9)))


# -- descriptions ------------------------------------------------------------------------------------------------------


def test_description_of_a_pruned_tower() -> None:
    model = pruned(SIGLIP)
    info = describe(model)
    assert (info.num_heads, info.num_parameters, info.layer_parameters) == ((3, 1, 4), 16, (6, 2, 8))
    assert "3 of 3, 1 to 4 heads, 8 together" in str(info)
    assert "16 (2 to 8 per layer)" in str(info)
    inject_sfa(model, strong_config(layers_to_transform=[0, 2], terms=["row", "block"]))
    info = describe(model)
    assert (info.num_layers, info.layer_parameters) == (2, (51, 0, 68))
    assert info.num_parameters == sum(p.numel() for p in structural(model).values()) == 119
    assert "119 (51 to 68 per layer)" in str(info)
    whole = describe(SIGLIP.build())
    assert (whole.num_heads, whole.layer_parameters) == (4, (8, 8, 8))
    assert "4 heads each" in str(whole)
    assert "24 (8 per layer)" in str(whole)


@pytest.mark.parametrize("compensation", ["none", "bias"])
def test_inspect_tells_what_a_saved_model_has(
    compensation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = next(host for host in HOSTS if host.name == "llava")
    model: Any = case.build()
    language = "model.language_model.layers.1.self_attn"
    vision = cut(model)
    plan = HeadPlan(
        {**vision.removed, language: (2, 3)}, {**vision.num_heads, language: 4}, {**vision.num_kv_heads, language: 2}
    )
    prune_heads(model, plan, compensation, [case.inputs()] if compensation == "bias" else None)
    save_pruned(model, tmp_path / "pruned")
    (tmp_path / "pruned" / "model.safetensors").unlink()  # only the record is read
    inspection = inspect_model(str(tmp_path / "pruned"))
    assert inspection.model_parameters == sum(p.numel() for p in model.parameters())
    assert inspection.sfa == describe(model)
    assert [layer.parameters for layer in inspection.layers] == [6, 2, 0]
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path / "pruned")])
    assert not stopped.value.code
    assert "2 of 3, 1 to 4 heads, 8 together" in capsys.readouterr().out
    record = json.loads((tmp_path / "pruned" / "head_plan.json").read_text())
    record["plan"]["layers"]["elsewhere"] = record["plan"]["layers"].pop(language)
    (tmp_path / "pruned" / "head_plan.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path / "pruned")])
    assert stopped.value.code == 2
    assert "no elsewhere, which head_plan.json names" in capsys.readouterr().err


def test_the_bias_of_a_pruned_tower_is_drawn(tmp_path: Path) -> None:
    model = inject_sfa(pruned(SIGLIP), strong_config())
    table = bias_table(model)
    assert [(row["layer"], row["head"]) for row in table] == [
        (i, h) for i, left in enumerate(KEPT) for h in range(len(left))
    ]
    assert plot_bias(model, tmp_path / "bias.png").stat().st_size > 0
