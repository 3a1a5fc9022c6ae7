"""Checkpoints: their contents, what does not fit, and what is left after a full disk or a kill."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from sfa_adapters import files
from sfa_adapters.errors import RecipeError, TrainingError
from sfa_adapters.files import what_is_missing, whole_folder
from sfa_adapters.inject import load_sfa, save_sfa
from sfa_adapters.training.checkpoints import RECORD, load_trained, save_trained, saved_recipe
from sfa_adapters.training.runs import checkpoint_to_resume
from tests.support.tiny_training import BY_NAME, At, assert_equal, recipe, run, tiny_host, trained

FAMILIES = ("internvl", "llava_onevision", "llava", "qwen2_5_vl")


def moved(**changes: Any) -> Any:
    """A host whose trained tensors are not those that it starts with."""
    host = tiny_host(recipe(**changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in host.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return host


def everything(host: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in host.model.named_parameters()}


# -- what is in them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    given = {"family": family, "lora_llm": 2, "sfa_terms": ("row", "block")}
    host = moved(**given)
    folder = save_trained(host, tmp_path / "saved")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "adapter_config.json", "adapter_model.safetensors", "lora/adapter_config.json",
        "lora/adapter_model.safetensors", "manifest.json", "recipe.json", "tuned.safetensors",
    ]  # fmt: skip
    fresh = tiny_host(recipe(**given))
    load_trained(fresh, folder, resume=True)
    assert_equal(everything(fresh), everything(host))
    assert saved_recipe(folder) == host.recipe
    evaluated = tiny_host(recipe(**given))
    evaluated.model.requires_grad_(False)
    load_trained(evaluated, folder)
    assert_equal(everything(evaluated), everything(host))


def test_the_adapters_are_what_save_sfa_and_peft_know(tmp_path: Path) -> None:
    host = moved(lora_llm=2)
    folder = save_trained(host, tmp_path / "saved")
    save_sfa(host.model, tmp_path / "sfa")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "sfa"))
    assert_equal(ours, theirs)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "sfa")]
    assert configs[0] == configs[1]
    base = BY_NAME["llava"].build()
    load_sfa(base, folder)
    with_lora: Any = PeftModel.from_pretrained(BY_NAME["llava"].build(), folder / "lora")  # pyright: ignore[reportArgumentType]
    lora = {name: p for name, p in host.model.named_parameters() if "lora_" in name}
    loaded = {name: p for name, p in with_lora.base_model.model.named_parameters() if "lora_" in name}
    assert_equal({n: p.detach() for n, p in loaded.items()}, {n: p.detach() for n, p in lora.items()})
    tuned = load_file(folder / "tuned.safetensors")
    trains = {name for name in trained(host) if host.places.part_of(name) in ("vision", "projector")}
    assert set(tuned) == trains


def test_files_of_parts_that_are_off_are_not_there(tmp_path: Path) -> None:
    folder = save_trained(moved(freeze_vision=True, freeze_projector=True), tmp_path / "adapter")
    assert not (folder / "tuned.safetensors").exists()
    assert not (folder / "lora").exists()
    folder = save_trained(moved(sfa=False), tmp_path / "tuned")
    assert not (folder / "adapter_config.json").exists()


def test_a_host_for_evaluation_takes_it_in_its_own_precision(tmp_path: Path) -> None:
    host = moved(dtype="bfloat16")
    folder = save_trained(host, tmp_path / "saved")
    name = "model.multi_modal_projector.linear_1.weight"
    assert load_file(folder / "tuned.safetensors")[name].dtype == torch.float32
    other = tiny_host(recipe(dtype="bfloat16"))
    torch.nn.Module.to(other.model.requires_grad_(False), torch.bfloat16)
    load_trained(other, folder)
    assert torch.equal(everything(other)[name], everything(host)[name].bfloat16())
    for parameter in other.model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(RecipeError, match=r"is float32\[.*needs bfloat16"):
        load_trained(other, folder)


# -- what does not fit ------------------------------------------------------------------------------------------------


def edit(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


NAME = "model.multi_modal_projector.linear_1.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: edit(f / "tuned.safetensors", lambda t: t.pop(NAME)), r"tuned.* recipe.json: 1 missing"),
        (lambda f: edit(f / "tuned.safetensors", lambda t: t.update(x=t[NAME] + 1)), "1 too many, e.g. x"),
        (lambda f: edit(f / "tuned.safetensors", lambda t: t.update({NAME: t[NAME][:3]})), r"linear_1.bias is .*\[3\]"),
        (lambda f: edit(f / "tuned.safetensors", lambda t: t.update({NAME: t[NAME].half()})), "float16.*needs float32"),
        (lambda f: (f / "tuned.safetensors").write_bytes(b"0" * 100), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / RECORD).unlink(), "has no recipe.json"),
        (lambda f: (f / RECORD).write_text("{"), "recipe.json cannot be read"),
        (lambda f: rewrite(f / RECORD, format=2), "has format 2; this version reads up to 1"),
        (lambda f: rewrite(f / RECORD, tensors={}), "does not fit the host"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_changes_nothing(change: Any, message: str, tmp_path: Path) -> None:
    folder = save_trained(moved(), tmp_path / "saved")
    (folder / files.MANIFEST).unlink()  # so that it is the content that is checked
    change(folder)
    host = tiny_host()
    before = everything(host)
    with pytest.raises(RecipeError, match=message):
        load_trained(host, folder)
    assert_equal(everything(host), before)


def test_a_checkpoint_of_another_host_is_refused(tmp_path: Path) -> None:
    folder = save_trained(moved(), tmp_path / "saved")
    other = tiny_host(recipe(family="internvl"))
    before = everything(other)
    with pytest.raises(RecipeError, match=r"of another host: LlavaFor.*this one is InternVLFor"):
        load_trained(other, folder)
    assert_equal(everything(other), before)
    for changes, message in (
        ({"sfa_terms": ("row",)}, "does not fit the host"),
        ({"lora_llm": 2}, "does not fit the host: 28 missing"),
        ({"sfa": False}, "does not fit the host: 4 too many"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_trained(tiny_host(recipe(**changes)), folder)
    with pytest.raises(RecipeError, match="does not fit the host"):
        load_trained(tiny_host(recipe(freeze_vision=True)), folder, resume=True)


def test_a_setting_of_a_newer_version_is_named(tmp_path: Path) -> None:
    folder = save_trained(moved(), tmp_path / "saved")
    (folder / files.MANIFEST).unlink()
    record = json.loads((folder / RECORD).read_text())
    rewrite(folder / RECORD, recipe={**record["recipe"], "colour": "red"})
    with pytest.raises(RecipeError, match="does not know: colour"):
        saved_recipe(folder)


def test_a_folder_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    folder = save_trained(moved(), tmp_path / "saved")
    assert what_is_missing(folder) == []
    file = folder / "tuned.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RecipeError, match=r"is not whole: tuned.safetensors \(cut off\)"):
        load_trained(tiny_host(), folder)


# -- disks that are full, and kills -----------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more than `size` bytes into any file, in the middle of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_finished_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = save_trained(moved(), tmp_path / "saved")
    old = load_file(folder / "tuned.safetensors")
    with files_of_at_most(20_000), pytest.raises(TrainingError, match=r"saved could not be written to .*GB are free"):
        save_trained(tiny_host(), folder)
    assert_equal(load_file(folder / "tuned.safetensors"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    save_trained(tiny_host(), folder)
    assert not torch.equal(load_file(folder / "tuned.safetensors")[NAME], old[NAME])


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["tensors", "optimizer", "rename"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    place: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = {
        "tensors": "sfa_adapters.training.checkpoints.save_file",
        "optimizer": "torch.save",
        "rename": "sfa_adapters.files._flush",
    }[place]
    with pytest.raises(TrainingError) as raised:
        run(tmp_path, callbacks=[At(3, lambda: monkeypatch.setattr(target, full))])
    message = str(raised.value)
    assert "checkpoint-4 could not be written" in message
    assert "the disk is full" in message
    assert "The last good checkpoint is checkpoint-2" in message
    assert sorted(path.name for path in tmp_path.glob("*check*")) == ["checkpoint-2"]
    assert not (tmp_path / ".partial").exists()
    monkeypatch.undo()
    host, _ = run(tmp_path, resume=True)
    weights = {name: p for name, p in trained(host).items() if host.places.part_of(name) != "sfa"}
    assert_equal(weights, load_file(finished / "final" / "tuned.safetensors"))


@pytest.mark.parametrize("call", [1, 4, 8])
def test_a_kill_while_a_folder_is_written_leaves_the_old_one(call: int, tmp_path: Path) -> None:
    """Killed at the first, a middle and the last flush to the disk, which follows the rename."""
    folder = tmp_path / "saved"
    write(folder, b"old")
    child = os.fork()
    if child == 0:
        flush, calls = files._flush, iter(range(1, 100))

        def killing(path: Path) -> None:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        files._flush = killing
        write(folder, b"newer")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert what_is_missing(folder) == []
    assert (folder / "a").read_bytes() == (b"newer" if call == 8 else b"old")
    write(folder, b"newest")
    assert (folder / "a").read_bytes() == b"newest"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def write(folder: Path, content: bytes) -> None:
    """A folder of five files: with manifest and itself seven flushes, and one of its parent."""
    with whole_folder(folder) as partial:
        for name in "abcde":
            (partial / name).write_bytes(content)


# -- which one is resumed ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(folder, recipe(save_steps=2, save_total_limit=3))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A run of its own with checkpoints 2, 4 and 6."""
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


SAME = {"save_steps": 2, "save_total_limit": 3}


def test_the_newest_whole_checkpoint_is_taken(copied: Path, tmp_path: Path) -> None:
    given = recipe(**SAME)
    assert checkpoint_to_resume(given, copied, True) == copied / "checkpoint-6"
    (copied / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-6 is not whole \(optimizer.pt\); resuming from checkpoint-4"):
        assert checkpoint_to_resume(given, copied, True) == copied / "checkpoint-4"
    with pytest.raises(RecipeError, match=r"checkpoint-6 cannot be resumed: optimizer.pt missing"):
        checkpoint_to_resume(given, copied, str(copied / "checkpoint-6"))
    with pytest.raises(RecipeError, match="no such folder"):
        checkpoint_to_resume(given, copied, str(copied / "checkpoint-7"))
    with pytest.raises(RecipeError, match="no checkpoint to resume from"):
        checkpoint_to_resume(given, tmp_path / "empty", True)
    assert checkpoint_to_resume(given, tmp_path / "empty", "auto") is None
    assert checkpoint_to_resume(given, tmp_path / "empty", False) is None
    with pytest.raises(RecipeError, match="already holds checkpoint-6 of an earlier run"):
        checkpoint_to_resume(given, copied, False)


def test_a_run_goes_on_as_it_began(copied: Path) -> None:
    for changes in ({"num_workers": 2}, {"logging_steps": 5}, {"save_total_limit": 1}, {"output": "elsewhere"}):
        assert checkpoint_to_resume(recipe(**{**SAME, **changes}), copied, True)
    for changes, message in (
        ({"lr": 2e-3, "seed": 3}, "lr was 0.001, is 0.002, seed was 0, is 3"),
        ({"epochs": 4.0}, "epochs was 3.0, is 4.0"),
        ({"family": "internvl"}, "of another host: llava"),
    ):
        with pytest.raises(RecipeError, match=message):
            checkpoint_to_resume(recipe(**{**SAME, **changes}), copied, True)


def test_only_so_many_checkpoints_are_kept(finished: Path, tmp_path: Path) -> None:
    assert len(list(finished.glob("checkpoint-*"))) == 3
    run(tmp_path, recipe(save_steps=1, save_total_limit=1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt"])
def test_nothing_in_a_checkpoint_is_executed(file: str, copied: Path, tmp_path: Path) -> None:
    newest = copied / "checkpoint-4"
    torch.save(Malicious(tmp_path / "pwned"), newest / file)
    with pytest.raises(RecipeError, match=rf"{file} \(cut off\) missing"):
        checkpoint_to_resume(recipe(**SAME), copied, str(newest))
    manifest = json.loads((newest / files.MANIFEST).read_text())
    (newest / files.MANIFEST).write_text(json.dumps(manifest | {file: (newest / file).stat().st_size}))
    with pytest.raises(RecipeError, match=r"optimizer.pt, scheduler.pt\) cannot be read"):
        run(copied, recipe(**SAME), resume=str(newest))
    assert not (tmp_path / "pwned").exists()
    torch.load(newest / file, weights_only=False)
    assert (tmp_path / "pwned").exists()  # the file would have done it
    with pytest.raises(pickle.UnpicklingError):
        torch.load(newest / file, weights_only=True)


def test_a_checkpoint_holds_no_more_than_what_is_known(finished: Path) -> None:
    names = {path.name for path in (finished / "checkpoint-6").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "tuned.safetensors", "recipe.json", "manifest.json",
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "skipped.json",
    }  # fmt: skip
