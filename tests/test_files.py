"""Files and folders are written whole or not at all."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sfa_adapters.errors import RecipeError, TrainingError
from sfa_adapters.files import (
    MANIFEST,
    can_be_made,
    draft_folder,
    require_writable,
    seal,
    what_is_missing,
    whole_folder,
    write_whole,
    writing,
)


def _half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full behind the first letters."""
    write = Path.write_text

    def half(self: Path, text: str, **options: object) -> int:
        write(self, text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)


def test_a_file_is_written_whole_and_its_folder_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a" / "b.json"
    write_whole(file, "largest: 数")
    assert file.read_bytes() == "largest: 数".encode()
    write_whole(file, "again")
    assert file.read_text(encoding="utf-8") == "again"
    assert [path.name for path in file.parent.iterdir()] == ["b.json"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "b.json"
    write_whole(file, "before")
    _half(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "afterwards")
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (steps.append("flush"), fsync(number)))
    monkeypatch.setattr(Path, "replace", lambda self, path: (steps.append("rename"), replace(self, path)))
    write_whole(tmp_path / "b.json", "text")
    assert steps == ["flush", "rename"]


def test_two_processes_that_write_one_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write, process = tmp_path / "b.json", Path.write_text, [1]

    def interrupted(self: Path, text: str, **options: Any) -> int:
        count = write(self, text, **options)
        if process == [1]:
            process[0] = 2
            write_whole(file, "of the second")
            assert file.read_text() == "of the second"
            process[0] = 1
        return count

    monkeypatch.setattr(os, "getpid", lambda: process[0])
    monkeypatch.setattr(Path, "write_text", interrupted)
    write_whole(file, "of the first")
    assert file.read_text() == "of the first"
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_a_draft_goes_unless_it_was_renamed(tmp_path: Path) -> None:
    partial = tmp_path / ".x.partial"
    (partial / "old").mkdir(parents=True)
    with pytest.raises(ValueError, match="stop"), draft_folder(partial) as draft:  # noqa: PT012
        assert list(draft.iterdir()) == []
        (draft / "file").write_text("x")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []
    with draft_folder(partial) as draft:
        draft.rename(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_takes_the_place_of_another_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with whole_folder(folder) as partial:
        (partial / "one").write_text("1")
    assert what_is_missing(folder) == []
    with pytest.raises(TrainingError, match=r"run .*Free"), whole_folder(folder, "Free some.") as partial:  # noqa: PT012
        _half(monkeypatch)
        (partial / "two").write_text("two and more")
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, "one"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (folder / "one").write_text("longer")
    assert what_is_missing(folder) == ["one (cut off)"]
    (folder / "one").unlink()
    (folder / "one").mkdir()
    assert what_is_missing(folder) == ["one"]
    (folder / MANIFEST).write_text("{half of it")
    assert what_is_missing(folder) == [MANIFEST]


def test_a_folder_that_failed_is_not_taken_and_nothing_is_left_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with whole_folder(folder) as partial:
        (partial / "one").write_text("1")
        (partial / MANIFEST).write_text("of the folder that this one was copied from")
    with pytest.raises(ValueError, match="stop"), whole_folder(folder) as partial:  # noqa: PT012
        (partial / "two").write_text("2")
        raise ValueError("stop")
    assert what_is_missing(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, "one"])
    (tmp_path / ".run.old").mkdir()
    (tmp_path / ".run.old" / "left by a killed process").write_text("")
    with whole_folder(folder) as partial:
        (partial / "three").write_text("3")
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, "three"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_renamed_leaves_the_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, partial, rename = tmp_path / "run", tmp_path / "new", Path.rename
    for path, name in ((folder, "one"), (partial, "two")):
        path.mkdir()
        (path / name).write_text(name)

    def refused(self: Path, target: Path) -> Path:
        if self == partial:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="Input/output error"):
        seal(partial, folder)
    assert [path.name for path in folder.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (SafetensorError("Error while serializing: No space left on device"), "Error while .* No space left on device"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed"), r"\[enforce fail\] PytorchStreamWriter failed"),
    ],
)
def test_errors_of_the_disk_have_one_name(tmp_path: Path, error: Exception, reason: str) -> None:
    text = rf"^weights could not be written to .*: {reason}\. \d+\.\d\d GB are free there\. Choose another\.$"
    with pytest.raises(TrainingError, match=text) as raised, writing("weights", tmp_path / "new", "Choose another."):
        raise error
    assert raised.value.__cause__ is error


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), writing("weights", tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("check", [can_be_made, require_writable])
def test_a_folder_that_cannot_be_written_is_named_beforehand(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"output='.*run' cannot be written: Not a directory\. Choose another"):
        check(tmp_path / "file" / "run")
    tried: list[Path] = []

    def read_only(self: Path, data: bytes) -> int:
        tried.append(self.parent)
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", read_only)
        with pytest.raises(RecipeError, match=r"output='.*there' cannot be written: Read-only file system\."):
            check(tmp_path / "there")
    assert tried == [tmp_path / "there"]
    check(tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []
    check(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run").exists() == (check is require_writable)
