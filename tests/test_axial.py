"""Initialisation of the scalars: normal, or axial for the first or for chosen heads, in every tower and file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn

from sfa_adapters import SFAAttention, SFAConfig, StructuralBias, TokenLayout, describe, inject_sfa, load_sfa, save_sfa
from sfa_adapters.axial import first_heads, start_values
from sfa_adapters.bias import TERMS, parameter_shapes
from sfa_adapters.choices import DEFAULT_TERMS
from sfa_adapters.errors import InjectionError
from sfa_adapters.state_record import read_record
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.towers import CASES, TowerCase

SIGLIP = next(case for case in CASES if case.backbone == "siglip")
EVERY = [next(case for case in CASES if case.backbone == name) for name in sorted({c.backbone for c in CASES})]


def scalars(model: nn.Module, adapter: str = "default") -> list[dict[str, torch.Tensor]]:
    """Of each layer, by term."""
    return [
        {name.removeprefix("sfa_"): p.detach() for name, p in layer.tensors(adapter).items()}
        for _, _, layer in injected_layers(model)
    ]


def strong(values: dict[str, torch.Tensor], strength: float = 3.0) -> dict[str, list[int]]:
    """Which heads of a layer have the strength, by axis."""
    return {axis: (values[axis] == strength).nonzero()[:, 0].tolist() for axis in ("row", "col") if axis in values}


@given(st.integers(2, 64))
def test_the_first_heads_are_two_disjoint_thirds(heads: int) -> None:
    chosen = first_heads(heads)
    assert len(chosen["row"]) == len(chosen["col"]) == max(1, heads // 3)
    assert chosen["row"] + chosen["col"] == list(range(2 * max(1, heads // 3)))
    assert 2 * len(chosen["row"]) <= heads


@settings(max_examples=30)
@given(st.integers(1, 9), st.data())
def test_all_other_scalars_are_those_of_the_normal_start(heads: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(heads)))
    rows, columns = order[: heads // 2], order[heads // 2 : heads // 2 * 2]
    shapes = parameter_shapes(heads, 4, TERMS)
    torch.manual_seed(1)
    normal = start_values(shapes, 0.5, {}, 3.0)
    torch.manual_seed(1)
    axial = start_values(shapes, 0.5, {"row": rows, "col": columns}, 2.5)
    for term, chosen in (("row", rows), ("col", columns), ("dist", []), ("block", [])):
        rest = [head for head in range(heads) if head not in chosen]
        assert torch.equal(axial[term][rest], normal[term][rest])
        assert bool((axial[term][chosen] == 2.5).all())


def test_normal_draws_what_it_always_drew() -> None:
    tower, _ = SIGLIP.fresh()
    torch.manual_seed(5)
    expected = [
        {term: nn.init.normal_(torch.empty(shape), std=0.02) for term, shape in parameter_shapes(4, 16, TERMS).items()}
        for _ in range(SIGLIP.layers)
    ]
    torch.manual_seed(5)
    for ours, theirs in zip(scalars(inject_sfa(tower, SFAConfig.published())), expected, strict=True):
        assert all(torch.equal(ours[term], theirs[term]) for term in TERMS)
    torch.manual_seed(5)
    bias = StructuralBias(4, terms=TERMS)
    assert all(torch.equal(getattr(bias, term), expected[0][term]) for term in TERMS)


@pytest.mark.parametrize("case", EVERY, ids=str)
@pytest.mark.parametrize("by", ["inject_sfa", "get_peft_model"])
def test_axial_in_every_tower(case: TowerCase, by: str) -> None:
    tower, inputs = case.fresh()
    config = SFAConfig(init="axial", init_strength=2.0)
    model: Any = inject_sfa(tower, config) if by == "inject_sfa" else get_peft_model(tower, config)  # pyright: ignore[reportArgumentType]
    layers = [layer for _, _, layer in injected_layers(model)]
    assert layers
    for layer, values in zip(layers, scalars(model), strict=True):
        assert strong(values, 2.0) == first_heads(layer.num_heads)
        assert values.keys() == {"row", "col"}
    assert all(torch.isfinite(states).all() for states in case.hidden(model, inputs))


def test_a_row_head_looks_along_its_row() -> None:
    """The start acts: with w_row = 9 and no content, nearly all attention stays in the row."""
    bias = StructuralBias(3, init_std=0.0, init="axial", init_strength=9.0, terms=TERMS)
    probabilities = bias(TokenLayout.regular(4, 4))[0].softmax(-1).reshape(3, 4, 4, 4, 4)
    same_row = torch.einsum("hrcrd->hrc", probabilities)
    same_column = torch.einsum("hrcsc->hrc", probabilities)
    assert same_row[0].min() > 0.99
    assert same_column[1].min() > 0.99
    assert torch.allclose(same_row[2], torch.tensor(0.25))


def test_a_choice_of_heads_and_layers() -> None:
    tower, _ = SIGLIP.fresh()
    choice = {0: {"row": [3], "col": [0, 2]}, 2: {"row": [1]}}
    values = scalars(inject_sfa(tower, SFAConfig(init="axial", init_heads=choice)))
    assert strong(values[0]) == {"row": [3], "col": [0, 2]}
    assert strong(values[1]) == {"row": [], "col": []}
    assert strong(values[2]) == {"row": [1], "col": []}


def give_heads(tower: nn.Module, *counts: int) -> None:
    attentions: list[Any] = [m for m in tower.modules() if type(m).__name__ == "SiglipAttention"]
    for attention, heads in zip(attentions, counts, strict=True):
        attention.num_heads = heads


def test_layers_with_different_head_counts() -> None:
    """A layer with a single head stays normal; the others take thirds of their own."""
    tower, _ = SIGLIP.fresh()
    give_heads(tower, 1, 2, 4)
    values = scalars(inject_sfa(tower, SFAConfig(init="axial")))
    assert strong(values[0]) == {"row": [], "col": []}
    assert values[0]["row"].abs().max() < 0.2
    assert strong(values[1]) == {"row": [0], "col": [1]}
    assert strong(values[2]) == {"row": [0], "col": [1]}


@pytest.mark.parametrize(("terms", "expected"), [(["row"], {"row": [0]}), (["col", "block"], {"col": [1]})])
def test_terms_that_are_off_are_left_out(terms: list[str], expected: dict[str, list[int]]) -> None:
    tower, _ = SIGLIP.fresh()
    values = scalars(inject_sfa(tower, SFAConfig(init="axial", terms=terms)))
    assert all(strong(layer) == expected for layer in values)
    both = {0: {"row": [2], "col": [3]}}
    tower, _ = SIGLIP.fresh()
    values = scalars(inject_sfa(tower, SFAConfig(init="axial", terms=terms, init_heads=both)))
    assert strong(values[0]) == {terms[0]: both[0][terms[0]]}


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        tower = SIGLIP.build()
    model = inject_sfa(tower, SFAConfig(init="axial"))
    assert all(value.is_meta for layer in scalars(model) for value in layer.values())
    bias = StructuralBias(6, device="meta", init="axial").to_empty(device="cpu")
    bias.reset_parameters()
    assert strong(dict(bias.named_parameters())) == {"row": [0, 1], "col": [2, 3]}


def test_layers_that_people_build_themselves() -> None:
    bias = SFAAttention(24, num_heads=3, grid=(2, 2), init="axial", init_strength=1.5).structural_bias
    assert strong(dict(bias.named_parameters()), 1.5) == {"row": [0], "col": [1]}
    with pytest.raises(InjectionError, match="init='diagonal' must be one of"):
        StructuralBias(2, init="diagonal")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init": "rows"}, r"init='rows' must be one of \['normal', 'axial'\]"),
        ({"init": "axial", "init_strength": 0}, "init_strength=0 must be a number of logits above 0"),
        ({"init": "axial", "init_strength": float("inf")}, "init_strength=inf"),
        ({"init": "axial", "init_strength": "3"}, "init_strength='3'"),
        (
            {"init": "axial", "terms": ["dist", "block"]},
            r"needs the term 'row' or 'col', but terms=\['dist', 'block'\]",
        ),
        ({"init": "axial", "init_warmup_steps": -1}, "init_warmup_steps=-1 must be a whole number"),
        ({"init": "axial", "init_warmup_steps": True}, "init_warmup_steps=True"),
        ({"init_warmup_steps": 5}, "init_warmup_steps=5 belongs to init='axial', but init='normal'"),
        ({"init_heads": {0: {"row": [0]}}}, "init_heads=.* belongs to init='axial'"),
        ({"init": "axial", "init_heads": [[0]]}, r"init_heads=\[\[0\]\] must be a mapping"),
        ({"init": "axial", "init_heads": {"first": {}}}, "init_heads has the key 'first'"),
        ({"init": "axial", "init_heads": {-1: {}}}, "init_heads has the key -1"),
        ({"init": "axial", "init_heads": {0: {}, "0": {}}}, "names layer 0 twice"),
        ({"init": "axial", "init_heads": {0: [1]}}, r"init_heads\[0\]=\[1\] must be a mapping with the keys"),
        ({"init": "axial", "init_heads": {0: {"rows": [1]}}}, "must be a mapping with the keys"),
        ({"init": "axial", "init_heads": {0: {"row": 1}}}, "'row' must be a list of heads"),
        ({"init": "axial", "init_heads": {0: {"row": [-1]}}}, "heads are numbers, counted from 0"),
        ({"init": "axial", "init_heads": {0: {"row": [1], "col": [1]}}}, "names head 1 twice"),
        ({"init": "axial", "init_heads": {0: {"row": [2, 2]}}}, "names head 2 twice"),
    ],
)
def test_wrong_options_name_the_field_and_the_value(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InjectionError, match=text):
        SFAConfig(**options)


@pytest.mark.parametrize(
    ("heads", "layers", "text"),
    [
        ({3: {"row": [0]}}, None, r"init_heads=\{3: .*names layer 3; the tower has layers 0\.\.2"),
        ({0: {"row": [0], "col": [4]}}, None, r"names head 4, but layer 0 has heads 0\.\.3"),
        ({1: {"row": [0]}}, [0, 2], r"names layer 1, which gets no bias; layers with one: \[0, 2\]"),
        ({1: {"row": [], "col": []}}, None, "names no head for a term that is on"),
        ({}, None, "names no head for a term that is on"),
    ],
)
@pytest.mark.parametrize("by", [inject_sfa, get_peft_model])
def test_a_choice_that_does_not_fit_the_tower(heads: Any, layers: Any, text: str, by: Any) -> None:
    tower, _ = SIGLIP.fresh()
    before = compare.Snapshot(tower)
    with pytest.raises(InjectionError, match=text):
        by(tower, SFAConfig(init="axial", init_heads=heads, layers_to_transform=layers))
    before.assert_unchanged(tower)


def test_a_tower_of_single_heads_has_nothing_to_share() -> None:
    tower, _ = SIGLIP.fresh()
    give_heads(tower, 1, 1, 1)
    with pytest.raises(InjectionError, match=r"no layer of \[0, 1, 2\] has two heads"):
        inject_sfa(tower, SFAConfig(init="axial"))
    chosen = inject_sfa(tower, SFAConfig(init="axial", init_heads={1: {"row": [0]}}))  # a choice may take the only head
    assert strong(scalars(chosen)[1]) == {"row": [0], "col": []}


# -- what is saved ---------------------------------------------------------------------------------------------------

CHOICE = {0: {"row": [3], "col": [0, 2]}, 2: {"row": [1], "col": []}}


def test_the_choice_survives_json() -> None:
    config = SFAConfig(init="axial", init_heads=CHOICE)
    again = SFAConfig(**json.loads(json.dumps({"init": "axial", "init_heads": config.init_heads})))
    assert again.init_heads == CHOICE


@pytest.mark.parametrize("way", ["save_sfa", "peft", "state dict"])
def test_saved_and_loaded_bit_for_bit(way: str, tmp_path: Path) -> None:
    config = SFAConfig(init="axial", init_strength=1.5, init_heads=CHOICE)
    tower, inputs = SIGLIP.fresh()
    model: Any = get_peft_model(tower, config) if way == "peft" else inject_sfa(tower, config)  # pyright: ignore[reportArgumentType]
    expected = compare.read(SIGLIP, model, inputs)
    fresh, _ = SIGLIP.fresh()
    if way == "save_sfa":
        again: Any = load_sfa(fresh, save_sfa(model, tmp_path))
    elif way == "peft":
        model.save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()  # pyright: ignore[reportArgumentType]
    else:
        again = inject_sfa(fresh, config)
        again.load_state_dict(model.state_dict())
    assert torch.equal(compare.read(SIGLIP, again, inputs), expected)
    loaded = next(layer for _, _, layer in injected_layers(again)).configs["default"]
    assert (loaded.init, loaded.init_strength, loaded.init_heads) == ("axial", 1.5, CHOICE)


def test_the_record_in_a_state_dict_holds_the_choice() -> None:
    model = inject_sfa(SIGLIP.build(), SFAConfig(init="axial", init_heads=CHOICE))
    key = next(key for key in model.state_dict() if key.endswith("sfa._extra_state"))
    assert read_record(model.state_dict()[key], "here")["default"].init_heads == CHOICE


def test_configurations_of_before_load(tmp_path: Path) -> None:
    """Files without the new fields mean the normal start."""
    model = inject_sfa(SIGLIP.build(), SFAConfig.published())
    save_sfa(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    content = {k: v for k, v in json.loads(file.read_text()).items() if k == "init_std" or not k.startswith("init_")}
    del content["init"]
    file.write_text(json.dumps(content))
    again = load_sfa(SIGLIP.build(), tmp_path)
    assert all(torch.equal(a[t], b[t]) for a, b in zip(scalars(again), scalars(model), strict=True) for t in TERMS)
    record = next(value for key, value in model.state_dict().items() if key.endswith("sfa._extra_state"))
    record_of_before = json.loads(bytes(record.tolist()).decode())
    adapter = record_of_before["adapters"]["default"]
    record_of_before["adapters"]["default"] = {k: v for k, v in adapter.items() if k in content}
    old = read_record(torch.tensor(list(json.dumps(record_of_before).encode()), dtype=torch.uint8), "old")["default"]
    assert (old.init, old.init_warmup_steps, old.init_heads) == ("normal", 0, None)


def test_a_saved_choice_loads_into_a_tower_that_lost_heads() -> None:
    """The choice tells how training began; it is not checked against the tower that the adapter is loaded into."""
    config = SFAConfig(init="axial", init_heads={0: {"row": [3], "col": [1]}})
    assert config.strong_heads(0, 4) == {"row": [3], "col": [1]}
    assert config.strong_heads(0, 3) == {"row": [], "col": [1]}
    assert config.strong_heads(1, 4) == {"row": [], "col": []}


def test_the_default_is_row_and_col() -> None:
    assert DEFAULT_TERMS == ("row", "col")
    assert SFAConfig().terms == list(DEFAULT_TERMS)
    assert StructuralBias(2).terms == SFAAttention(8, num_heads=2).structural_bias.terms == DEFAULT_TERMS
    assert describe(inject_sfa(SIGLIP.build())).num_parameters == 2 * SIGLIP.heads * SIGLIP.layers


def test_the_published_form() -> None:
    config = SFAConfig.published()
    assert (config.terms, config.init, config.init_std, config.block_grid) == (list(TERMS), "normal", 0.02, (4, 4))
    assert SFAConfig.published(layers_to_transform=[0], terms=["row"]).terms == ["row"]
    assert SFAConfig.published(block_map=[[0, 1]]).num_blocks == 2
    assert SFAConfig.published(num_blocks=9).block_grid == (3, 3)
    with pytest.raises(InjectionError, match="init_std=-1"):
        SFAConfig.published(init_std=-1)
