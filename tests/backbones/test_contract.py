"""What every tower promises: the bias acts, is exact, is alone in what it changes, and leaves no trace.

Runs over `tests.support.towers.CASES`; two more files hold the rest of the contract (adapters, training).
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model

from sfa_adapters import describe, eject_sfa, inject_sfa
from sfa_adapters.errors import BiasNotAppliedError
from sfa_adapters.registry import Backbone, register_backbone, registered_backbones
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.reference import (
    layer_phi,
    merge_heads,
    places_from_rotary,
    project,
    regular_places,
    rotate,
    softmax_attention,
)
from tests.support.towers import CASES, Inputs, TowerCase, every_tower, missing_backbones, set_eager


def test_every_registered_backbone_has_a_tower():
    missing = missing_backbones()
    assert not missing, f"Add a TowerCase with backbone={missing[0]!r} to CASES in tests/support/towers.py ({missing})."


def test_a_backbone_without_a_tower_is_noticed(monkeypatch):
    record = registered_backbones()["clip"]
    monkeypatch.setattr("sfa_adapters.registry._BACKBONES", registered_backbones())
    register_backbone(
        Backbone(name="new", towers=(), attentions=(), geometry=record.geometry, grid_of_input=lambda *_: None)
    )
    assert missing_backbones() == ["new"]


@every_tower
def test_description(case: TowerCase):
    tower = case.build()
    before = describe(tower)
    inject_sfa(tower)
    after = describe(tower)
    for info in (before, after):
        assert (info.backbone, info.num_layers, info.tower_layers) == (case.backbone, case.layers, case.layers)
        assert (info.grid, info.prefix_tokens, info.num_heads) == (case.grid, case.prefix, 4)
        assert info.num_parameters == case.layers * 4 * 19
    assert (before.adapters, after.adapters, after.active) == ((), ("default",), ("default",))
    assert sum(p.numel() for p in compare.structural(tower).values()) == after.num_parameters


@every_tower
def test_bias_changes_every_image(case: TowerCase):
    tower, inputs = case.fresh()
    with torch.no_grad():
        plain = case.hidden(tower, inputs)
        inject_sfa(tower, compare.strong_config())
        biased = case.hidden(tower, inputs)
    for before, after in zip(plain, biased, strict=True):
        assert compare.difference(before, after) > 1e-2


@every_tower
@pytest.mark.parametrize("backend", ["auto", "dense", "folded"])
def test_zero_scalars_change_nothing(case: TowerCase, backend: str):
    tower, inputs = case.fresh()
    plain = compare.read(case, tower, inputs)
    inject_sfa(tower, compare.strong_config(backend=backend))
    compare.fill(tower, 0.0)
    compare.assert_close(compare.read(case, tower, inputs), plain)


@every_tower
def test_ejected_is_bit_exact_and_leaves_no_trace(case: TowerCase):
    tower, inputs = case.fresh()
    plain, snapshot = compare.read(case, tower, inputs), compare.Snapshot(tower)
    inject_sfa(tower, compare.strong_config())
    assert not torch.equal(compare.read(case, tower, inputs), plain)
    assert eject_sfa(tower) is tower
    assert torch.equal(compare.read(case, tower, inputs), plain)
    snapshot.assert_unchanged(tower)


@every_tower
def test_disabled_is_bit_exact(case: TowerCase):
    tower, inputs = case.fresh()
    plain = compare.read(case, tower, inputs)
    model = get_peft_model(tower, compare.strong_config())  # pyright: ignore[reportArgumentType]
    biased = compare.read(case, model, inputs)
    with model.disable_adapter():
        assert torch.equal(compare.read(case, model, inputs), plain)
    assert torch.equal(compare.read(case, model, inputs), biased)
    assert not torch.equal(biased, plain)


@every_tower
def test_base_state_dict_keeps_its_keys_and_tensors(case: TowerCase):
    tower = case.build()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in tower.named_parameters()}
    inject_sfa(tower)
    after = tower.state_dict()
    ours = set(compare.structural(tower))
    records = {f"{name}.sfa._extra_state" for name, _, _ in injected_layers(tower)}
    assert set(after) - set(before) == ours | records
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: p.requires_grad for name, p in tower.named_parameters() if name not in ours} == trainable


@every_tower
def test_only_structural_scalars_learn_and_all_of_them_do(case: TowerCase):
    tower, inputs = compare.injected(case)
    compare.freeze_base(tower)
    found = compare.gradients(case, tower, inputs)
    assert set(found) == set(compare.structural(tower))
    for term in ("row", "col", "dist", "block"):
        norms = [gradient.abs().max().item() for name, gradient in found.items() if f"sfa_{term}" in name]
        assert len(norms) == case.layers
        assert min(norms) > 1e-7, f"a layer's {term} scalars get no gradient: {norms}"


@pytest.mark.parametrize(
    ("case", "other"),
    [(case, other) for case in CASES for other in ("folded", "auto", "eager") if other != "eager" or case.has_eager],
    ids=str,
)
def test_backends_agree_in_outputs_and_gradients(case: TowerCase, other: str):
    tower, inputs = compare.injected(case, backend="dense")
    expected, expected_gradients = compare.read(case, tower, inputs), compare.gradients(case, tower, inputs)
    if other == "eager":
        set_eager(case, tower)
    else:
        compare.set_backend(tower, other)
    compare.assert_close(compare.read(case, tower, inputs), expected)
    compare.assert_same_gradients(compare.gradients(case, tower, inputs), expected_gradients)


@pytest.mark.parametrize("case", [case for case in CASES if case.backbone == "qwen2_5_vit"], ids=str)
def test_attention_that_drops_the_bias_is_an_error_naming_the_layer(case: TowerCase):
    tower, inputs = compare.injected(case)
    biased = compare.read(case, tower, inputs)
    set_eager(case, tower)
    with pytest.raises(BiasNotAppliedError, match=r"blocks\.0\.attn.*'eager'.*position_bias"):
        case.hidden(tower, inputs)
    tower.set_attn_implementation("sdpa")  # pyright: ignore[reportCallIssue]
    assert torch.equal(compare.read(case, tower, inputs), biased)


@pytest.mark.parametrize("backend", ["dense", "folded"])
@pytest.mark.parametrize(
    ("case", "make_inputs"),
    [pytest.param(case, case.inputs, id=case.name) for case in CASES]
    + [pytest.param(case, case.resized, id=f"{case.name}-resized") for case in CASES if case.resized],
)
def test_every_layer_matches_the_slow_reference(case: TowerCase, make_inputs: Callable[[int], Inputs], backend: str):
    tower, _ = compare.injected(case, backend=backend)
    inputs = make_inputs(0)
    calls: list[tuple[torch.Tensor, dict, torch.Tensor]] = []

    def keep(module, args, kwargs, output):
        hidden = args[0] if args else kwargs.get("hidden_states")
        calls.append((hidden, kwargs, output[0] if isinstance(output, tuple) else output))

    handles = [module.register_forward_hook(keep, with_kwargs=True) for _, module, _ in injected_layers(tower)]
    compare.read(case, tower, inputs)
    for handle in handles:
        handle.remove()
    assert len(calls) == case.layers
    for (_, module, layer), (hidden, kwargs, output) in zip(injected_layers(tower), calls, strict=True):
        with torch.no_grad():
            expected = _reference(case, module, layer, hidden, kwargs, inputs)
        if "patch_attention_mask" in inputs:  # what padding becomes is nobody's business
            real = inputs["patch_attention_mask"].flatten(1)
            output, expected = output[real], expected[real]
        compare.assert_close(output, expected, what=layer.name)


def _reference(case: TowerCase, module, layer, hidden, kwargs, inputs: Inputs) -> torch.Tensor:
    query, key, value = project(module, hidden)
    if "cu_seqlens" not in kwargs:
        pixels = inputs["pixel_values"]
        patch = 14 if pixels.shape[-1] % 14 == 0 else 16
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        mask = inputs.get("patch_attention_mask")
        allowed = None if mask is None else mask.flatten(1)[:, None, None]
        phi = layer_phi(layer, regular_places(grid, case.prefix), grid)
        return merge_heads(module, softmax_attention(query, key, value, phi, allowed))
    cos, sin = kwargs["position_embeddings"]
    places, sizes = places_from_rotary(cos, sin), inputs["grid_thw"].tolist()
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    outs, image, end_of_image = [], -1, 0
    bounds = kwargs["cu_seqlens"].tolist()
    for start, stop in itertools.pairwise(bounds):
        while start >= end_of_image:
            image += 1
            end_of_image += sizes[image][0] * sizes[image][1] * sizes[image][2]
        phi = layer_phi(layer, places[start:stop], (sizes[image][1], sizes[image][2]))
        part = slice(start, stop)
        outs.append(softmax_attention(query[:, part], key[:, part], value[:, part], phi))
    return merge_heads(module, torch.cat(outs, dim=1))


@every_tower
def test_batch_of_different_images_is_the_same_as_one_at_a_time(case: TowerCase):
    tower, inputs = compare.injected(case)
    with torch.no_grad():
        together = case.hidden(tower, inputs)
        alone = [states for single in case.split(inputs) for states in case.hidden(tower, single)]
    assert len(together) == len(alone) == 2
    for first, second in zip(together, alone, strict=True):
        compare.assert_close(first, second)


@every_tower
@pytest.mark.parametrize("backend", ["dense", "folded"])
def test_bfloat16_is_within_its_rounding(case: TowerCase, backend: str):
    tower, inputs = case.fresh()
    low = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    plain = compare.read(case, tower, inputs)
    rounding = compare.difference(compare.read(case, tower.bfloat16(), low), plain)
    tower, _ = compare.injected(case, backend=backend, init_std=1.5)
    exact = compare.read(case, tower, inputs)
    scalars = [p.data.clone() for p in compare.structural(tower).values()]
    eject_sfa(tower)
    inject_sfa(tower.bfloat16(), compare.strong_config(backend=backend))
    for parameter, values in zip(compare.structural(tower).values(), scalars, strict=True):
        assert parameter.dtype == torch.float32
        parameter.data.copy_(values)
    found = compare.difference(compare.read(case, tower, low), exact)
    assert found <= 4 * rounding + 1e-2, f"off by {found:g} in bfloat16; the tower alone by {rounding:g}"
    assert compare.difference(exact, plain) > 4 * rounding + 1e-2, "the bias is too weak for this test to mean anything"
