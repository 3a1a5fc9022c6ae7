"""`auto` takes what was measured to be fastest in the nearest case, of the backends that apply."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from sfa_adapters import SFAConfig, StructuralBias, TokenLayout, attend, attention, backend_choice, inject_sfa
from sfa_adapters.adat import PatchPolicy, inject_adat, latest_plans
from sfa_adapters.backend_choice import TIMES, choose_backend, device_class, fastest, measured_cases
from sfa_adapters.choices import DEFAULT_TERMS, TERMS
from sfa_adapters.lines import lines_fit
from tests.support.triton import interpret

HEADS, WIDTH = 2, 64


@pytest.fixture(autouse=True)
def _no_kept_choices() -> Iterator[None]:
    for function in (fastest, measured_cases):
        function.cache_clear()
    yield
    for function in (fastest, measured_cases):
        function.cache_clear()


def case(tokens: int, ms: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "bias": "grid", "dtype": "float32", "width": 64, "tokens": tokens, "backward": False, "ms": ms, **changes,
    }  # fmt: skip


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, cases: list[dict[str, Any]], device: str = "cpu") -> None:
    path = folder / "times.json"
    path.write_text(json.dumps({"devices": {device: {"measured_on": "a test", "cases": cases}}}))
    monkeypatch.setattr(backend_choice, "TIMES", path)


def query(layout: TokenLayout, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    return torch.randn(layout.batch_size or 1, HEADS, layout.num_tokens, WIDTH, dtype=dtype, **options)


def factors(layout: TokenLayout, terms: Any = TERMS) -> Any:
    with torch.no_grad():
        return StructuralBias(HEADS, terms=terms).factors(layout)


def test_the_nearest_case_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = [
        case(100, {"dense": 1.0, "folded": 2.0, "blocked": 3.0}),
        case(1000, {"dense": 3.0, "folded": 2.0, "blocked": 1.0}),
        case(1000, {"dense": 3.0, "folded": 1.0, "blocked": 2.0}, width=128),
        case(5, {"dense": 3.0, "folded": 1.0, "blocked": 2.0}, width=192),
        case(1000, {"dense": 3.0, "folded": 1.0, "blocked": 2.0}, backward=True),
        case(1000, {"dense": 3.0, "folded": 1.0, "blocked": 2.0}, dtype="half"),
    ]
    use(monkeypatch, tmp_path, cases)

    def best(tokens: int, width: int = 64, backward: bool = False, dtype: Any = "float32", bias: Any = "grid") -> Any:
        return fastest("cpu", bias, dtype, width, tokens, backward)

    assert [best(tokens) for tokens in (0, 1, 90, 190, 330, 10**6)] == ["folded"] * 2 + ["dense"] * 2 + ["blocked"] * 2
    assert best(100, width=192) == "dense", "the number of tokens counts before the width"
    assert [best(1000, width) for width in (1, 80, 97, 256)] == ["blocked", "blocked", "folded", "folded"]
    assert best(10, backward=True) == best(10, dtype="half") == "folded"
    assert best(10, bias="mixed") is None
    assert fastest("sm90", "grid", "float32", 64, 100, False) is None


def test_a_matrix_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path, [case(100, {"dense": 1.0, "folded": 1.04}), case(1000, {"dense": 1.0, "folded": 1.06})])
    assert fastest("cpu", "grid", "float32", 64, 100, False) == "folded"
    assert fastest("cpu", "grid", "float32", 64, 1000, False) == "dense"


def test_a_matrix_is_not_taken_far_beyond_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path, [case(100, {"dense": 1.0, "folded": 2.0})])
    chosen = [fastest("cpu", "grid", "float32", 64, tokens, False) for tokens in (1, 200, 201, 10**6)]
    assert chosen == ["dense", "dense", "folded", "folded"]


def test_kinds_of_bias_dtypes_and_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = {"dense": 9.0, "folded": 9.0, "blocked": 9.0}
    cases = [
        case(9, {**every, "lines": 1.0}, bias="lines"),
        case(9, {**every, "lines": 1.0}, bias="lines", backward=True),
        case(9, {**every, "blocked": 1.0}),
        case(9, {**every, "folded": 1.0}, bias="mixed"),
        case(9, {**every, "dense": 1.0}, dtype="half"),
        case(9, {**every, "folded": 1.0}, backward=True),
    ]
    use(monkeypatch, tmp_path, cases)
    layout = TokenLayout.regular(3, 3)
    part = layout.select(torch.arange(7))
    states = query(layout)
    assert choose_backend(states, factors(layout, DEFAULT_TERMS)) == "lines"
    assert choose_backend(states, factors(layout)) == "blocked"
    assert choose_backend(query(part), factors(part)) == "folded"
    assert choose_backend(query(part), factors(part, DEFAULT_TERMS)) == "folded"
    assert choose_backend(query(layout, torch.bfloat16), factors(layout)) == "dense"
    assert choose_backend(query(layout, requires_grad=True), factors(layout)) == "folded"
    assert choose_backend(states, StructuralBias(HEADS, terms=TERMS).factors(layout)) == "folded"
    with torch.no_grad():
        assert choose_backend(query(layout, requires_grad=True), factors(layout)) == "blocked"
    mask = torch.zeros(9, 9)
    assert choose_backend(states, factors(layout), mask) == "dense"  # there is a matrix in any case
    trained = StructuralBias(HEADS).factors(layout)
    assert choose_backend(states, trained) == "lines"
    assert choose_backend(states, trained, mask) == "folded"  # lines takes no mask
    batch = TokenLayout.batch([layout, part])
    assert choose_backend(query(batch), factors(batch)) == "folded"


def test_triton_where_its_kernels_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ms = {"triton": 1.0, "blocked": 2.0, "folded": 3.0}
    use(monkeypatch, tmp_path, [case(9, ms), case(9, ms, backward=True)])
    layout = TokenLayout.regular(3, 3)
    states, bias = query(layout), factors(layout)
    assert choose_backend(states, bias) == "blocked"  # on a CPU they do not
    interpret(monkeypatch)
    assert choose_backend(states, bias) == "triton"
    trained = StructuralBias(HEADS, terms=TERMS).factors(layout)
    assert choose_backend(states, trained) == "triton"
    assert choose_backend(states, trained, torch.zeros(9, 9)) == "blocked"  # they take no mask
    torch.testing.assert_close(
        attend(states, states, states, bias), attend(states, states, states, bias, backend="dense")
    )


def test_without_times_it_is_folded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path, [case(9, {"dense": 1.0, "folded": 9.0})], device="sm90")
    layout = TokenLayout.regular(3, 3)
    assert choose_backend(query(layout), factors(layout)) == "folded"


def test_a_lines_bias_that_lines_cannot_compute_is_one_on_a_grid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, tmp_path, [case(9, {"lines": 1.0, "folded": 9.0}, bias="lines"), case(9, {"blocked": 1.0})])
    layout = TokenLayout.regular(3, 3)
    module = StructuralBias(HEADS)
    with torch.no_grad():
        module.get_parameter("row").fill_(-50.0)
        bias = module.factors(layout)
    assert choose_backend(query(layout), bias) == "blocked"


def test_classes_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert device_class(torch.device("cpu")) == "cpu"
    assert device_class(torch.device("cuda", 1)) == "sm90"
    monkeypatch.setattr(torch.version, "hip", "6.4")  # capabilities mean other things there
    assert device_class(torch.device("cuda", 0)) == "cuda"


@pytest.mark.parametrize("device", sorted(json.loads(TIMES.read_text())["devices"]))
def test_the_times_that_ship(device: str) -> None:
    cases = measured_cases(device)
    kinds = {(one.bias, one.dtype, one.backward) for one in cases}
    assert len(kinds) == 12, "three kinds of bias, two dtypes, with and without a backward pass"
    assert len({(one.bias, one.dtype, one.backward, one.width, one.tokens) for one in cases}) == len(cases)
    for one in cases:
        assert {"folded", "blocked"} <= set(one.ms) <= set(backend_choice.CHOICES)
        assert ("lines" in one.ms) == (one.bias == "lines") or device != "cpu"
        assert all(ms > 0 for ms in one.ms.values())


def test_what_is_chosen_on_this_cpu_is_computed() -> None:
    """On the true table: whatever it says for a kind of bias gives what `dense` gives."""
    torch.manual_seed(0)
    for side in (4, 20):
        layout = TokenLayout.regular(side, side)
        for terms in (DEFAULT_TERMS, TERMS):
            for dtype in (torch.float32, torch.bfloat16):
                bias, states = factors(layout, terms), query(layout, dtype)
                assert choose_backend(states, bias) in backend_choice.CHOICES
                assert lines_fit(states, bias) == (terms == DEFAULT_TERMS)
                expected = attend(states, states, states, bias, backend="dense")
                bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
                torch.testing.assert_close(attend(states, states, states, bias), expected, atol=bound, rtol=bound)


# -- adaptive tokens: sizes are mixed, and `folded` needs a channel for each of many rows and columns ------------------


def adaptive_tower(budget: float) -> SiglipVisionModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        num_hidden_layers=1, hidden_size=HEADS * WIDTH, intermediate_size=32, num_attention_heads=HEADS,
        image_size=448, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    tower = SiglipVisionModel(config).eval()
    levels = ((0.7, 8), (0.3, 14), (0.0, 32))
    inject_adat(tower, PatchPolicy(levels, scorer=lambda x: x.mean(1)[:, ::28, ::28].abs(), budget=budget))
    inject_sfa(tower, SFAConfig(terms=list(TERMS)))
    return tower


def page() -> torch.Tensor:
    """Densities of all sizes: a cell has the gray level of one of its pixels, `[1, 3, 448, 448]` in [-1, 1]."""
    cells = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return (cells * 2 - 1).repeat_interleave(28, 2).repeat_interleave(28, 3).expand(-1, 3, -1, -1)


@pytest.mark.parametrize("budget", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("train", [False, True])
def test_adaptive_tokens_take_folded_only_where_nothing_exact_was_faster(
    monkeypatch: pytest.MonkeyPatch, budget: float, train: bool
) -> None:
    """On the times that ship for a CPU. (At the least budget all tokens are of one size again: a grid.)"""
    tower, chosen = adaptive_tower(budget), list[Any]()
    monkeypatch.setattr(attention, "choose_backend", lambda *args: chosen.append(choose_backend(*args)) or chosen[-1])
    with torch.set_grad_enabled(train):
        tower(pixel_values=page())
    tokens = latest_plans(tower)[0].num_tokens
    assert tokens > 0.8 * budget * 1024
    alike = [
        one for one in measured_cases("cpu")
        if (one.bias, one.dtype, one.width, one.backward) == ("mixed", "float32", WIDTH, train)
    ]  # fmt: skip
    nearest = min(alike, key=lambda one: abs(math.log(one.tokens / tokens)))
    assert len(chosen) == 1
    fastest_ms = min(nearest.ms.values())
    assert nearest.ms[chosen[0]] <= backend_choice.MATRIX_GAIN * fastest_ms
    assert chosen[0] != "folded" or nearest.ms["folded"] <= backend_choice.MATRIX_GAIN * fastest_ms


@pytest.mark.parametrize("quickest", ["dense", "blocked", "folded"])
def test_what_was_fastest_is_what_adaptive_tokens_run(
    quickest: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tower = adaptive_tower(0.5)
    with torch.no_grad():
        expected = tower(pixel_values=page()).last_hidden_state
    ms = dict.fromkeys(("dense", "blocked", "folded"), 9.0) | {quickest: 1.0}
    use(monkeypatch, tmp_path, [case(512, ms, bias="mixed"), case(512, {"folded": 1.0, "blocked": 2.0})])
    for function in (fastest, measured_cases):
        function.cache_clear()
    ran: list[str] = []
    for name in ("blocked", "folded"):
        original: Any = getattr(attention, f"{name}_attention")

        def spy(*args: Any, name: str = name, original: Any = original) -> Any:
            ran.append(name)
            return original(*args)

        monkeypatch.setattr(attention, f"{name}_attention", spy)
    with torch.no_grad():
        states = tower(pixel_values=page()).last_hidden_state
    assert ran == ([] if quickest == "dense" else [quickest])
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
