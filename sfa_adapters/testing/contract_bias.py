"""The contract of every tower, part one: the bias acts, is exact, changes nothing else, and ejects bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from sfa_adapters.attention import Backend
from sfa_adapters.choices import DEFAULT_TERMS
from sfa_adapters.inject import describe, eject_sfa, inject_sfa
from sfa_adapters.layer import SFALayer
from sfa_adapters.registry import registered_backbones
from sfa_adapters.testing import compare
from sfa_adapters.testing.cases import Inputs, TowerCase
from sfa_adapters.testing.reference import SlowAttention, arguments_by_name, phis_of_call
from sfa_adapters.testing.suite import Suite, needs
from sfa_adapters.tower_search import find_tower
from sfa_adapters.tuner import injected_layers

__all__ = ["BiasContract"]

Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]
BACKENDS = pytest.mark.parametrize("backend", ["dense", "folded"])
# Blocked computes every term; lines has a path of its own for row and col.
EVERY_BACKEND = pytest.mark.parametrize("backend", ["dense", "folded", "blocked", "lines"])
LINES_TOO = pytest.mark.parametrize("backend", ["dense", "folded", "lines"])


class BiasContract(Suite):
    """Checks of what a tower with SFA computes, against the plain tower and against a slow reference."""

    def test_the_small_tower_is_known_and_the_same_each_time(self, case: TowerCase) -> None:
        """The record finds the tower, and building it twice gives the same weights, which many checks rely on."""
        first, second = case.build(), case.build()
        assert registered_backbones()[case.backbone].is_tower(first), (
            f"{type(first).__module__}.{type(first).__qualname__} fits none of the patterns in Backbone.towers"
        )
        assert find_tower(first).name == "", "build must give the tower itself, not a model that holds it"
        assert not any(module.training for module in first.modules()), "build must give a tower in eval mode"
        weights = second.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items()), (
            "build gives other weights each time; wrap it in sfa_adapters.testing.lively"
        )

    def test_description(self, case: TowerCase) -> None:
        """The library reads from the tower what the case says."""
        tower = case.build()
        before = describe(tower)
        inject_sfa(tower)
        after = describe(tower)
        for info in (before, after):
            biased = case.layers - case.unread
            assert (info.backbone, info.num_layers, info.tower_layers) == (case.backbone, biased, case.layers)
            assert (info.grid, info.prefix_tokens, info.num_heads) == (case.grid, case.prefix, case.heads)
            assert info.num_parameters == biased * case.heads * len(DEFAULT_TERMS)
        assert (before.adapters, after.adapters, after.active) == ((), ("default",), ("default",))
        assert sum(p.numel() for p in compare.structural(tower).values()) == after.num_parameters

    def test_bias_changes_every_image(self, case: TowerCase) -> None:
        """Strong scalars move the features of each image."""
        tower, inputs = case.fresh()
        with torch.no_grad():
            plain = case.hidden(tower, inputs)
            inject_sfa(tower, compare.strong_config())
            biased = case.hidden(tower, inputs)
        for before, after in zip(plain, biased, strict=True):
            assert compare.difference(before, after) > 1e-2

    @pytest.mark.parametrize("backend", ["auto", "dense", "folded"])
    def test_zero_scalars_change_nothing(self, case: TowerCase, backend: str) -> None:
        """A bias of zero leaves the features as they are."""
        tower, inputs = case.fresh()
        plain = compare.read(case, tower, inputs)
        inject_sfa(tower, compare.strong_config(backend=backend))
        compare.fill(tower, 0.0)
        compare.assert_close(compare.read(case, tower, inputs), plain)

    def test_ejected_is_bit_exact_and_leaves_no_trace(self, case: TowerCase) -> None:
        """`eject_sfa` gives back the tower as it was: outputs, modules, hooks, attributes."""
        tower, inputs = case.fresh()
        plain, snapshot = compare.read(case, tower, inputs), compare.Snapshot(tower)
        inject_sfa(tower, compare.strong_config())
        assert not torch.equal(compare.read(case, tower, inputs), plain)
        assert eject_sfa(tower) is tower
        assert torch.equal(compare.read(case, tower, inputs), plain)
        snapshot.assert_unchanged(tower)

    def test_disabled_is_bit_exact(self, case: TowerCase) -> None:
        """PEFT's `disable_adapter` gives the plain tower."""
        tower, inputs = case.fresh()
        plain = compare.read(case, tower, inputs)
        model = get_peft_model(tower, compare.strong_config())  # pyright: ignore[reportArgumentType]
        biased = compare.read(case, model, inputs)
        with model.disable_adapter():
            assert torch.equal(compare.read(case, model, inputs), plain)
        assert torch.equal(compare.read(case, model, inputs), biased)
        assert not torch.equal(biased, plain)

    def test_base_state_dict_keeps_its_keys_and_tensors(self, case: TowerCase) -> None:
        """Injection adds keys and changes none; `requires_grad` of the tower stays."""
        tower = case.build()
        before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
        trainable = {name: p.requires_grad for name, p in tower.named_parameters()}
        inject_sfa(tower)
        after = tower.state_dict()
        scalars = set(compare.structural(tower))
        records = {f"{name}.sfa._extra_state" for name, _, _ in injected_layers(tower)}
        assert set(after) - set(before) == scalars | records
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert {name: p.requires_grad for name, p in tower.named_parameters() if name not in scalars} == trainable

    def test_only_structural_scalars_learn_and_all_of_them_do(self, case: TowerCase) -> None:
        """With a frozen base every scalar of every layer gets a gradient, and nothing else."""
        tower, inputs = compare.injected(case)
        compare.freeze_base(tower)
        gradients = compare.gradients(case, tower, inputs)
        assert set(gradients) == set(compare.structural(tower))
        for term in ("row", "col", "dist", "block"):
            norms = [gradient.abs().max().item() for name, gradient in gradients.items() if f"sfa_{term}" in name]
            assert len(norms) == case.layers - case.unread
            assert min(norms) > 1e-7, f"a layer's {term} scalars get no gradient: {norms}"

    @pytest.mark.parametrize("backend", ["folded", "auto"])
    def test_backends_agree_in_outputs_and_gradients(self, case: TowerCase, backend: str) -> None:
        """All backends compute what the dense one does."""
        tower, inputs = compare.injected(case, backend="dense")
        expected, expected_gradients = compare.read(case, tower, inputs), compare.gradients(case, tower, inputs)
        compare.set_backend(tower, backend)
        compare.assert_close(compare.read(case, tower, inputs), expected)
        compare.assert_same_gradients(compare.gradients(case, tower, inputs), expected_gradients)

    @needs(
        "eager attention that takes the bias (TowerCase.eager)", lambda case: bool(case.eager) and case.eager_takes_bias
    )
    def test_eager_attention_agrees_in_outputs_and_gradients(self, case: TowerCase) -> None:
        """The tower's eager attention computes what the fused one does."""
        tower, inputs = compare.injected(case, backend="dense")
        expected, expected_gradients = compare.read(case, tower, inputs), compare.gradients(case, tower, inputs)
        assert case.eager is not None
        case.eager(tower)
        compare.assert_close(compare.read(case, tower, inputs), expected)
        compare.assert_same_gradients(compare.gradients(case, tower, inputs), expected_gradients)

    @EVERY_BACKEND
    def test_every_layer_matches_the_slow_reference(self, case: TowerCase, backend: Backend) -> None:
        """Each attention layer gives what the plain one gives with phi, pair by pair, on its logits."""
        check_every_layer(case, case.inputs(0), backend)

    @needs("inputs of another size (TowerCase.resized)", lambda case: case.resized is not None)
    @LINES_TOO
    def test_every_layer_matches_the_slow_reference_at_another_size(self, case: TowerCase, backend: Backend) -> None:
        """The same for images of another size, which have another grid."""
        assert case.resized is not None
        check_every_layer(case, case.resized(0), backend)

    def test_batch_of_different_images_is_the_same_as_one_at_a_time(self, case: TowerCase) -> None:
        """The result for an image does not depend on the others in its batch."""
        tower, inputs = compare.injected(case)
        with torch.no_grad():
            together = case.hidden(tower, inputs)
            if len(together) < 2:
                pytest.skip("the inputs of this small tower are one image")
            alone = [states for single in case.split(inputs) for states in case.hidden(tower, single)]
        for first, second in zip(together, alone, strict=True):
            compare.assert_close(first, second)

    @BACKENDS
    def test_bfloat16_is_within_its_rounding(self, case: TowerCase, backend: str) -> None:
        """In bfloat16 the bias costs no more precision than the tower itself; its scalars stay float32."""
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
        error = compare.difference(compare.read(case, tower, low), exact)
        assert error <= 4 * rounding + 1e-2, f"off by {error:g} in bfloat16; the tower alone by {rounding:g}"
        effect = compare.difference(exact, plain)
        assert effect > 4 * rounding + 1e-2, "the bias is too weak for this test to mean anything"


def check_every_layer(case: TowerCase, inputs: Inputs, backend: Backend) -> None:
    """Compares the output of each attention layer of a forward with the slow reference."""
    terms = {"terms": list(DEFAULT_TERMS)} if backend == "lines" else {}
    tower, _ = compare.injected(case, backend=backend, **terms)
    layers = injected_layers(tower)
    calls: dict[str, Call] = {}
    handles = [handle for name, module, _ in layers for handle in _record(calls, name, module)]
    compare.read(case, tower, inputs)
    for handle in handles:
        handle.remove()
    plain = case.build()
    real = None if case.real_tokens is None else case.real_tokens(inputs)
    for name, _, layer in layers:
        assert name in calls, f"{name} did not run"
        expected, output = _reference(case, plain.get_submodule(name), layer, calls[name], inputs), calls[name][2]
        if real is not None:  # outputs at padding are not used
            output, expected = output[real], expected[real]
        compare.assert_close(output, expected, what=name)


def _record(calls: dict[str, Call], name: str, module: nn.Module) -> list[Any]:
    """Hooks that record the arguments of a module before the bias is added, and its output."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, dict(kwargs)))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[name] = (*given.pop(), output[0] if isinstance(output, tuple) else output)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        module.register_forward_hook(after),
    ]


def _reference(case: TowerCase, attention: nn.Module, layer: SFALayer, call: Call, inputs: Inputs) -> Tensor:
    """The output of a plain attention module with phi on the logits of each of its computations."""
    args, kwargs, _ = call
    by_name = arguments_by_name(attention, args, kwargs)
    phis = phis_of_call(case, registered_backbones()[case.backbone], layer, by_name, inputs)
    slow_module = attention if case.plain is None else case.plain(attention)
    with torch.no_grad(), SlowAttention(phis) as slow:
        output = slow_module(*args, **kwargs)
    assert slow.calls == len(phis), (
        f"the plain {type(attention).__name__} called scaled_dot_product_attention or softmax {slow.calls} times, and "
        f"there are {len(phis)} attention computations by its inputs"
    )
    return output[0] if isinstance(output, tuple) else output
