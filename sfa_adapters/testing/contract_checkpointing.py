"""The contract of every tower, part four: checkpointing of frozen towers, and of images with different layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfa_adapters.inject import eject_sfa, inject_sfa
from sfa_adapters.testing import compare
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.contract_training import OWN_CHECKPOINTING, skip_unless_possible
from sfa_adapters.testing.suite import Suite, needs, reentrant_or_not
from sfa_adapters.tuner import injected_layers

__all__ = ["CheckpointingContract", "checkpoint_part", "gradients_after"]

ORDERS = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "in reverse"])
OBLONG = needs(
    "images that are not square, also with rows and columns exchanged (TowerCase.resized or turn)",
    lambda case: case.oblong() is not None,
)
ENCODER = needs("the path of its encoder (TowerCase.encoder)", lambda case: case.encoder is not None)


class CheckpointingContract(Suite):
    """Layers that run again in the backward pass get the gradients and the layout of their own forward."""

    @OWN_CHECKPOINTING
    @reentrant_or_not
    def test_a_frozen_tower_trains_its_scalars(self, case: TowerCase, reentrant: bool) -> None:
        """In a frozen tower no input of a checkpoint requires gradients; the scalars train all the same."""
        assert case.checkpointing is not None
        skip_unless_possible(case, reentrant)
        tower, inputs = compare.injected(case)
        compare.freeze_base(tower.train())
        case.checkpointing(tower, None)
        expected = compare.gradients(case, tower, inputs)
        case.checkpointing(tower, reentrant)
        result = compare.gradients(case, tower, inputs)
        assert set(result) == set(compare.structural(tower))
        compare.assert_same_gradients(result, expected, 1e-6 * case.rounding)

    @OWN_CHECKPOINTING
    def test_scalars_of_the_last_layer_alone_train_under_reentrant_checkpointing(self, case: TowerCase) -> None:
        """The same where nothing before the last layer trains."""
        assert case.checkpointing is not None
        skip_unless_possible(case)
        tower, inputs = compare.injected(case, layers_to_transform=[-1 - case.unread])
        compare.freeze_base(tower.train())
        case.checkpointing(tower, None)
        expected = compare.gradients(case, tower, inputs)
        case.checkpointing(tower, True)
        compare.assert_same_gradients(compare.gradients(case, tower, inputs), expected, 1e-6 * case.rounding)

    @OWN_CHECKPOINTING
    def test_ejected_tower_under_reentrant_checkpointing_is_as_it_was(self, case: TowerCase) -> None:
        """The hooks that let a frozen tower train are removed with the last adapter."""
        assert case.checkpointing is not None
        skip_unless_possible(case)
        tower, inputs = case.fresh()
        case.checkpointing(tower.train(), True)
        plain, snapshot = compare.gradients(case, tower, inputs), compare.Snapshot(tower)
        compare.gradients(case, inject_sfa(tower, compare.strong_config()), inputs)
        eject_sfa(tower)
        snapshot.assert_unchanged(tower)
        after = compare.gradients(case, tower, inputs)
        assert set(after) == set(plain)
        assert all((after[name] == plain[name]).all() for name in plain)

    @OBLONG
    @OWN_CHECKPOINTING
    @reentrant_or_not
    @ORDERS
    def test_two_grids_of_one_token_count(self, case: TowerCase, reentrant: bool, order: tuple[int, int]) -> None:
        """Two forwards with equally many tokens on different grids; their backward passes run in either order."""
        tower, _ = compare.injected(case)
        check_two_forwards(case, tower, own_checkpointing(case, tower, reentrant), order)

    @OBLONG
    @OWN_CHECKPOINTING
    @reentrant_or_not
    def test_two_grids_of_one_token_count_in_a_frozen_tower(self, case: TowerCase, reentrant: bool) -> None:
        """The same where only the scalars train."""
        tower, _ = compare.injected(case)
        compare.freeze_base(tower)
        check_two_forwards(case, tower, own_checkpointing(case, tower, reentrant), (0, 1))

    @OBLONG
    @OWN_CHECKPOINTING
    @ENCODER
    @reentrant_or_not
    @ORDERS
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of layers in such an encoder
    @pytest.mark.parametrize("nested", [False, True], ids=["encoder", "encoder and layers"])
    def test_the_whole_encoder_in_one_checkpoint(
        self,
        case: TowerCase,
        reentrant: bool,
        order: tuple[int, int],
        nested: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The encoder is checkpointed as a whole, alone or around checkpointed layers."""
        assert case.encoder is not None
        tower, _ = compare.injected(case)
        encoder = tower.get_submodule(case.encoder)

        def switch_on() -> None:
            checkpoint_part(encoder, reentrant, monkeypatch)
            if nested:
                own_checkpointing(case, tower, reentrant)()

        check_two_forwards(case, tower, switch_on, order)

    @OBLONG
    @reentrant_or_not
    def test_a_checkpoint_that_begins_with_an_operation_of_the_user(
        self, case: TowerCase, reentrant: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The checkpoint saves a tensor that no layer has seen."""
        skip_unless_possible(case, reentrant)
        tower, _ = compare.injected(case)
        if any("." not in name for name, _, _ in injected_layers(tower)):
            pytest.skip("the attention of this tower is in no layer")

        def switch_on() -> None:
            for name, _, _ in injected_layers(tower):
                layer: Any = tower.get_submodule(name.rpartition(".")[0])
                inner = layer.forward

                def forward(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                    name = "" if args else next(iter({"hidden_states", "hidden_state"} & set(kwargs)))

                    def run(states: Tensor) -> Any:
                        return (
                            inner(states * 1.0, *args[1:], **kwargs)
                            if args
                            else inner(**{name: states * 1.0}, **kwargs)
                        )

                    return checkpoint(run, args[0] if args else kwargs.pop(name), use_reentrant=reentrant)

                monkeypatch.setattr(layer, "forward", forward)

        check_two_forwards(case, tower, switch_on, (0, 1))


def own_checkpointing(case: TowerCase, tower: nn.Module, reentrant: bool) -> Callable[[], None]:
    """A function that switches on the tower's own checkpointing."""
    skip_unless_possible(case, reentrant)
    assert case.checkpointing is not None
    switch = case.checkpointing
    return lambda: switch(tower, reentrant)


def gradients_after(losses: list[Tensor], tower: nn.Module, order: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Gradients of each of two losses, whose backward passes run in the given order."""
    results: list[dict[str, Tensor]] = [{}, {}]
    for number in order:
        tower.zero_grad(set_to_none=True)
        losses[number].backward()
        results[number] = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    return results


def check_two_forwards(
    case: TowerCase, tower: nn.Module, switch_on: Callable[[], None], order: tuple[int, int]
) -> None:
    """Runs two forwards of equal token count, then both backward passes, and compares with each alone."""
    pair = case.oblong()
    assert pair is not None
    tower.train()
    if case.checkpointing is not None:
        case.checkpointing(tower, None)
    expected = [compare.gradients(case, tower, inputs) for inputs in pair]
    name = next(iter(compare.structural(tower)))
    assert compare.difference(expected[0][name], expected[1][name]) > 1e-5, "the test could not tell the grids apart"
    switch_on()
    losses = [compare.loss_of(case.hidden(tower, inputs)) for inputs in pair]
    for result, reference in zip(gradients_after(losses, tower, order), expected, strict=True):
        compare.assert_same_gradients(result, reference, 2e-6 * case.rounding)


def checkpoint_part(part: Any, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints the forward of a module as a whole; its hooks stay outside."""
    inner = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        name = None if args else "inputs_embeds"
        states = kwargs.pop(name) if name else args[0]
        kinds: list[Any] = []

        def run(given: Tensor) -> Tensor:
            out = inner(**{name: given}, **kwargs) if name else inner(given, *args[1:], **kwargs)
            kinds.append(type(out))
            return out if isinstance(out, Tensor) else out[0]

        out = checkpoint(run, states, use_reentrant=reentrant)
        return out if issubclass(kinds[0], Tensor) else kinds[0](out)

    monkeypatch.setattr(part, "forward", forward)
