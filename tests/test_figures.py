"""Figures of a learned bias show the values of its formula."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from sfa_adapters import SFAConfig, TokenLayout, inject_sfa
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import InjectionError
from sfa_adapters.figures import bias_around, bias_table, plot_bias, write_bias_table
from sfa_adapters.tuner import injected_layers


def _tower(config: SFAConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=70,
            patch_size=14,
        )
    )
    return inject_sfa(tower, config or SFAConfig(init_std=1.0, terms=list(TERMS)))


def test_the_map_is_the_formula() -> None:
    (_, _, layer), _ = injected_layers(_tower())
    weights = layer.weights("default")
    phi = bias_around(layer, "default", (5, 4), centre=(1, 2))
    assert phi.shape == (4, 5, 4)
    assert weights.row is not None
    assert weights.col is not None
    assert weights.dist is not None
    assert weights.block is not None
    block = TokenLayout.regular(5, 4).block.reshape(5, 4)
    for row in range(5):
        for column in range(4):
            distance = (abs(row - 1) + abs(column - 2)) / 7
            expected = weights.row * (row == 1) + weights.col * (column == 2) - weights.dist * distance
            expected = expected + weights.block[:, block[1, 2]] * weights.block[:, block[row, column]]
            torch.testing.assert_close(phi[:, row, column], expected.detach())


def test_the_table_holds_every_scalar(tmp_path: Path) -> None:
    tower = _tower()
    rows = bias_table(tower)
    assert len(rows) == 2 * 4
    _, (_, _, layer) = injected_layers(tower)
    weights = layer.weights("default")
    assert weights.dist is not None
    assert weights.block is not None
    assert rows[-1]["w_dist"] == weights.dist[3].item()
    assert rows[-1]["e15"] == weights.block[3, 15].item()
    with write_bias_table(tower, tmp_path / "bias.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert float(read[3]["w_row"]) == pytest.approx(rows[3]["w_row"], abs=1e-6)


def test_terms_that_are_off_are_left_out(tmp_path: Path) -> None:
    tower = _tower(SFAConfig(terms=["row", "dist"]))
    assert list(bias_table(tower)[0]) == ["layer", "head", "w_row", "w_dist"]
    assert plot_bias(tower, tmp_path / "bias.png").stat().st_size > 10_000


def test_many_heads_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    for most in (8, 2):
        monkeypatch.setattr("sfa_adapters.figures.MOST_COLUMNS", most)
        with Image.open(plot_bias(_tower(), tmp_path / f"{most}.png", grid=(3, 7))) as image:
            widths.append(image.width)
    assert widths[1] < 0.7 * widths[0]


def test_a_model_without_the_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InjectionError, match="'bars'"):
        plot_bias(_tower(), tmp_path / "bias.png", adapter_name="bars")
