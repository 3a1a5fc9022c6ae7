"""Baked exports: they load where this library cannot be imported, and give what the adapted model gives."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, SiglipVisionConfig, SiglipVisionModel

from sfa_adapters import inject_sfa, save_sfa
from sfa_adapters.adat import PatchPolicy, inject_adat
from sfa_adapters.cli.main import main
from sfa_adapters.errors import BiasNotAppliedError, InjectionError, RecipeError
from sfa_adapters.hosts.load import load_host
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.reduction import DyMUConfig, FastVConfig, inject_dymu, inject_fastv
from sfa_adapters.sharing import baked, export, export_baked
from sfa_adapters.sharing.weights import plain_state_dict
from sfa_adapters.testing.cases import read_hidden
from sfa_adapters.training.checkpoints import save_trained
from sfa_adapters.tuner import injected_layers
from tests.support.compare import Snapshot, assert_close, difference, strong_config
from tests.support.hosts import HOSTS, HostCase, logits_of
from tests.support.towers import CASES, SMALL

BY_NAME = {host.name: host for host in HOSTS}
TOWER_BY_NAME = {case.name: case for case in CASES}
EXPORTED = ("internvl", "llava_onevision", "llava", "idefics3")  # idefics3 passes a mask of its own
IMPLEMENTATIONS = ("sdpa", "eager")
WITHOUT_LIBRARY = """
import sys, json, importlib.util
for name in ("sfa_adapters", "peft"):
    sys.modules[name] = None
from pathlib import Path
from safetensors.torch import load_file
import torch
torch.set_num_threads(1)
found = {}
for folder in map(Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location("load_baked", folder / "load_baked.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved = load_file(folder.parent / (folder.name + ".inputs"))
    inputs = {name[3:]: tensor for name, tensor in saved.items() if name.startswith("in.")}
    for implementation in ("sdpa", "eager"):
        model = module.load_baked(folder, attn_implementation=implementation)
        with torch.no_grad():
            logits = model(**inputs).logits
        expected = saved["out." + implementation]
        found[folder.name + "-" + implementation] = float((logits - expected).abs().max() / expected.abs().max())
assert not any(name.startswith("sfa_adapters") for name, module in sys.modules.items() if module is not None)
print(json.dumps(found))
"""


def adapted(host: HostCase, **options: Any) -> nn.Module:
    model = host.build()
    torch.manual_seed(3)
    return inject_sfa(model, strong_config(**options))


def loaded(folder: Path, **options: Any) -> Any:
    """Through the file that was written, not through the module of the package."""
    spec = importlib.util.spec_from_file_location("load_baked", folder / "load_baked.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_baked(folder, **options)


def small_tower() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=56, patch_size=14, vision_use_head=False)).eval()


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Of the logits, relative to the largest, in a process where neither this library nor peft can be imported."""
    root = tmp_path_factory.mktemp("baked")
    folders = []
    for name in EXPORTED:
        model, inputs = adapted(BY_NAME[name]), BY_NAME[name].inputs()
        saved = {f"in.{key}": tensor for key, tensor in inputs.items()}
        for form in ("dense", "tables"):
            folders.append(root / f"{name}-{form}")
            export_baked(model, folders[-1], form=form)
        for implementation in IMPLEMENTATIONS:
            model.set_attn_implementation(implementation)  # pyright: ignore[reportCallIssue]
            saved[f"out.{implementation}"] = logits_of(model, inputs)
        for folder in folders[-2:]:
            save_file(saved, f"{folder}.inputs")
    command = [sys.executable, "-c", WITHOUT_LIBRARY, *map(str, folders)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ["dense", "tables"])
@pytest.mark.parametrize("name", EXPORTED)
def test_without_the_library_the_answers_are_the_same(
    differences: dict[str, float], name: str, form: str, implementation: str
) -> None:
    assert differences[f"{name}-{form}-{implementation}"] <= 1e-5


def test_without_the_loader_they_are_not(tmp_path: Path) -> None:
    host = BY_NAME["internvl"]
    model = adapted(host)
    report = export_baked(model, tmp_path / "out")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    assert difference(logits_of(plain, host.inputs()), logits_of(model, host.inputs())) > 0.01
    assert torch.equal(logits_of(plain, host.inputs()), logits_of(host.build(), host.inputs()))
    assert report.difference <= 1e-5
    assert (report.layers, report.heads, report.tokens, report.image_size) == (3, 4, 17, (56, 56))
    assert report.memory_bytes == 3 * 4 * 17 * 17 * 4
    with pytest.raises((OSError, ValueError), match="model_type"):  # nobody misses the bias by accident
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert not any("sfa" in key for key in again.state_dict())
    copied = copy.deepcopy(again)
    assert torch.equal(logits_of(copied, host.inputs()), logits_of(again, host.inputs()))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "56x56 px" in card
    assert "vLLM" in card


@pytest.mark.parametrize("name", ["siglip", "clip", "internvit"])
@pytest.mark.parametrize(
    "options",
    [{"terms": ["row"]}, {"terms": ["dist", "block"], "block_grid": (2, 3)}, {"layers_to_transform": [0, 2]}],
    ids=["row", "blocks", "layers"],
)
@pytest.mark.parametrize("form", ["dense", "tables"])
def test_bare_towers_with_any_option(tmp_path: Path, name: str, options: Any, form: Any) -> None:
    case = TOWER_BY_NAME[name]
    tower, inputs = case.fresh()
    torch.manual_seed(3)
    inject_sfa(tower, strong_config(**options))
    export_baked(tower, tmp_path / "out", form=form)
    with torch.no_grad():
        states = loaded(tmp_path / "out")(**inputs).last_hidden_state
        expected = tower(**inputs).last_hidden_state
    assert_close(states, expected)
    assert difference(states, torch.stack(read_hidden(case.fresh()[0], inputs))) > 1e-3


def test_two_adapters_add_up_and_tables_are_small(tmp_path: Path) -> None:
    tower, inputs = TOWER_BY_NAME["siglip"].fresh()
    peft = get_peft_model(tower, strong_config())
    peft.add_adapter("other", strong_config(terms=["col", "block"]))
    peft.base_model.set_adapter(["default", "other"])  # pyright: ignore[reportCallIssue]
    export_baked(peft, tmp_path / "out", form="tables")
    tensors = load_file(tmp_path / "out" / "sfa_bias.safetensors")
    assert tensors["layer.0.blocks"].shape[0] == 2
    with torch.no_grad():
        assert_close(loaded(tmp_path / "out")(**inputs).last_hidden_state, peft(**inputs).last_hidden_state)


def test_expanded_tables_against_a_loop() -> None:
    torch.manual_seed(0)
    rows, columns, blocks = torch.randn(2, 3, 3), torch.randn(2, 2, 2), torch.randn(1, 2, 7)
    row, column = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 0, 1, 0, 1])
    on_page = torch.arange(7) > 0
    blocks[:, :, 0] = 0
    tables = baked.expand_tables(rows, columns, blocks, row, column, on_page)
    for head in range(2):
        for i in range(7):
            for j in range(7):
                expected = blocks[0, head, i] * blocks[0, head, j]
                if i and j:
                    expected = expected + rows[head, row[i], row[j]] + columns[head, column[i], column[j]]
                assert tables[head, i, j].item() == pytest.approx(float(expected), abs=1e-6)


def test_sizes_of_the_full_tower() -> None:
    layer = export.BakedExport(Path(), "dense", 24, 16, 1025, (448, 448), 0, 24 * 16 * 1025**2 * 2, 0.0)
    assert "806.9 MB loaded (33.6 MB per layer)" in str(layer)


# -- weights ----------------------------------------------------------------------------------------------------------


def lora_on_text(model: nn.Module, **options: Any) -> None:
    target = r"model\.language_model\..*\.(q_proj|down_proj)"
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=8, target_modules=target, **options), model)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def test_lora_and_tuned_weights_are_put_in_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    host = BY_NAME["llava"]
    model = host.build()
    lora_on_text(model)
    inject_sfa(model, strong_config())
    with torch.no_grad():
        model.get_submodule("model.multi_modal_projector.linear_1").weight.mul_(1.5)  # pyright: ignore
    model.train()
    before, random = Snapshot(model), torch.get_rng_state()
    export_baked(model, tmp_path / "out")
    before.assert_unchanged(model)
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()
    expected = logits_of(model, host.inputs())
    assert_close(logits_of(loaded(tmp_path / "out"), host.inputs()), expected)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)  # pyright: ignore[reportCallIssue]
    assert difference(logits_of(model, host.inputs()), expected) > 1e-2
    export_baked(model, tmp_path / "off")  # what is switched off is not put in
    assert_close(logits_of(loaded(tmp_path / "off"), host.inputs()), logits_of(model, host.inputs()))


def test_modules_to_save_take_the_place_of_the_originals(tmp_path: Path) -> None:
    host = BY_NAME["llava"]
    model = get_peft_model(host.build(), strong_config(modules_to_save=["multi_modal_projector"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    export_baked(model, tmp_path / "out")
    assert_close(logits_of(loaded(tmp_path / "out"), host.inputs()), logits_of(model, host.inputs()))


def test_lora_that_is_no_sum_of_matrices_is_refused(tmp_path: Path) -> None:
    model = BY_NAME["llava"].build()
    lora_on_text(model, use_dora=True)
    inject_sfa(model)
    with pytest.raises(RecipeError, match="more than two matrices"):
        export_baked(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tied_weights_stay_tied_and_lora_on_one_of_them_is_refused() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    plain = plain_state_dict(model, torch.bfloat16)
    assert plain["head.weight"].data_ptr() == plain["embed.weight"].data_ptr()
    assert plain["head.weight"].dtype == torch.bfloat16
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"]), model)
    with pytest.raises(RecipeError, match=r"tied weights \(embed.weight, head.weight\)"):
        plain_state_dict(model, torch.float32)


def test_sixteen_bits(tmp_path: Path) -> None:
    tower, inputs = TOWER_BY_NAME["siglip"].fresh()
    inject_sfa(tower, strong_config()).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    export_baked(tower, tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert load_file(tmp_path / "out" / "sfa_bias.safetensors")["layer.0.bias"].dtype == torch.bfloat16
    pixels = {"pixel_values": inputs["pixel_values"].bfloat16()}
    with torch.no_grad():
        assert_close(again(**pixels)[0].float(), tower(**pixels)[0].float(), 0.05)
    tower.embeddings.float()  # pyright: ignore[reportCallIssue]
    with pytest.raises(RecipeError, match="bfloat16, float32"):
        export_baked(tower, tmp_path / "mixed")


# -- what cannot be baked ---------------------------------------------------------------------------------------------


def test_what_has_no_one_bias_is_refused_with_the_reason(tmp_path: Path) -> None:
    qwen, remote = adapted(BY_NAME["qwen2_5_vl"]), TOWER_BY_NAME["internvit_remote"].fresh()[0]
    adaptive = inject_adat(inject_sfa(small_tower()), PatchPolicy(scorer="edges"))
    vit = inject_sfa(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0))
    off = inject_sfa(small_tower())
    for _, _, layer in injected_layers(off):
        layer.set_adapter([])
    for model, reason, kind in (
        (qwen, "pages of any size", RecipeError),
        (inject_sfa(remote), "-HF variant", RecipeError),
        (vit, "not a class of transformers", RecipeError),
        (adaptive, "anew for each page", RecipeError),
        (small_tower(), "nothing to bake", InjectionError),
        (off, "active", InjectionError),
    ):
        with pytest.raises(kind, match=reason):
            export_baked(model, tmp_path / "out")
    with pytest.raises(RecipeError, match="form='sparse'"):
        export_baked(small_tower(), tmp_path / "out", form="sparse")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_what_drops_tokens_while_a_model_runs_is_refused(tmp_path: Path) -> None:
    merging = inject_dymu(inject_sfa(small_tower()), DyMUConfig(thresholds=1.0))
    with pytest.raises(RecipeError, match=r"DyMU \(inject_dymu\).*eject_dymu"):
        export_baked(merging, tmp_path / "out")
    pruning = inject_fastv(adapted(BY_NAME["llava"]), FastVConfig(layer=1))
    with pytest.raises(RecipeError, match=r"FastV \(inject_fastv\).*eject_fastv"):
        export_baked(pruning, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = adapted(BY_NAME["llava"])
    parent = model.get_submodule("model.language_model.layers.0.mlp")
    packed = bitsandbytes.nn.Linear4bit(32, 64, bias=False)
    packed.load_state_dict(parent.up_proj.state_dict())  # pyright: ignore
    parent.up_proj = packed.to("cpu")
    with pytest.raises(RecipeError, match=r"1 weights are quantised, e.g. .*layers.0.mlp.up_proj.weight"):
        export_baked(model, tmp_path / "out")


def test_a_tower_that_something_else_acts_in_is_not_written(tmp_path: Path) -> None:
    tower = inject_sfa(small_tower(), strong_config())
    calls: list[int] = []

    def drifting(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(1)
        return output[0] * len(calls), output[1]

    injected_layers(tower)[0][1].register_forward_hook(drifting)
    with pytest.raises(BiasNotAppliedError, match="nothing was written"):
        export_baked(tower, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- the loader refuses -----------------------------------------------------------------------------------------------


def test_pages_of_another_size_are_refused(tmp_path: Path) -> None:
    case = TOWER_BY_NAME["siglip"]
    tower, inputs = case.fresh()
    export_baked(inject_sfa(tower, strong_config()), tmp_path / "out")
    model = loaded(tmp_path / "out")
    rows, columns = case.grid or (0, 0)
    model(**inputs)
    for height, width in ((rows * 2, columns // 2), (rows, columns + 1)):  # as many tokens; more tokens
        pixels = torch.zeros(1, 3, height * 14, width * 14)
        with pytest.raises(ValueError, match=f"{height}x{width} patches; the bias is baked for {rows}x{columns}"):
            model(pixel_values=pixels, interpolate_pos_encoding=True)
    layer = model.encoder.layers[0].self_attn
    with pytest.raises(ValueError, match="got 3 tokens"):
        layer(torch.zeros(1, 3, 32))
    layer.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no bias"):
        model(**inputs)


def test_own_masks_of_any_kind_are_kept() -> None:
    torch.manual_seed(0)
    attention: Any = small_tower().encoder.layers[0].self_attn
    states, bias = torch.randn(1, 16, 32), torch.randn(4, 16, 16)
    seen = torch.rand(1, 1, 16, 16) > 0.4
    seen[..., 0] = True
    additive = torch.zeros(1, 1, 16, 16).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = attention(states, attention_mask=bias[None] + additive)[0]
    baked.attach_bias(attention, bias, "attention_mask", "here")
    for mask in (seen, additive):
        assert_close(attention(states, attention_mask=mask)[0], expected)
        assert_close(attention(states, mask)[0], expected)  # positional
    baked.detach_bias(attention)
    assert torch.equal(attention(states, attention_mask=bias[None] + additive)[0], expected)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_baked(inject_sfa(small_tower(), strong_config()), folder, form="tables")
    record = json.loads((folder / "sfa_bias.json").read_text())

    def refuses(match: str, **changes: Any) -> None:
        (folder / "sfa_bias.json").write_text(json.dumps({**record, **changes}))
        with pytest.raises(ValueError, match=match):
            loaded(folder)

    refuses("format 99", format=99)
    refuses("no model class 'Nothing'", model_class="Nothing")
    refuses("no model class 'AutoConfig'", model_class="AutoConfig")
    refuses("should be a SiglipAttention, found nothing", layers=[{"module": "gone", "class": "SiglipAttention"}])
    refuses("should be a CLIPVisionModel, found SiglipVisionModel", tower_class="CLIPVisionModel")
    refuses("expected 5 heads", heads=5)
    refuses("no layer.0.bias", form="dense")
    (folder / "sfa_bias.safetensors").unlink()
    refuses("no sfa_bias.safetensors")


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = inject_sfa(small_tower(), strong_config())

    def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(RecipeError, match="disk is full"):
        export_baked(tower, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_there_are_kept(tmp_path: Path) -> None:
    tower = inject_sfa(small_tower(), strong_config())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    for place in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(RecipeError, match="there already"):
            export_baked(tower, place)
    with pytest.raises(RecipeError, match="cannot be written"):
        export_baked(tower, tmp_path / "full" / "mine" / "below")
    assert (tmp_path / "full" / "mine").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    export_baked(tower, tmp_path / "empty")
    assert {p.name for p in tmp_path.iterdir()} == {"full", "empty"}


# -- the command ------------------------------------------------------------------------------------------------------


def run_sfa(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_command_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nano_checkpoint("llava", tmp_path / "host")
    recipe = Recipe(name="x", model=str(model), family="llava", plan="nf4", dtype="float32", lora_llm=2)
    host = load_host(recipe.replace(plan="bf16", gradient_checkpointing=False), device="cpu")
    host.model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in host.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    host.recipe = recipe
    save_trained(host, tmp_path / "run" / "final")
    code, out, err = run_sfa(capsys, "export", tmp_path / "run", "--out", tmp_path / "out", "--tables")
    assert code == 0, err
    assert "2 layers, 4 heads, 65 tokens (images of 112x112 px)" in out
    assert "Evaluate the exported model again" in err
    ids = torch.tensor([[host.model.config.image_token_id] * 64 + [5, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 112, 112)}
    again = loaded(tmp_path / "out")
    assert_close(logits_of(again, inputs), logits_of(host.model, inputs))
    processor = type(host.processor).from_pretrained(tmp_path / "out" / "model")
    assert processor.chat_template == host.processor.chat_template
    code, _, err = run_sfa(capsys, "export", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 2
    assert "there already" in err
    assert len([line for line in err.splitlines() if line.startswith("sfa:")]) == 1


def test_command_with_an_adapter_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = TOWER_BY_NAME["clip"]
    tower, inputs = case.fresh()
    tower.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    inject_sfa(tower, strong_config())
    save_sfa(tower, tmp_path / "adapter")
    base: tuple[Any, ...] = ("export", tmp_path / "adapter", "--out", tmp_path / "out")
    code, _, err = run_sfa(capsys, *base)
    assert code == 2
    assert "--model" in err
    code, _, err = run_sfa(capsys, *base, "--model", tmp_path / "nothing")
    assert code == 2
    assert "cannot be loaded" in err
    assert len(err.splitlines()) == 1
    code, _, err = run_sfa(capsys, *base, "--model", tmp_path / "base")
    assert code == 0, err
    with torch.no_grad():
        assert_close(loaded(tmp_path / "out")(**inputs)[0], tower(**inputs)[0])
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    code, _, err = run_sfa(capsys, "export", tmp_path / "base", "--out", tmp_path / "x")
    assert code == 2
    assert "neither recipe.json" in err
