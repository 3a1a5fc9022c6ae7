"""The contract of every tower, part three: checkpointing, compilation, autocast, and caches that never go stale."""

from typing import Any

import pytest
import torch

from sfa_adapters import inject_sfa
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.towers import CASES, TowerCase, every_tower, set_checkpointing


@every_tower
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_gives_the_same_gradients(case: TowerCase, reentrant: bool):
    tower, inputs = compare.injected(case)
    set_checkpointing(case, tower.train(), None)
    expected = compare.gradients(case, tower, inputs)
    set_checkpointing(case, tower, reentrant)
    calls: list[int] = []
    handle = injected_layers(tower)[0][1].register_forward_hook(lambda *_: calls.append(1))
    found = compare.gradients(case, tower, inputs)
    handle.remove()
    assert len(calls) == 2, "the layer was not recomputed"
    assert set(compare.structural(tower)) <= set(found)
    compare.assert_same_gradients(found, expected, tolerance=1e-6)


# Tracing takes seconds a layer, and all layers are alike: every layer of one tower, one layer of the others.
COMPILED = [(case, "folded", None if case.family == "timm" else [1]) for case in CASES if case.compiles] + [
    (CASES[0], "dense", [1])
]


@pytest.mark.parametrize(("case", "backend", "layers"), COMPILED, ids=str)
def test_compiles_without_graph_breaks(case: TowerCase, backend: str, layers: list[int] | None):
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
        pytest.skip(f"the host alone does not compile with fullgraph=True: {str(error).splitlines()[0]}")
    compare.assert_close(torch.cat(hidden), expected)
    compare.loss_of(hidden).backward()
    found = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    unused = set(found) - set(gradients)  # a compiled graph gives zeros where eager gives none
    assert not any(found[name].any() for name in unused)
    compare.assert_same_gradients({name: found[name] for name in set(found) - unused}, gradients)


def _compiles_alone(case: TowerCase) -> bool:
    tower, inputs = case.fresh()
    torch._dynamo.reset()
    program: Any = torch.compile(tower, backend="aot_eager", fullgraph=True)
    try:
        case.hidden(program, inputs)
    except Exception:
        return False
    return True


@every_tower
@pytest.mark.parametrize("backend", ["dense", "folded"])
def test_autocast(case: TowerCase, backend: str):
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
    ours = torch.cat([low[name].flatten() for name in compare.structural(tower)])
    expected = torch.cat([gradients[name].flatten() for name in compare.structural(tower)])
    assert ours.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(ours, expected, dim=0) > 0.98


@every_tower
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_inference_then_training(case: TowerCase, mode: Any):
    tower, inputs = compare.injected(case)
    expected = compare.gradients(case, tower, inputs)
    with mode():
        before = torch.cat(case.hidden(tower, inputs)).clone()
    compare.assert_same_gradients(compare.gradients(case, tower, inputs), expected, tolerance=1e-6)
    optimizer = torch.optim.SGD(compare.structural(tower).values(), lr=1.0)
    optimizer.step()
    with mode():
        after = torch.cat(case.hidden(tower, inputs)).clone()
    assert compare.difference(before, after) > 1e-6
    compare.assert_close(torch.cat(case.hidden(tower, inputs)).detach(), after)


@every_tower
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_cached_mask_never_outlives_its_scalars(case: TowerCase, backend: str):
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
        found = compare.read(case, tower, inputs)
        assert compare.difference(found, previous) > 1e-3, change.__name__
        compare.assert_close(found, expected(), what=change.__name__)
        previous = found
    eject = {name: p.detach().clone() for name, p in compare.structural(tower).items()}
    tower.load_state_dict({**tower.state_dict(), **{name: -values for name, values in eject.items()}})
    compare.assert_close(compare.read(case, tower, inputs), expected(), what="load_state_dict")


@pytest.mark.parametrize("case", [case for case in CASES if case.resized], ids=str)
def test_sizes_may_alternate(case: TowerCase):
    assert case.resized is not None
    tower, inputs = compare.injected(case)
    other = case.resized(0)
    first, second = compare.read(case, tower, inputs), compare.read(case, tower, other)
    assert torch.equal(compare.read(case, tower, inputs), first)
    assert torch.equal(compare.read(case, tower, other), second)
