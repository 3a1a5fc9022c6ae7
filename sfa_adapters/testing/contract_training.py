"""The contract of every tower, part three: checkpointing, compilation, autocast, and cached masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sfa_adapters.inject import inject_sfa
from sfa_adapters.testing import compare
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.suite import Suite, needs, reentrant_or_not
from sfa_adapters.tuner import injected_layers

__all__ = ["OWN_CHECKPOINTING", "TrainingContract", "skip_unless_possible"]

OWN_CHECKPOINTING = needs("checkpointing (TowerCase.checkpointing)", lambda case: case.checkpointing is not None)


def skip_unless_possible(case: TowerCase, reentrant: bool = True) -> None:
    """Skips a test of re-entrant checkpointing where layers cannot be checkpointed so, with or without SFA."""
    if reentrant and not case.reentrant:
        pytest.skip("layers of this small tower cannot be checkpointed with use_reentrant=True")


class TrainingContract(Suite):
    """Checks of training: gradients, compilation, precision, and cached masks."""

    @OWN_CHECKPOINTING
    @reentrant_or_not
    def test_checkpointing_gives_the_same_gradients(self, case: TowerCase, reentrant: bool) -> None:
        """The tower's own checkpointing, reentrant or not, changes no gradient."""
        tower, inputs = compare.injected(case)
        assert case.checkpointing is not None
        skip_unless_possible(case, reentrant)
        case.checkpointing(tower.train(), None)
        expected = compare.gradients(case, tower, inputs)
        case.checkpointing(tower, reentrant)
        calls: list[int] = []
        # A pre-hook: a recomputation may stop in the middle of the layer, once it has what backward needs.
        handle = injected_layers(tower)[0][1].register_forward_pre_hook(lambda *_: calls.append(1))
        gradients = compare.gradients(case, tower, inputs)
        handle.remove()
        assert len(calls) == 2, "the layer was not recomputed"
        assert set(compare.structural(tower)) <= set(gradients)
        compare.assert_same_gradients(gradients, expected, 2e-6 * case.rounding)

    @needs("a tower that is said to compile (TowerCase.compiles)", lambda case: case.compiles != "no")
    def test_compiles_without_graph_breaks(self, case: TowerCase) -> None:
        """One graph for the whole tower, with the same outputs and gradients, on the folded backend."""
        check_compiled(case, "folded")

    @needs('TowerCase.compiles="every layer"', lambda case: case.compiles == "every layer")
    def test_compiles_with_a_dense_mask(self, case: TowerCase) -> None:
        """The same with the bias as a matrix, in one layer."""
        check_compiled(replace(case, compiles="one layer"), "dense")

    @pytest.mark.parametrize("backend", ["dense", "folded"])
    def test_autocast(self, case: TowerCase, backend: str) -> None:
        """Under autocast the bias costs no more precision than the tower itself; its scalars get float32 gradients."""
        tower, inputs = case.fresh()
        plain = compare.read(case, tower, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounding = compare.difference(compare.read(case, tower, inputs), plain)
        torch.manual_seed(3)
        inject_sfa(tower, compare.strong_config(backend=backend))
        exact, gradients = compare.read(case, tower, inputs), compare.gradients(case, tower, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert compare.difference(compare.read(case, tower, inputs), exact) <= 4 * rounding + 1e-2
            low = compare.gradients(case, tower, inputs)
        assert set(low) == set(gradients)
        rounded = torch.cat([low[name].flatten() for name in compare.structural(tower)])
        expected = torch.cat([gradients[name].flatten() for name in compare.structural(tower)])
        assert rounded.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(rounded, expected, dim=0) > 0.98

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_inference_then_training(self, case: TowerCase, mode: Any) -> None:
        """A cache of a forward without gradients does not disturb training, and each step reaches the next forward."""
        tower, inputs = compare.injected(case)
        expected = compare.gradients(case, tower, inputs)
        with mode():
            before = torch.cat(case.hidden(tower, inputs)).clone()
        compare.assert_same_gradients(compare.gradients(case, tower, inputs), expected, 1e-6 * case.rounding)
        optimizer = torch.optim.SGD(compare.structural(tower).values(), lr=1.0)
        optimizer.step()
        with mode():
            after = torch.cat(case.hidden(tower, inputs)).clone()
        assert compare.difference(before, after) > 1e-6
        compare.assert_close(torch.cat(case.hidden(tower, inputs)).detach(), after)

    @pytest.mark.parametrize("backend", ["auto", "dense"])
    def test_a_cached_mask_never_outlives_its_scalars(self, case: TowerCase, backend: str) -> None:
        """Each way of changing a scalar must reach the next forward without gradients."""
        tower, inputs = compare.injected(case, backend=backend)

        def expected() -> torch.Tensor:  # a forward with gradients uses no cache
            return torch.cat(case.hidden(tower, inputs)).detach()

        def step_in_place(parameter: torch.nn.Parameter) -> None:
            with torch.no_grad():
                parameter.mul_(-1.5)

        def write_data(parameter: torch.nn.Parameter) -> None:
            parameter.data.mul_(-0.5)

        def replace_data(parameter: torch.nn.Parameter) -> None:
            parameter.data = parameter.data.flip(0) + 0.1

        previous = compare.read(case, tower, inputs)
        for change in (step_in_place, write_data, replace_data):
            for parameter in compare.structural(tower).values():
                change(parameter)
            changed = compare.read(case, tower, inputs)
            assert compare.difference(changed, previous) > 1e-3, change.__name__
            compare.assert_close(changed, expected(), what=change.__name__)
            previous = changed
        scalars = {name: p.detach().clone() for name, p in compare.structural(tower).items()}
        tower.load_state_dict({**tower.state_dict(), **{name: -values for name, values in scalars.items()}})
        compare.assert_close(compare.read(case, tower, inputs), expected(), what="load_state_dict")

    @needs("inputs of another size (TowerCase.resized)", lambda case: case.resized is not None)
    def test_sizes_may_alternate(self, case: TowerCase) -> None:
        """Cached layouts of two sizes are not mixed up."""
        assert case.resized is not None
        tower, inputs = compare.injected(case)
        other = case.resized(0)
        first, second = compare.read(case, tower, inputs), compare.read(case, tower, other)
        assert torch.equal(compare.read(case, tower, inputs), first)
        assert torch.equal(compare.read(case, tower, other), second)


def check_compiled(case: TowerCase, backend: str) -> None:
    """Compares a compiled tower with itself; skips where the plain tower does not compile either."""
    # Tracing takes seconds a layer, and all layers are alike.
    layers = None if case.compiles == "every layer" else [case.layers // 2]
    tower, inputs = compare.injected(case, backend=backend, layers_to_transform=layers)
    expected, gradients = torch.cat(case.hidden(tower, inputs)), compare.gradients(case, tower, inputs)
    tower.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    program: Any = torch.compile(tower, backend="aot_eager", fullgraph=True)
    try:
        hidden = case.hidden(program, inputs)
    except Exception as error:
        if _compiles_alone(case):
            raise
        pytest.skip(f"the tower alone does not compile with fullgraph=True: {str(error).splitlines()[0]}")
    compare.assert_close(torch.cat(hidden), expected)
    compare.loss_of(hidden).backward()
    compiled = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    unused = set(compiled) - set(gradients)  # a compiled graph gives zeros where eager gives none
    assert not any(compiled[name].any() for name in unused)
    compare.assert_same_gradients({name: compiled[name] for name in set(compiled) - unused}, gradients)


def _compiles_alone(case: TowerCase) -> bool:
    tower, inputs = case.fresh()
    torch._dynamo.reset()
    program: Any = torch.compile(tower, backend="aot_eager", fullgraph=True)
    try:
        case.hidden(program, inputs)
    except Exception:
        return False
    return True
