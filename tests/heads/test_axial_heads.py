"""`calibrate_axial`: heads by measured affinity and by gates, against slow references, on every tower."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfa_adapters import SFAConfig, calibrate_axial, inject_sfa
from sfa_adapters.adat import PatchPolicy, inject_adat
from sfa_adapters.arrangement import Windows
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import DataError, InjectionError, LayoutError, ObservationError
from sfa_adapters.heads.axial_heads import _strongest, _weakest
from sfa_adapters.heads.axis_affinity import AxisMass, axis_affinity
from sfa_adapters.heads.gate_energy import gate_energy
from sfa_adapters.heads.page_layouts import layouts_of
from sfa_adapters.observe import observe
from sfa_adapters.readers import RowProbabilities
from sfa_adapters.recipes.nano.models import build_nano
from sfa_adapters.tower_search import find_tower
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.towers import CASES, Inputs, TowerCase, set_eager

BY_NAME = {case.name: case for case in CASES}
SIGLIP = BY_NAME["siglip"]
LAYERS = [0, 1, 2]


def places(case: TowerCase, inputs: Inputs) -> list[list[tuple[int, int] | None]]:
    """Row and column of every token of each sequence that attends, None for those without a place; by hand."""
    if case.name == "qwen2_5":
        sequences: list[list[tuple[int, int] | None]] = []
        for t, h, w in inputs["grid_thw"].tolist():
            rows, columns = (axis.repeat(t) for axis in Windows(2, 2).places(h, w))
            sequences.append(list(zip(rows.tolist(), columns.tolist(), strict=True)))
        return sequences
    pixels = inputs["pixel_values"]
    patch = 16 if case.name in ("timm_cls", "timm_siglip", "timm_clip", "timm_qknorm") else 14
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    grid: list[tuple[int, int] | None] = [(row, column) for row in range(height) for column in range(width)]
    sequences = [[None] * case.prefix + grid for _ in pixels]
    if "patch_attention_mask" in inputs:
        for sequence, mask in zip(sequences, inputs["patch_attention_mask"].flatten(1).tolist(), strict=True):
            sequence[:] = [place if real else None for place, real in zip(sequence, mask, strict=True)]
    return sequences


def dense_affinity(probabilities: Tensor, sequence: list[tuple[int, int] | None]) -> Tensor:
    """Mass and chance, `[2, 2, H]`, of one sequence from its whole matrix `[H, N, N]`: pair by pair."""
    sums = torch.zeros(2, 2, len(probabilities), dtype=torch.float64)
    for i, place in enumerate(sequence):
        if place is None:
            continue
        seen = (probabilities[:, i] > 0).any(0).nonzero()[:, 0].tolist()
        for axis in (0, 1):
            beside = [j for j in seen if j != i and (other := sequence[j]) is not None and other[axis] == place[axis]]
            sums[0, axis] += probabilities[:, i, beside].double().sum(-1)
            sums[1, axis] += len(beside) / len(seen)
    return sums


def reference(case: TowerCase, tower: nn.Module, inputs: Inputs, name: str) -> Tensor:
    """Affinity of one layer, `[2, H]`."""
    whole = RowProbabilities()
    with observe(tower, whole, [name]), torch.no_grad():
        tower(**inputs) if case.library != "timm" else tower(inputs["pixel_values"])
    sequences = places(case, inputs)
    matrices = [matrix for call in whole.results[name] for matrix in call]
    if case.name == "qwen2_5":  # each segment is a part of an image; together they are the tokens in order
        flat = [place for sequence in sequences for place in sequence]
        lengths = [matrix.shape[-1] for matrix in matrices]
        assert sum(lengths) == len(flat)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        sequences = [flat[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    mass, chance = sum(dense_affinity(m, s) for m, s in zip(matrices, sequences, strict=True))  # pyright: ignore[reportGeneralTypeIssues]
    return mass / chance


def kwargs_of(case: TowerCase, inputs: Inputs) -> Inputs:
    return {"x": inputs["pixel_values"]} if case.library == "timm" else inputs


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["before", "with SFA"])
def test_affinity_is_that_of_the_dense_matrix(case: TowerCase, adapted: bool) -> None:
    tower, inputs = compare.injected(case) if adapted else case.fresh()
    vision = find_tower(tower)
    with torch.no_grad():
        measured = axis_affinity(vision, [kwargs_of(case, inputs)], LAYERS)
    for layer in LAYERS:
        name = vision.attentions[layer][0]
        expected = reference(case, tower, inputs, name)
        assert measured[layer].shape == expected.shape == (2, 4)
        compare.assert_close(measured[layer], expected, 1e-5, name)


@pytest.mark.parametrize("name", ["siglip", "clip", "timm_cls"])
def test_other_grids_and_eager_attention(name: str) -> None:
    case = BY_NAME[name]
    assert case.resized is not None
    tower, inputs = case.build(), case.resized(1)
    vision = find_tower(tower)
    with torch.no_grad():
        fused = axis_affinity(vision, [kwargs_of(case, inputs)], LAYERS)
    compare.assert_close(fused[1], reference(case, tower, inputs, vision.attentions[1][0]), 1e-5)
    set_eager(case, tower)
    with torch.no_grad():
        eager = axis_affinity(vision, [kwargs_of(case, inputs)], LAYERS)
    compare.assert_close(eager[2], fused[2], 1e-4)


def test_uniform_attention_has_affinity_one_and_rows_go_in_blocks() -> None:
    """On any grid, with a prefix; and block by block as in one piece."""
    case = BY_NAME["timm_reg4"]
    tower, inputs = case.build(), case.inputs(0)
    for name, parameter in tower.named_parameters():
        if "qkv" in name:
            nn.init.zeros_(parameter)
    vision = find_tower(tower)
    with torch.no_grad():
        uniform = axis_affinity(vision, [kwargs_of(case, inputs)], LAYERS)
    assert all(torch.allclose(ratios, torch.ones_like(ratios)) for ratios in uniform.values())
    tower, name = case.build(), vision.attentions[0][0]
    sums: list[Tensor] = []
    for size in (1, 2**23):
        with layouts_of(find_tower(tower)) as layout_of:
            reader = AxisMass(layout_of)
            with observe(tower, reader, [name], block_bytes=size), torch.no_grad():
                tower(inputs["pixel_values"])
        sums.append(reader.results[name][0])
    compare.assert_close(sums[0], sums[1], 1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("siglip", "timm_cls", "qwen2_5")], ids=str)
def test_row_and_column_heads_are_recognised(case: TowerCase) -> None:
    """Heads that were made to look along rows and columns are those that are chosen."""
    tower, inputs = case.fresh()
    planted = {0: {"row": [2], "col": [0]}, 1: {"row": [3], "col": [1]}, 2: {"row": [0], "col": [3]}}
    inject_sfa(tower, SFAConfig(init="axial", init_strength=30.0, init_heads=planted, init_std=0.0, terms=list(TERMS)))
    pages = [kwargs_of(case, part) for part in case.split(inputs)]
    assert calibrate_axial(tower, pages) == planted
    assert calibrate_axial(tower, pages, layers=[1]) == {1: planted[1]}


def test_the_largest_picks_first_and_a_head_is_never_both() -> None:
    rows = [9.0, 8.0, 1.0, 1.0, 1.0, 3.0]
    columns = [8.5, 7.0, 6.0, 1.0, 2.0, 9.5]
    assert _strongest(torch.tensor([rows, columns])) == {"row": [0, 1], "col": [2, 5]}
    assert _strongest(torch.ones(2, 7)) == {"row": [0, 1], "col": [2, 3]}
    assert _strongest(torch.tensor([[5.0, 4.0], [6.0, 1.0]])) == {"row": [1], "col": [0]}
    assert _weakest(torch.tensor([5.0, 0.0, 3.0, 1.0, 2.0, 9.0])) == {"row": [1, 4], "col": [2, 3]}
    assert _weakest(torch.zeros(3)) == {"row": [0], "col": [1]}


# -- gates -----------------------------------------------------------------------------------------------------------


def scaled(tower: nn.Module, layer: int, head: int, factor: float, inputs: Inputs) -> Tensor:
    """The output with the columns of one head of an output projection scaled; fp64."""
    output = find_tower(tower).attentions[layer][1].out_proj
    columns = slice(head * 8, head * 8 + 8)
    assert isinstance(output, nn.Linear)
    kept = output.weight.detach().clone()
    with torch.no_grad():
        output.weight[:, columns] *= factor
        states = tower(**inputs).last_hidden_state
        output.weight.copy_(kept)
    return states


def test_gate_energy_is_the_diagonal_of_the_gauss_newton_matrix() -> None:
    """Against differences of outputs: exactly for one direction, and on average for the sum of squares."""
    tower, inputs = SIGLIP.fresh()
    tower, inputs = tower.double(), {"pixel_values": inputs["pixel_values"][:1].double()}
    vision, step = find_tower(tower), 1e-4
    with torch.no_grad():
        estimate = gate_energy(vision, [inputs], LAYERS, 300, seed=0)
        single = gate_energy(vision, [inputs], LAYERS, 1, seed=3)
    direction = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(3)).double()
    for layer in LAYERS:
        for head in range(4):
            pair = [scaled(tower, layer, head, factor, inputs) for factor in (1 + step, 1 - step)]
            slope = (pair[0] - pair[1]) / (2 * step)
            assert float(estimate[layer][head]) == pytest.approx(float(slope.square().sum()), rel=0.35)
            assert float(single[layer][head]) == pytest.approx(float((slope * direction).sum().square()), rel=1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_that_do_nothing_are_the_least_important(case: TowerCase) -> None:
    tower, inputs = case.fresh()
    idle = {0: (3, 1), 1: (0, 2), 2: (2, 3)}
    for layer, heads in idle.items():
        module: Any = find_tower(tower).attentions[layer][1]
        output = next(getattr(module, n) for n in ("out_proj", "projection_layer", "proj") if hasattr(module, n))
        for head in heads:
            nn.init.zeros_(output.weight[:, head * 8 : head * 8 + 8])
    pages = [kwargs_of(case, part) for part in case.split(inputs)]
    chosen = calibrate_axial(tower, pages, by="gate", projections=2)
    assert {layer: {*axes["row"], *axes["col"]} for layer, axes in chosen.items()} == {
        layer: set(heads) for layer, heads in idle.items()
    }
    assert all(len(axes["row"]) == len(axes["col"]) == 1 for axes in chosen.values())


# -- the function itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["affinity", "gate"])
def test_the_choice_is_data_for_the_configuration(by: Any) -> None:
    tower, inputs = SIGLIP.fresh()
    chosen = calibrate_axial(tower, inputs["pixel_values"], by=by)
    assert list(chosen) == LAYERS
    assert json.loads(json.dumps(chosen)) == {str(layer): axes for layer, axes in chosen.items()}
    config = SFAConfig(init="axial", init_heads=chosen)
    for _, _, layer in injected_layers(inject_sfa(tower, config)):
        strong = {
            axis: (layer.tensors("default")[f"sfa_{axis}"] == 3).nonzero()[:, 0].tolist() for axis in ("row", "col")
        }
        assert strong == chosen[layer.index]


@pytest.mark.parametrize("by", ["affinity", "gate"])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_is_left_as_it_was(by: Any, adapted: bool) -> None:
    tower = SIGLIP.build()
    if adapted:
        inject_sfa(tower)
    tower.train()
    next(tower.parameters()).requires_grad_(False)
    before, seed, gradients = compare.Snapshot(tower), torch.get_rng_state(), torch.is_grad_enabled()
    first = calibrate_axial(tower, SIGLIP.inputs(0)["pixel_values"], by=by)
    before.assert_unchanged(tower)
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.is_grad_enabled() == gradients
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert calibrate_axial(tower, SIGLIP.inputs(0)["pixel_values"], by=by) == first
    with pytest.raises(RuntimeError, match="size of tensor"):
        calibrate_axial(tower, torch.randn(1, 3, 57, 91), by=by)
    before.assert_unchanged(tower)


def test_a_whole_host_and_half_precision() -> None:
    model: Any = build_nano("llava").model
    model.to(torch.bfloat16)
    chosen = calibrate_axial(model, torch.randn(1, 3, 144, 144, generator=torch.Generator().manual_seed(0)))
    assert sorted(chosen) == list(range(4))
    assert all(len(axes["row"]) == len(axes["col"]) == 1 for axes in chosen.values())
    inject_sfa(model, SFAConfig(init="axial", init_heads=chosen))


def test_layers_with_a_single_head_are_left_out() -> None:
    tower, inputs = SIGLIP.fresh()
    attentions: list[Any] = [module for _, module in find_tower(tower).attentions]
    attentions[1].num_heads, attentions[1].head_dim = 1, 32
    assert list(calibrate_axial(tower, inputs["pixel_values"])) == [0, 2]
    with pytest.raises(InjectionError, match=r"No layer of \[1\] has two heads"):
        calibrate_axial(tower, inputs["pixel_values"], layers=[1])


def test_what_cannot_be_measured() -> None:
    tower, inputs = SIGLIP.fresh()
    pages = inputs["pixel_values"]
    for options, text in (
        ({"by": "size"}, r"by='size' must be one of \['affinity', 'gate'\]"),
        ({"projections": 0}, "projections=0 must be at least 1"),
        ({"layers": [3]}, r"names layer 3; the tower has layers 0\.\.2"),
        ({"layers": [-1]}, "names layer -1"),
    ):
        with pytest.raises(InjectionError, match=text):
            calibrate_axial(tower, pages, **options)  # pyright: ignore[reportArgumentType]
    for wrong in (pages[0], torch.zeros(0, 3, 56, 56), [], [pages]):
        with pytest.raises(DataError, match="pages"):
            calibrate_axial(tower, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="qwen2_5_vit tower takes a list"):
        calibrate_axial(BY_NAME["qwen2_5"].build(), pages)
    with pytest.raises(DataError, match="cannot be told apart"):
        calibrate_axial(tower, [{"pixel_values": torch.zeros(1, 3, 14, 56), "interpolate_pos_encoding": True}])
    with torch.inference_mode(), pytest.raises(ObservationError, match="outside of torch"):
        calibrate_axial(tower, pages, by="gate")


def test_adaptive_tokens_have_no_grid() -> None:
    tower, inputs = SIGLIP.fresh()
    inject_adat(tower, PatchPolicy(levels=[(0.0, 14)], scorer="uniform"))
    with pytest.raises(LayoutError, match="adaptive or merged, so they have no rows and columns"):
        calibrate_axial(tower, inputs["pixel_values"])
