"""Towers of SGLang itself with the plug-in, on a CPU: `scripts/test-sglang`, in an environment of its own.

Its servers need kernels that are built for GPUs only, so what is compared is the features that the language model would
get. Model class, weight loader, hooks and attention are SGLang's.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from sfa_adapters import SFAConfig, inject_sfa, load_sfa, save_sfa
from sfa_adapters.recipes.nano.served import write_served

pytest.importorskip("sglang", reason="needs SGLang: scripts/test-sglang")
pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
GRIDS = torch.tensor([[1, 6, 10], [1, 4, 4]])
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def _write_qwen2_vl(folder: Path) -> tuple[Path, Path]:
    """As `write_served`; there is no nano host of this family."""
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 400,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 3, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "in_chans": 3},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen2VLForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if "visual" in name and parameter.ndim > 1:
                parameter.data.mul_(4)  # so that the bias changes much
        model.save_pretrained(folder / "host")
        inject_sfa(model, SFAConfig(terms=["row", "col", "dist", "block"], init_strength=3.0, init_std=1.0))
    save_sfa(model, folder / "adapter")
    return folder / "host", folder / "adapter"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[str, tuple[Path, Path]] = {}

    def write(family: str) -> tuple[Path, Path]:
        if family not in done:
            folder = tmp_path_factory.mktemp(family)
            done[family] = _write_qwen2_vl(folder) if family == "qwen2_vl" else write_served(family, folder)
        return done[family]

    return write


def _pixels(host: Path) -> Tensor:
    vision: Any = AutoModelForImageTextToText.from_pretrained(host).config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return torch.randn(int(GRIDS.prod(1).sum()), width, generator=torch.Generator().manual_seed(3))


def _of_transformers(host: Path, adapter: Path | None) -> Tensor:
    model: Any = AutoModelForImageTextToText.from_pretrained(host, dtype=torch.float32).eval()
    if adapter is not None:
        model = load_sfa(model, adapter)
    with torch.no_grad():
        out = model.model.visual(_pixels(host), grid_thw=GRIDS)
    return torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=1)


def _of_sglang(host: Path, folder: Path, adapter: Path | None, ranks: int = 1) -> tuple[list[Tensor], list[str]]:
    """Features of each process, none where they failed, and what each said."""
    given = folder / "given.safetensors"
    save_file({"pixels": _pixels(host), "grids": GRIDS}, given)
    targets = [folder / f"features_{rank}.safetensors" for rank in range(ranks)]
    for target in targets:
        target.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "SFA_ADAPTER"} | {"HF_HUB_OFFLINE": "1"}
    if adapter is not None:
        environment["SFA_ADAPTER"] = str(adapter)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.serving.sglang_features", str(host), str(given)]
    started = [
        subprocess.Popen(
            [*command, str(target), str(port), str(rank), str(ranks)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, target in enumerate(targets)
    ]  # fmt: skip
    texts = [process.communicate()[0] for process in started]
    assert all((p.returncode == 0) == t.exists() for p, t in zip(started, targets, strict=True)), texts[0][-3000:]
    return [load_file(target)["features"] for target in targets if target.exists()], texts


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_transformers(family: str, written: Any, tmp_path: Path) -> None:
    host, adapter = written(family)
    expected, without = _of_transformers(host, adapter), _of_transformers(host, None)
    assert (without - expected).norm() > 1e-2 * expected.norm()
    (got,), (text,) = _of_sglang(host, tmp_path, adapter)
    assert "acts in 3 of 3 layers" in text
    assert (got - expected).norm() < 1e-4 * expected.norm()
    (got,), (text,) = _of_sglang(host, tmp_path, None)
    assert (got - without).norm() < 1e-4 * without.norm()
    assert "SFA" not in text


def test_two_processes_share_the_heads(written: Any, tmp_path: Path) -> None:
    host, adapter = written("qwen2_5_vl")
    expected = _of_transformers(host, adapter)
    got, texts = _of_sglang(host, tmp_path, adapter, ranks=2)
    assert len(got) == 2, texts[0][-3000:]
    for features, text in zip(got, texts, strict=True):
        assert "acts in 3 of 3 layers" in text
        assert (features - expected).norm() < 1e-4 * expected.norm()


def test_what_stops_it(written: Any, tmp_path: Path) -> None:
    """SGLang goes on when a plug-in fails, so the plug-in must not."""
    host, _ = written("qwen2_5_vl")
    got, (text,) = _of_sglang(host, tmp_path, tmp_path / "nowhere")
    assert not got
    assert text.splitlines()[-1].startswith("SFA: ")
    assert "nowhere is no folder" in text.splitlines()[-1]
    got, (text,) = _of_sglang(host, tmp_path, written("qwen3_vl")[1])
    assert not got
    assert re.search(r"ServingError: The adapter .* does not fit", text), text[-3000:]
