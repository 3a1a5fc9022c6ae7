"""Records with a mistake in them: a test of the suite sees each, and says what is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfa_adapters.vlm import records
from sfa_adapters.vlm.page import Page
from sfa_adapters.vlm.records import vlm_spec
from sfa_adapters.vlm.sizes import Lengths
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

# Plugins of this run that must not be there twice.
ONCE = ("terminal", "timeout", "faulthandler", "logging", "cacheprovider", "xdist", "hypothesispytest", "randomly")


class Reports:
    """A plugin of pytest that keeps what was run."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid}: {report.longrepr}")
        elif report.passed and report.when == "call":
            self.passed.append(report.nodeid)


def suite_over(family: str, test: str, folder: Path) -> Reports:
    """Runs one test of the suite over the record of this name."""
    file, reports = folder / "test_record.py", Reports()
    imported = "from sfa_adapters.testing.hosts import VLMContract\n\n\n"
    file.write_text(f"{imported}class TestRecord(VLMContract):\n    family = {family!r}\n", encoding="utf-8")
    without = [part for name in ONCE for part in ("-p", f"no:{name}")]
    options = ["-s", "-c", os.devnull, "--rootdir", str(folder), "--import-mode=importlib", *without, str(file)]
    try:
        pytest.main([*options, "-k", test], plugins=[reports])
    finally:
        sys.modules.pop("test_record", None)  # the next file has the same name
    return reports


def _memory(spec: VLMSpec, change: Callable[[Lengths], Lengths]) -> VLMSpec:
    assert spec.memory is not None
    lengths = spec.memory.lengths
    return replace(spec, memory=replace(spec.memory, lengths=lambda *given: change(lengths(*given))))


def _images(spec: VLMSpec, **changes: Any) -> VLMSpec:
    assert spec.images is not None
    return replace(spec, images=replace(spec.images, **changes))


def _shifted(image: np.ndarray, processor: Any, limit: int) -> Page:
    """Padded on the left, and nobody says so."""
    return replace(Page.unchanged(image), image=np.pad(image, ((0, 0), (20, 0), (0, 0))))


MISTAKES: dict[str, tuple[str, Callable[[VLMSpec], VLMSpec], str, str]] = {
    "another class": (
        "llava", lambda spec: replace(spec, model_class="LlavaModel"), "record_is_that_of", "LlavaForConditional"
    ),
    "no class of the core": (
        "llava", lambda spec: replace(spec, classes=spec.classes[:1]), "record_is_that_of", "classes must name the core"
    ),
    "no small model": ("llava", lambda spec: replace(spec, nano=None), "record_is_that_of", "write the record's nano"),
    "words in the projector": (
        "llava",
        lambda spec: replace(spec, projector=("model.multi_modal_projector", "model.language_model.embed_tokens")),
        "every_parameter",
        "'projector'",
    ),
    "a layer of the tower in the projector": (
        "llava",
        lambda spec: replace(spec, projector=("model.multi_modal_projector", "model.vision_tower.encoder.layers.0")),
        "every_parameter",
        "'projector'",
    ),
    "no class of the tower's layers": (
        "llava",
        lambda spec: replace(spec, layer_classes=("LlamaDecoderLayer",)),
        "every_parameter",
        "layer_classes lacks that of model.vision_tower",
    ),
    "nothing unread": (
        "llava", lambda spec: replace(spec, unread=()), "never_reads", "post_layernorm.weight; name them in unread"
    ),
    "unread is read": (
        "llava",
        lambda spec: replace(spec, unread=(*spec.unread, "embeddings")),
        "never_reads",
        "position_embedding.weight, which the host reads",
    ),
    "no limit of tiles": (
        "internvl", lambda spec: _images(spec, options=ImageRules().options), "limits_an_image", "assert 48 < 48"
    ),
    "a page that is padded in silence": ("internvl", lambda spec: _images(spec, page=_shifted), "boxes", "> 200"),
    "too few image tokens for memory": (
        "internvl", lambda spec: _memory(spec, lambda a: replace(a, image=a.image - 1)), "memory", "assert 48 <= 47"
    ),
    "too many image tokens for memory": (
        "internvl", lambda spec: _memory(spec, lambda a: replace(a, image=2 * a.image)), "memory", "96"
    ),
    "tokens that are not merged": (
        "internvl", lambda spec: replace(spec, image_tokens=ImageTokens(kind="pixel_shuffle")), "dymu", ""
    ),
    "tiles that are not packed": (
        "llava_onevision", lambda spec: replace(spec, image_tokens=ImageTokens(kind="patches")), "dymu", ""
    ),
    "adaptive tokens that no tower takes": ("qwen2_5_vl", lambda spec: replace(spec, refuses={}), "adat", "adat"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_record_is_seen(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, change, test, message = MISTAKES[mistake]
    monkeypatch.setitem(records._SPECS, family, change(vlm_spec(family)))
    reports = suite_over(family, test, tmp_path)
    assert reports.failed
    assert all(message in report for report in reports.failed), reports.failed


def test_the_same_records_without_a_mistake_pass_the_same_tests(tmp_path: Path) -> None:
    """Else a mistake of the harness would be taken for one of a record."""
    reports = suite_over("llava", "record_is_that_of or every_parameter", tmp_path)
    assert (len(reports.passed), reports.failed) == (2, [])
