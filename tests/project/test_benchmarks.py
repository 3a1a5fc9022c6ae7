"""The benchmarks of attention run on small pages, and write what `auto` can read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import backend_table
from benchmarks.attention_cases import CANDIDATES, AttentionCase, candidates, mixed_layout
from benchmarks.common import RESULTS
from sfa_adapters import TokenLayout, backend_choice
from sfa_adapters.backend_choice import fastest, measured_cases
from sfa_adapters.choices import DEFAULT_TERMS, TERMS


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.md")), ids=lambda path: path.stem)
def test_commands_of_results_name_no_path_of_one_machine(path: Path) -> None:
    commands = [line for line in path.read_text(encoding="utf-8").splitlines() if "python -m benchmarks" in line]
    assert not [line for line in commands if re.search(r"[\s=`\"']/\w", line)]


def case(layout: TokenLayout, backward: bool, terms: tuple[str, ...] = DEFAULT_TERMS) -> AttentionCase:
    return AttentionCase(layout, "small", terms, torch.float32, 2, 8, 1, backward)  # pyright: ignore[reportArgumentType]


def test_candidates_that_do_not_apply_are_left_out() -> None:
    """Each would be another backend under its name."""
    names = [name for name in CANDIDATES if name != "flex"]  # which compiles for a minute
    page, mixed = TokenLayout.regular(4, 4), mixed_layout(40, torch.device("cpu"))
    assert mixed.num_tokens == 40
    always = {"plain", "dense", "folded", "blocked", "auto", "eager"}
    assert set(candidates(case(page, backward=False), names)) == always | {"lines", "cached"}
    assert set(candidates(case(page, backward=True), names)) == always | {"lines"}
    assert set(candidates(case(page, backward=True, terms=TERMS), names)) == always
    assert set(candidates(case(mixed, backward=True), names)) == always
    assert "flex" not in candidates(case(page, backward=True), ["flex"])


@pytest.mark.parametrize("backward", [False, True])
def test_candidates_compute_the_same_attention(backward: bool) -> None:
    """Those with the default terms; `plain` has no bias and `eager` all terms."""
    calls = candidates(case(TokenLayout.regular(4, 4, 1), backward), ["dense", "folded", "blocked", "lines", "auto"])
    expected = calls.pop("dense")()
    assert not torch.equal(calls.pop("plain")(), expected)  # pyright: ignore[reportArgumentType]
    for name, call in calls.items():
        torch.testing.assert_close(call(), expected, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_written_is_what_auto_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend_table, "GRIDS", ((3, 4),))
    monkeypatch.setattr(backend_table, "WIDTHS", (8,))
    path = tmp_path / "times.json"
    path.write_text('{"devices": {"sm90": {"measured_on": "kept", "cases": []}}}')
    assert backend_table.write_table(torch.device("cpu"), path) == path
    assert '"kept"' in path.read_text()
    monkeypatch.setattr(backend_choice, "TIMES", path)
    try:
        for function in (fastest, measured_cases):
            function.cache_clear()
        cases = measured_cases("cpu")
        assert {(one.bias, one.dtype, one.backward) for one in cases} == {
            (bias, dtype, backward)
            for bias in ("lines", "grid", "mixed")
            for dtype in ("float32", "half")
            for backward in (False, True)
        }
        assert all(set(one.ms) <= {"dense", "folded", "blocked", "lines"} for one in cases)
        assert fastest("cpu", "mixed", "half", 8, 12, True) in ("dense", "folded", "blocked")
    finally:
        for function in (fastest, measured_cases):
            function.cache_clear()
