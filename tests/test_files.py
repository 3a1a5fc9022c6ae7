"""Files and folders are written whole or not at all."""

import errno
from pathlib import Path

import pytest

from sfa_adapters.errors import TrainingError
from sfa_adapters.files import MANIFEST, draft_folder, what_is_missing, whole_folder, write_whole


def _half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full behind the first letters."""
    write = Path.write_text

    def half(self: Path, text: str, **options: object) -> int:
        write(self, text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)


def test_a_file_is_written_whole_and_its_folder_made(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.json"
    write_whole(file, "größer")
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
