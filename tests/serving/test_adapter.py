"""Reading an adapter for an engine: bad folders and adapters of other towers are one clear line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sfa_adapters.errors import ServingError
from sfa_adapters.recipes.nano.served import write_served
from sfa_adapters.saved import read_scalars
from sfa_adapters.serving.adapter import adapter_folder, read_adapter


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_served("internvl", tmp_path_factory.mktemp("internvl"))


def test_the_scalars_are_those_of_the_file(internvl: tuple[Path, Path]) -> None:
    host, adapter = internvl
    read = read_adapter(adapter, host)
    saved = read_scalars(adapter)
    by_layer = {key.path.split(".")[-2]: name for name, key in saved.keys.items() if key.attribute == "sfa_row"}
    assert sorted(read.layers) == [0, 1, 2]
    for number, weights in read.layers.items():
        assert weights.row is not None
        assert torch.equal(weights.row, saved.tensors[by_layer[str(number)]])
    assert read.heads == {0: 4, 1: 4, 2: 4}
    assert read.largest > 3
    assert "row+col+dist+block, tower internvit" in str(read)


def test_folders_that_are_taken(internvl: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("sfa", "final"):
        shutil.copytree(internvl[1], tmp_path / name / name)
        assert adapter_folder(tmp_path / name) == tmp_path / name / name


def test_wrong_folders(internvl: tuple[Path, Path], tmp_path: Path) -> None:
    host, adapter = internvl
    with pytest.raises(ServingError, match="nowhere is no folder"):
        adapter_folder(tmp_path / "nowhere")
    with pytest.raises(ServingError, match="holds no SFA adapter"):
        adapter_folder(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ServingError, match=r"does not fit .*adapter_model\.safetensors cannot be read"):
        read_adapter(broken, host)
    with pytest.raises(ServingError, match=r"The configuration of .* cannot be read"):
        read_adapter(adapter, tmp_path)


def test_weights_that_were_trained_beside_the_bias_are_not_forgotten(
    internvl: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(internvl[1], run / "final")
    (run / "final" / "tuned.safetensors").write_bytes(b"")
    with pytest.raises(ServingError, match=r"holds tuned\.safetensors beside the bias.*sfa export"):
        adapter_folder(run)


def test_an_adapter_of_another_tower(internvl: tuple[Path, Path], tmp_path: Path) -> None:
    other, _ = write_served("llava", tmp_path)
    with pytest.raises(ServingError, match="does not fit") as caught:
        read_adapter(internvl[1], other)
    assert "\n" not in str(caught.value)


def test_a_model_with_code_of_its_own(internvl: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(internvl[0], tmp_path / "host")
    config = tmp_path / "host" / "config.json"
    text = config.read_text().replace("InternVLForConditionalGeneration", "InternVLChatModel")
    config.write_text(text)
    with pytest.raises(ServingError, match=r"is a InternVLChatModel, which transformers .* has no class"):
        read_adapter(internvl[1], tmp_path / "host")
