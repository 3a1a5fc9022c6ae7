"""Whole models whose towers work on one sequence of patches: what trains, and which features take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfa_adapters import describe, inject_sfa
from sfa_adapters.adat import inject_adat
from sfa_adapters.errors import InjectionError
from sfa_adapters.reduction.dymu.config import DyMUConfig
from sfa_adapters.reduction.dymu.inject import inject_dymu
from sfa_adapters.reduction.fastv.inject import FastVConfig, eject_fastv, inject_fastv
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.towers_minicpm import MINICPM_VIT
from sfa_adapters.testing.towers_navit import NAVIT, NAVIT_RASTER, NAVIT_WINDOWS
from tests.support import compare
from tests.support.compare import Snapshot
from tests.support.hosts import lm_loss, logits_of
from tests.support.navit_hosts import BUILD, prompts

FAMILIES = (*NAVIT, *NAVIT_RASTER, *NAVIT_WINDOWS, *MINICPM_VIT)
TOWERS = {case.name: case for case in FAMILIES if isinstance(case, TowerCase)}
every_navit = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("qwen3_vl", "paddleocr_vl") else pytest.mark.nightly) for name in BUILD],
)


@every_navit
def test_every_layer_of_the_tower_trains_in_its_host(name: str) -> None:
    """Qwen3-VL reads its first layers as well, and each of them up to the last."""
    model, inputs = BUILD[name](), prompts(name)
    plain = logits_of(model, inputs)
    inject_sfa(model, compare.strong_config())
    assert (describe(model).num_layers, describe(model).tower_layers) == (3, 3)
    assert compare.difference(logits_of(model, inputs), plain) > 1e-4
    compare.freeze_base(model)
    lm_loss(model, inputs).backward()
    dead = [key for key, p in compare.structural(model).items() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


@every_navit
def test_fastv_works_or_says_why_not(name: str) -> None:
    model, inputs = inject_sfa(BUILD[name](), compare.strong_config()), prompts(name)
    before = logits_of(model, inputs)
    if name == "qwen3_5":
        with pytest.raises(InjectionError, match=r"Qwen3\.5: .* linear attention, whose state would miss tokens"):
            inject_fastv(model, FastVConfig())
        return
    if name == "qwen3_vl":
        with pytest.raises(InjectionError, match="adds image features after each of its first 1 layers"):
            inject_fastv(model, FastVConfig(prune_at="input"))
    for selector in ("attention", "random", "density"):
        inject_fastv(model, FastVConfig(k=2, selector=selector))
        assert compare.difference(logits_of(model, inputs)[:, -1], before[:, -1]) > 1e-6
        eject_fastv(model)
        assert torch.equal(logits_of(model, inputs), before)


@pytest.mark.parametrize("name", [n for n in ("qwen3_vl", "hunyuan_vl", "exaone4_5", "minicpmv4_6") if n in TOWERS])
def test_tokens_cannot_merge_in_these_towers(name: str) -> None:
    tower = TOWERS[name].build()
    snapshot, kind = Snapshot(tower), type(tower).__name__
    with pytest.raises(InjectionError, match=rf"{kind}.*cannot merge: its order of tokens.*DyMU takes CLIP"):
        inject_dymu(tower, DyMUConfig(language="off"))
    with pytest.raises(InjectionError, match=kind):
        inject_adat(tower)
    snapshot.assert_unchanged(tower)


def test_the_host_of_such_a_tower_is_refused_for_the_tower() -> None:
    model: Any = BUILD["qwen3_vl"]()
    with pytest.raises(InjectionError, match="Qwen3-VL: features of several layers of its tower"):
        inject_dymu(model)
