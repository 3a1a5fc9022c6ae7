"""The loss from logits of answer tokens alone is the host's own: its value and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfa_adapters.adat import PatchPolicy, eject_adat, inject_adat
from sfa_adapters.answer_logits import answer_rows, logits_at_answers, why_all_logits
from sfa_adapters.reduction import DyMUConfig, FastVConfig, eject_dymu, eject_fastv, inject_dymu, inject_fastv
from sfa_adapters.testing.host_suite import HostSuite
from sfa_adapters.vlm.spec import VLMSpec

__all__ = ["AnswerLogitsContract"]

Inputs = dict[str, Any]
# Sums of the same numbers in another grouping: parts of the largest gradient of a tensor, in float32.
TOLERANCE = 1e-5


class AnswerLogitsContract(HostSuite):
    """Training computes logits in front of labels only (`sfa_adapters.answer_logits`)."""

    @pytest.fixture
    def labelled(self, model: Any, inputs: Inputs) -> Inputs:
        """Two prompts with labels on some tokens, in the first sample fewer than in the second."""
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        labels[0, -6:-4], labels[1, -5:] = ids[0, -6:-4], ids[1, -5:]
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return {**inputs, "labels": labels, "use_cache": False}

    @pytest.mark.parametrize("items", [None, 12])
    def test_loss_and_gradients_are_those_of_all_logits(self, model: Any, labelled: Inputs, items: int | None) -> None:
        """As a mean over the labels of the batch, and over those of an accumulated one."""
        assert why_all_logits(model) is None
        given = labelled if items is None else {**labelled, "num_items_in_batch": torch.tensor(items)}
        assert_same_step(model, given)

    def test_the_head_gets_the_rows_before_a_label(self, model: Any, labelled: Inputs) -> None:
        """As many rows as there are labels, and their logits are those of the whole."""
        counts: list[int] = []
        handle = model.get_output_embeddings().register_forward_hook(
            lambda _, args, output: counts.append(args[0][..., 0].numel())
        )
        with torch.no_grad():
            every = model(**labelled).logits
            with logits_at_answers(model):
                some = model(**labelled).logits
        handle.remove()
        assert counts == [labelled["labels"].numel(), 7]
        rows, _ = answer_rows(labelled["labels"])
        torch.testing.assert_close(some[0], every.flatten(0, 1)[rows], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("labels", ["one row", "none"])
    def test_rows_without_a_label(self, model: Any, labelled: Inputs, labels: str) -> None:
        """A sample without labels adds nothing; without any, a sum is 0 and a mean is NaN, as ever."""
        masked = labelled["labels"].clone()
        masked[1 if labels == "one row" else slice(None)] = -100
        given = {**labelled, "labels": masked}
        if labels == "none":
            with logits_at_answers(model):
                assert model(**given).loss.isnan()
            assert model(**given).loss.isnan()
        assert_same_step(model, {**given, "num_items_in_batch": torch.tensor(5)}, zero=labels == "none")

    def test_with_fewer_image_tokens(self, spec: VLMSpec, model: Any, labelled: Inputs) -> None:
        """FastV and DyMU shorten what layers compute and put states back before the head; ADAT changes the tower."""
        pairs: tuple[tuple[str, Callable[[], Any], Callable[[Any], Any]], ...] = (
            ("fastv", lambda: inject_fastv(model, FastVConfig(layer=1, ratio=0.75)), eject_fastv),
            ("adat", lambda: inject_adat(model, PatchPolicy(budget=0.6)), eject_adat),
            ("dymu", lambda: inject_dymu(model, DyMUConfig(thresholds=0.2)), eject_dymu),
        )
        for feature, inject, eject in pairs:
            if feature in spec.refuses or (feature == "dymu" and spec.image_tokens is None):
                continue
            inject()
            assert_same_step(model, labelled)
            eject(model)


def assert_same_step(model: nn.Module, inputs: Inputs, zero: bool = False) -> None:
    """Asserts that loss and gradients with logits of answers are those with logits of all tokens.

    Args:
        model: The model.
        inputs: Its inputs with labels.
        zero: Whether loss and gradients are 0, because nothing has a label.
    """
    (every, gradients), (some, others) = (_step(model, inputs, answers) for answers in (False, True))
    torch.testing.assert_close(some, every, rtol=1e-6, atol=0.0)
    assert gradients.keys() == others.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert bool(largest > 0) != zero
    for name, gradient in gradients.items():
        # A gradient that is nearly 0 everywhere is rounding of larger ones, such as that of the bias of keys.
        scale = torch.maximum(gradient.abs().max(), 1e-2 * largest)
        assert bool(((gradient - others[name]).abs() <= TOLERANCE * scale).all()), name


def _step(model: nn.Module, inputs: Inputs, answers: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with logits_at_answers(model) if answers else nullcontext():
        loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
