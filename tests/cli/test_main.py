"""The command line: what it prints, and that a mistake of the user is one line and exit code 2."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from safetensors import SafetensorError
from transformers import CLIPVisionConfig, InternVLConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig, ResNetConfig

from sfa_adapters.cli.main import main
from sfa_adapters.install import install_command
from sfa_adapters.recipes.catalog import RECIPES, find_recipe
from sfa_adapters.testing import modeling_intern_vit
from sfa_adapters.testing.modeling_intern_vit import InternVisionConfig

SMALL_LLAVA = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    ),
    text_config=LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ),
    vision_feature_layer=-2,
)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    out, err = capsys.readouterr()
    code = left.value.code
    assert isinstance(code, int)
    return code, out, err


def _mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, _, err = _run(capsys, *arguments)
    lines = err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("sfa: ")
    return lines[0]


def test_help_shows_the_commands_and_an_example_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "--help")
    assert code == 0
    assert "demo" in out
    assert "inspect" in out
    for command in ("demo", "inspect"):
        code, out, _ = _run(capsys, command, "--help")
        assert code == 0
        assert f"Example:  sfa {command} " in out


def test_python_m_is_the_same_program() -> None:
    command = [sys.executable, "-m", "sfa_adapters", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("sfa-adapters ")


def test_inspect_a_folder_that_holds_only_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    InternVLConfig(architectures=["InternVLForConditionalGeneration"]).save_pretrained(tmp_path)
    code, out, _ = _run(capsys, "inspect", str(tmp_path), "--json")
    report = json.loads(out)
    assert code == 0
    assert report["model_class"] == "InternVLForConditionalGeneration"
    assert report["sfa"]["num_parameters"] == 768
    assert report["sfa"]["grid"] == [32, 32]
    assert report["sfa"]["prefix_tokens"] == 1
    assert [layer["parameters"] for layer in report["layers"]] == [32] * 24


def test_inspect_marks_layers_that_the_host_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SMALL_LLAVA.save_pretrained(tmp_path)
    code, out, _ = _run(capsys, "inspect", str(tmp_path))
    assert code == 0
    assert "2 of 3, 4 heads each" in out
    assert "4x4 patches, 1 prefix" in out
    dead = next(line for line in out.splitlines() if "not read by the host" in line)
    assert "layers.2" in dead


def test_inspect_a_tower_of_any_image_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Qwen2_5_VLConfig().save_pretrained(tmp_path)
    code, out, _ = _run(capsys, "inspect", str(tmp_path))
    assert code == 0
    assert "any size" in out
    assert "qwen2_5_vit" in out


def test_inspect_a_timm_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "inspect", "vit_base_patch16_siglip_384")
    assert code == 0
    assert "24x24 patches, 0 prefix" in out
    assert "288" in out


def test_inspect_a_host_of_a_recipe_without_the_hub(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    for name in ("internvl3_5_8b", "OpenGVLab/InternVL3_5-8B-HF"):
        code, out, _ = _run(capsys, "inspect", name, "--json")
        assert code == 0
        report = json.loads(out)
        assert report["model"] == name
        assert report["model_parameters"] == 8_528_318_464
        assert report["sfa"]["num_parameters"] == 768


@pytest.mark.parametrize("place", ["", "final"])
def test_inspect_a_run_shows_the_bias_of_its_recipe(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SMALL_LLAVA.save_pretrained(tmp_path / "host")
    recipe = find_recipe("llava_1_5_7b").replace(model=str(tmp_path / "host"), sfa_terms=("row", "col"))
    record = {"format": 1, "host": {}, "tensors": {}, "recipe": dataclasses.asdict(recipe)}
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "recipe.json").write_text(json.dumps(record), encoding="utf-8")
    code, out, _ = _run(capsys, "inspect", str(tmp_path / "run" / place), "--json")
    assert code == 0
    report = json.loads(out)
    assert report["model_class"] == "LlavaForConditionalGeneration"
    assert report["sfa"]["num_parameters"] == 2 * 4 * 2  # layers, heads, terms


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vit_base_patch16_siglip_38", "vit_base_patch16_siglip_384"),
        ("internvl3_5_8", "internvl3_5_8b"),
        ("OpenGVLab/InternVL3_5-8B", "OpenGVLab/InternVL3_5-8B-HF"),
    ],
)
def test_inspect_suggests_the_name_that_is_near(
    name: str, meant: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    assert f"Did you mean {meant}?" in _mistake(capsys, "inspect", name)


def test_names_of_modules_and_models_are_whole_in_eighty_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    SMALL_LLAVA.save_pretrained(tmp_path)
    for arguments in (["inspect", str(tmp_path)], ["recipes"], ["inspect", "internvl3_5_8b"]):
        code, out, _ = _run(capsys, *arguments)
        assert code == 0
        assert "…" not in out
    _, out, _ = _run(capsys, "recipes")
    assert all(f" {recipe.model} " in out for recipe in RECIPES.values())


@pytest.fixture
def remote_model(tmp_path: Path) -> Path:
    """A folder whose model code comes with it."""
    config = InternVisionConfig()
    config.auto_map = {
        "AutoConfig": "modeling_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    }
    config.save_pretrained(tmp_path)
    shutil.copy(modeling_intern_vit.__file__, tmp_path)
    return tmp_path


def test_code_that_comes_with_a_model_runs_only_when_allowed(
    remote_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--trust-remote-code" in _mistake(capsys, "inspect", str(remote_model))
    # The copy that transformers makes of the code belongs to this test.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(remote_model / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, out, _ = _run(capsys, "inspect", str(remote_model), "--trust-remote-code")
    assert code == 0
    assert "internvit_remote" in out


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config.json" in _mistake(capsys, "inspect", str(tmp_path))
    assert "There is no folder" in _mistake(capsys, "inspect", str(tmp_path / "nothing"))


def test_a_broken_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert str(tmp_path) in _mistake(capsys, "inspect", str(tmp_path))


def test_a_model_without_a_known_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]).save_pretrained(tmp_path)
    line = _mistake(capsys, "inspect", str(tmp_path))
    assert "No registered backbone fits ResNetModel. It is a ResNetModel: it has no attention" in line
    assert "docs/backbones.md" in line


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (errors.OfflineModeIsEnabled("offline"), "could not be reached"),
        (OSError(101, "Network is unreachable"), "could not be reached"),
        (errors.HFValidationError("bad name"), "neither a folder nor a timm model nor"),
    ],
)
def test_a_hub_that_does_not_answer(
    raised: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    line = _mistake(capsys, "inspect", "nobody/nothing-of-this-name")
    assert message in line
    assert "nobody/nothing-of-this-name" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "bogus"),
        (["inspect"], "Missing argument"),
        (["inspect", "x", "--bogus"], "--bogus"),
        (["demo", "--steps", "many"], "'--steps'"),
        (["demo", "--steps", "-3"], "--steps -3"),
        (["demo", "--seed", "-1"], "--seed -1"),
        (["demo", "--questions", "0"], "--questions 0"),
        (["demo", "--task", "poems"], "There are tables, charts"),
        (["demo", "--host", "gpt"], "llava_onevision, internvl, llava"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _mistake(capsys, *arguments)


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {name: module for name, module in sys.modules.items() if name.startswith("sfa_adapters.recipes.")}
    for name, module in recipes.items():
        package, _, attribute = name.rpartition(".")
        monkeypatch.setattr(sys.modules[package], attribute, module, raising=False)  # undoes what imports set
    for name in recipes:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    line = _mistake(capsys, "demo", "--steps", "1")
    assert f"Run: {install_command('demo')}" in line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/x/y"), "The disk is full: /x/y could not be written"),
        (OSError(28, "No space left on device"), "The disk is full. Free some space"),
        (OSError(30, "Read-only file system", "/x/y"), "/x/y cannot be read or written: Read-only file system."),
        (OSError("no such\nthing"), "no such | thing"),
        (PermissionError(13, "Permission denied", "/x"), "/x cannot be read or written: Permission denied."),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("sfa_adapters.recipes.inspect_model.inspect_model", fail)
    assert line in _mistake(capsys, "inspect", "x")


def test_a_mistake_of_the_library_keeps_its_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("sfa_adapters.recipes.inspect_model.inspect_model", fail)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x"])


def test_wrong_use_points_to_the_help_of_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert _mistake(capsys, "bogus").endswith("(see: sfa --help)")
    assert _mistake(capsys, "bench", "bogus").endswith("(see: sfa bench --help)")
    assert _mistake(capsys, "bench", "tokens", "--bogus").endswith("(see: sfa bench tokens --help)")


def test_shell_completion_is_on() -> None:
    environment = {**os.environ, "_SFA_COMPLETE": "complete_bash", "COMP_WORDS": "sfa cal", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sfa_adapters"], check=True, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.stdout.split() == ["calibrate"]


def test_other_libraries_are_silent_and_our_own_warnings_are_a_line(tmp_path: Path) -> None:
    code = (
        "import sys, types, warnings, logging\n"
        "from sfa_adapters.cli.main import main\n"
        "def loud(*args):\n"
        "    import transformers\n"
        "    from transformers.utils import logging as bars\n"
        "    warnings.warn_explicit('chatter', UserWarning, 'x.py', 1, module='torch.nn')\n"
        "    warnings.warn_explicit('of ours', UserWarning, 'y.py', 1, module='sfa_adapters.layer')\n"
        "    logging.getLogger('bitsandbytes').warning('chatter')\n"
        "    bars.get_logger('transformers.x').warning('chatter')\n"
        "    for _ in bars.tqdm(range(3), desc='chatter'): pass\n"
        "    from sfa_adapters.errors import RecipeError\n"
        "    raise RecipeError('the end')\n"
        # In place of the module, whose import has chatter of its own: bitsandbytes warns when peft imports it.
        "sys.modules['sfa_adapters.recipes.inspect_model'] = types.SimpleNamespace(inspect_model=loud)\n"
        "sys.argv = ['sfa', 'inspect', 'x']\n"
        "main()\n"
    )
    # Who sets PYTHONWARNINGS wants to see warnings; then nothing is silenced.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stderr.splitlines() == ["note: of ours", "sfa: the end"]
    assert done.returncode == 2


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys)
    assert code == 2
    assert "inspect" in out + err
