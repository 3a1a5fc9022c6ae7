"""Attention maps and rollout: equal to dense maps, at the right place of the page, in readable figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch import Tensor

from sfa_adapters import inject_sfa
from sfa_adapters.analysis.map_figures import plot_maps
from sfa_adapters.analysis.maps import AttentionMap, attention_map, attention_rollout
from sfa_adapters.errors import DataError, ObservationError
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.models import build_nano
from tests.support.compare import strong_config
from tests.support.hosts import HOSTS, IMAGE
from tests.support.towers import CASES, TowerCase, set_eager

BY_NAME = {case.name: case for case in CASES}
HOST = {host.name: host for host in HOSTS}
hf_towers = pytest.mark.parametrize("case", [BY_NAME[n] for n in ("clip", "siglip", "internvit")], ids=str)


def dense_maps(tower: Any, inputs: dict[str, Any]) -> Tensor:
    """Whole attention maps, `[layers, B, H, N, N]`, as the eager implementation computes them."""
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(tower(**inputs, output_attentions=True).attentions)
    tower.set_attn_implementation("sdpa")
    return maps


@hf_towers
def test_a_patch_looks_where_its_row_of_the_dense_map_says(case: TowerCase) -> None:
    tower, inputs = case.fresh()
    whole = dense_maps(tower, inputs)
    token = case.prefix + 2 * 4 + 1  # row 2, column 1
    attention = attention_map(tower, inputs, patch=(2, 1), index=1)
    wanted = whole[:, 1, :, token].mean((0, 1))
    np.testing.assert_allclose(attention.values.ravel(), wanted[case.prefix :], atol=1e-6)
    assert attention.elsewhere == pytest.approx(float(wanted[: case.prefix].sum()), abs=1e-6)
    one = attention_map(tower, inputs["pixel_values"], patch=(2, 1), layers=[0, 2], heads=3)
    np.testing.assert_allclose(one.values.ravel(), whole[[0, 2], 0, 3, token].mean(0)[case.prefix :], atol=1e-6)
    adapted = attention_map(inject_sfa(tower, strong_config()), inputs, patch=(2, 1), index=1)
    assert np.abs(adapted.values - attention.values).max() > 0.01


@hf_towers
@pytest.mark.parametrize("residual", [0.5, 0.2])
@pytest.mark.parametrize("eager", [False, True])
def test_rollout_equals_the_product_of_dense_maps(case: TowerCase, residual: float, eager: bool) -> None:
    tower, inputs = case.fresh()
    whole = dense_maps(tower, inputs).mean(2).double()
    if eager:
        set_eager(case, tower)
    product = torch.eye(whole.shape[-1], dtype=torch.float64)
    for layer in whole[:, 1]:
        product = (residual * torch.eye(len(layer)) + (1 - residual) * layer) @ product
    token = case.prefix + 3
    rollout = attention_rollout(tower, inputs, patch=(0, 3), residual=residual, index=1)
    np.testing.assert_allclose(rollout.values.ravel(), product[token, case.prefix :], atol=1e-6)
    assert rollout.elsewhere == pytest.approx(float(product[token, : case.prefix].sum()), abs=1e-6)
    everywhere = attention_rollout(tower, inputs, residual=residual, index=1)
    wanted = product[case.prefix :, case.prefix :].mean(0)
    np.testing.assert_allclose(everywhere.values.ravel(), wanted, atol=1e-6)
    assert everywhere.values.sum() + everywhere.elsewhere == pytest.approx(1.0, abs=1e-6)


def test_rollout_leaves_out_layers_that_the_host_does_not_read() -> None:
    host = HOST["llava"]
    model: Any = host.build()
    maps = dense_maps(model.model.vision_tower, {"pixel_values": host.inputs()["pixel_values"]}).mean(2)[:, 0]
    half = torch.eye(17) / 2
    wanted = ((maps[1] / 2 + half) @ (maps[0] / 2 + half))[1:, 1:].mean(0)
    np.testing.assert_allclose(attention_rollout(model, host.inputs()).values.ravel(), wanted, atol=1e-6)


@pytest.mark.parametrize(("name", "grid"), [("llava", (4, 4)), ("internvl", (2, 2)), ("qwen2_5_vl", (4, 2))])
def test_an_answer_token_looks_where_the_row_that_predicts_it_says(name: str, grid: tuple[int, int]) -> None:
    host = HOST[name]
    model: Any = host.build()
    model.generation_config.eos_token_id = None
    inputs = host.inputs()
    inputs["input_ids"][1, :1], inputs["attention_mask"][1, :1] = 0, 0  # padded on the left
    model.set_attn_implementation("eager")
    options = {"output_attentions": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 4}
    with torch.no_grad():
        out = model.generate(**inputs, **options)
    model.set_attn_implementation("sdpa")
    places = inputs["input_ids"][1] == IMAGE
    for token in (0, 3):
        rows = torch.stack([layer[1, :, -1, : len(places)] for layer in out.attentions[token]])  # [layers, H, keys]
        attention = attention_map(model, inputs, answer_token=token, index=1)
        assert attention.values.shape == grid
        np.testing.assert_allclose(attention.values.ravel(), rows.mean((0, 1))[places], atol=1e-5)
        assert attention.elsewhere == pytest.approx(1 - float(rows.mean((0, 1))[places].sum()), abs=1e-5)
        assert attention.how["token_id"] == int(out.sequences[1, len(places) + token])
    head = attention_map(model, inputs, answer_token=0, layers=1, heads=2, index=1)
    np.testing.assert_allclose(head.values.ravel(), out.attentions[0][1][1, 2, -1, : len(places)][places], atol=1e-5)


def test_a_newline_behind_the_image_has_no_place_and_grids_can_be_given() -> None:
    nano = build_nano("llava_onevision")
    inputs = encode(nano, [np.full((144, 144, 3), 255, np.uint8)], ["What is the value of A?"])
    assert attention_map(nano.model, inputs, answer_token=0).values.shape == (12, 12)
    assert attention_map(nano.model, inputs, answer_token=0, grid=(5, 29)).values.shape == (5, 29)
    with pytest.raises(DataError, match=r"145 image tokens, which is none of the grids \[\(7, 7\)\]"):
        attention_map(nano.model, inputs, answer_token=0, grid=(7, 7))


def simple(patch: tuple[int, int] | None = (1, 2), scale: float = 1.0) -> AttentionMap:
    values = scale * np.arange(12.0).reshape(3, 4) / 100
    how = {"query": "patch" if patch else "rollout"}
    return AttentionMap(values, 1 - values.sum(), patch, how)


def texts(figure: Any) -> list[Text]:
    figure.canvas.draw()
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def test_exports_and_figures(tmp_path: Path) -> None:
    attention = simple()
    rows = attention.table()
    assert rows[6] == {"row": 1, "column": 2, "attention": pytest.approx(0.06)}
    assert sum(row["attention"] for row in rows) + attention.elsewhere == pytest.approx(1)
    assert json.loads(attention.to_json())["options"]["grid"] == [3, 4]
    with attention.to_csv(tmp_path / "map.csv").open(encoding="utf-8") as file:
        assert [float(row["attention"]) for row in csv.DictReader(file)] == [row["attention"] for row in rows]
    page = np.full((60, 80, 3), 255, np.uint8)
    figures = [attention.figure(page), attention.figure(), simple(None).figure(255 - page)]
    figures.append(plot_maps(page, attention, simple(scale=0.5)))
    for figure in figures:
        assert min(float(t.get_fontsize()) for t in texts(figure)) >= 15
    words = {t.get_text() for t in texts(figures[-1])}
    assert {"before", "after", "after - before", "attention on a patch, %", "percentage points"} <= words
    drawn: list[Any] = list(figures[-1].axes)
    heat, change = (drawn[n].images[0] for n in (1, 2))
    np.testing.assert_allclose(heat.get_array(), 50 * attention.values)
    assert heat.get_clim() == (0, 11)  # of both maps
    np.testing.assert_allclose(change.get_array(), -50 * attention.values)
    assert change.get_clim() == (-5.5, 5.5)
    frame = drawn[0].patches[-1]
    assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (40, 20, 20, 20)
    with pytest.raises(DataError, match="Two maps of one query"):
        plot_maps(page, attention, simple((0, 0)))
    with pytest.raises(DataError, match="uint8"):
        attention.figure(page.astype(float))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("neither", {}, "either patch"),
    ("both", {"patch": (0, 0), "answer_token": 0}, "either patch"),
    ("outside", {"patch": (4, 0)}, "4 rows and 4 columns"),
    ("layer", {"patch": (0, 0), "layers": 2}, "layers 0 to 1"),
    ("head", {"patch": (0, 0), "heads": 4}, "0 to 3"),
    ("image", {"patch": (0, 0), "index": 2}, "the tower saw 2 images"),
    ("prompt", {"answer_token": 0, "index": 2}, "2 prompts"),
    ("token", {"answer_token": -1}, "count from 0"),
]


@pytest.mark.parametrize(("options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        attention_map(HOST["llava"].build(), HOST["llava"].inputs(), **options)


def test_what_cannot_be_drawn_is_named() -> None:
    host = HOST["llava"]
    model: Any = host.build()
    inputs = host.inputs()
    with pytest.raises(DataError, match="keyword arguments"):
        attention_map(model, inputs["pixel_values"], answer_token=0)
    right = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    right["attention_mask"][0, -1] = 0
    with pytest.raises(DataError, match="on the left"):
        attention_map(model, right, answer_token=0)
    model.generation_config.eos_token_id = int(model.generate(**inputs, max_new_tokens=1)[0, -1])
    with pytest.raises(DataError, match="the answer has 1 tokens"):
        attention_map(model, inputs, answer_token=2)
    with pytest.raises(DataError, match="residual=2"):
        attention_rollout(model, inputs, residual=2)
    windows, patches = BY_NAME["qwen2_5"].fresh()
    with pytest.raises(ObservationError, match="no fixed"):
        attention_rollout(windows, patches)
