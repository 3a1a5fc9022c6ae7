"""The contract suite of vision-language models: checks a record (`VLMSpec`) on a small real model.

Derive a class, name the record, and pytest runs all of it:

    from sfa_adapters.testing.hosts import VLMContract

    class TestMine(VLMContract):
        family = "mine"

Each feature works, or the record refuses it and the error gives its reason.
"""

from __future__ import annotations

import io
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from sfa_adapters import eject_sfa, inject_sfa
from sfa_adapters.adat import PatchPolicy, eject_adat, inject_adat
from sfa_adapters.attention_call import AttentionCall
from sfa_adapters.data.collator import Collator
from sfa_adapters.errors import SFAError, SFAWarning
from sfa_adapters.evaluation.answers import generate
from sfa_adapters.heads import calibrate_heads, plan_heads, prune_heads
from sfa_adapters.hosts.load import load_host
from sfa_adapters.hosts.prepare import Host
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.observe import observe
from sfa_adapters.reduction import DyMUConfig, FastVConfig, eject_dymu, eject_fastv, inject_dymu, inject_fastv
from sfa_adapters.testing.contract_answers import AnswerLogitsContract
from sfa_adapters.testing.contract_records import RecordContract
from sfa_adapters.testing.host_suite import examples, logits_of
from sfa_adapters.training.train import train
from sfa_adapters.tuner import injected_layers
from sfa_adapters.vlm.parts import image_token_ids
from sfa_adapters.vlm.spec import VLMSpec

__all__ = ["VLMContract"]


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.examples = examples() * 2

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.examples[number]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class VLMContract(RecordContract, AnswerLogitsContract):
    """The suite: the record itself (`RecordContract`), and what the library does with such a model.

    Logits of answer tokens alone (`AnswerLogitsContract`) have a file of their own.
    """

    # -- adapters -----------------------------------------------------------------------------------------------------

    def test_sfa_acts_and_ejects_bit_for_bit(self, model: Any, plain: Any, inputs: dict[str, Any]) -> None:
        """Scalars that are not 0 change the logits; after ejecting, the logits are those of a model without SFA."""
        for _, _, layer in injected_layers(model):
            for parameter in layer.parameters():
                nn.init.constant_(parameter, 0.7)
        biased, never = logits_of(model, inputs), logits_of(plain, inputs)
        assert biased.isfinite().all()
        assert not torch.equal(biased, never)
        assert torch.equal(logits_of(eject_sfa(model), inputs), never)
        eject_sfa(inject_sfa(model))
        assert torch.equal(logits_of(model, inputs), never)

    # -- data, training, answers --------------------------------------------------------------------------------------

    def test_a_batch_has_a_place_for_every_image_token(self, host: Host, inputs: dict[str, Any]) -> None:
        """The model checks that placeholders and features are equally many; labels are those of the answer alone."""
        loss = host.model(**inputs).loss
        assert loss.isfinite()
        tokenizer: Any = getattr(host.processor, "tokenizer", None)
        for ids, labels, entry in zip(inputs["input_ids"], inputs["labels"], examples(), strict=True):
            labelled = labels != -100
            assert torch.equal(ids[labelled], labels[labelled])
            assert not torch.isin(ids[labelled], torch.tensor(image_token_ids(host.model))).any()
            text = tokenizer.decode(ids[labelled])
            assert entry["row"].target in text
            assert entry["row"].question not in text

    def test_training_moves_what_it_should_and_resumes_bit_for_bit(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two steps, or one, a checkpoint and another step, give the same weights; nothing frozen changes."""
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # curves would take most of the time
        quiet = Console(file=io.StringIO())
        states = []
        before: dict[str, Tensor] = {}
        for number, resume in enumerate((False, True)):
            host = load_host(recipe, "cpu")
            before = before or _state(host.model)
            trains = {name for name, p in host.model.named_parameters() if p.requires_grad}
            collator = Collator(host.processor, host.spec, recipe)
            if resume:
                _stopped_after(1, tmp_path / "run0", tmp_path / "run1")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SFAWarning)  # two steps cannot move a scalar far
                train(host, _Rows(), collator, folder=tmp_path / f"run{number}", resume=resume, console=quiet)
            states.append(_state(host.model))
            moved = {name for name in before if not torch.equal(before[name], states[-1][name])}
            assert moved <= trains
            parts, expected = ({host.places.part_of(name) for name in names} for names in (moved, trains))
            assert parts == expected >= {"sfa"}
        assert all(torch.equal(states[1][name], value) for name, value in states[0].items())

    def test_answers_do_not_depend_on_the_neighbour(self, host: Host) -> None:
        """A batch of two pages of different size is answered as each of them alone."""
        collator = Collator(host.processor, host.spec, host.recipe, train=False)
        together, _ = generate(host, collator(examples()))
        alone = [generate(host, collator([entry]))[0][0] for entry in examples()]
        assert together == alone

    # -- looking, reducing, pruning -----------------------------------------------------------------------------------

    def test_attention_can_be_observed(self, spec: VLMSpec, model: Any, inputs: dict[str, Any]) -> None:
        """`observe` sees the attention of the tower and of the language model."""
        places = spec.places(model)
        for modules, place in (("vision", places.tower), ("language", places.language_model)):
            calls: list[str] = []
            with observe(model, lambda call: calls.append(call.layer), modules=modules):  # noqa: B023
                logits_of(model, inputs)
            assert calls
            assert all(name.startswith(f"{place}.") for name in calls)

    def test_fastv(self, spec: VLMSpec, model: Any, inputs: dict[str, Any]) -> None:
        """FastV drops image tokens; after ejecting, the logits are as before."""
        config = FastVConfig(layer=1, ratio=0.75)
        if not self.allowed(spec, "fastv", lambda: inject_fastv(model, config)):
            return
        before, keys = logits_of(model, inputs), _fewest_keys(model, inputs)
        reduced = logits_of(inject_fastv(model, config), inputs)
        assert not torch.equal(reduced, before)
        assert _fewest_keys(model, inputs) < keys
        assert torch.equal(logits_of(eject_fastv(model), inputs), before)

    def test_dymu(self, spec: VLMSpec, model: Any, inputs: dict[str, Any]) -> None:
        """DyMU merges tokens in the tower and shortens the prompt; after ejecting, the logits are as before."""
        config = DyMUConfig(thresholds=0.2)
        if spec.image_tokens is None or not self.allowed(spec, "dymu", lambda: inject_dymu(model, config)):
            with pytest.raises(SFAError):
                inject_dymu(model, config)
            return
        before, keys = logits_of(model, inputs), _fewest_keys(model, inputs)
        merged = logits_of(inject_dymu(model, config), inputs)
        assert not torch.equal(merged[:, -1], before[:, -1])
        assert _fewest_keys(model, inputs) < keys
        assert torch.equal(logits_of(eject_dymu(model), inputs), before)

    def test_adat(self, spec: VLMSpec, model: Any, inputs: dict[str, Any]) -> None:
        """Adaptive tokens change the logits; after ejecting, the logits are as before."""
        policy = PatchPolicy(budget=0.6)
        if not self.allowed(spec, "adat", lambda: inject_adat(model, policy)):
            return
        before = logits_of(model, inputs)
        adaptive = logits_of(inject_adat(model, policy), inputs)
        assert not torch.equal(adaptive, before)
        assert torch.equal(logits_of(eject_adat(model), inputs), before)

    def test_heads(self, spec: VLMSpec, plain: Any, inputs: dict[str, Any]) -> None:
        """Heads are scored on a prompt, planned and pruned."""
        prompt = {name: value for name, value in inputs.items() if name != "labels"}
        if not self.allowed(spec, "heads", lambda: calibrate_heads(plain, [prompt], progress=False)):
            return
        plan = plan_heads(calibrate_heads(plain, [prompt], progress=False), 0.5)
        before = sum(p.numel() for p in plain.parameters())
        assert logits_of(prune_heads(plain, plan), prompt).isfinite().all()
        assert sum(p.numel() for p in plain.parameters()) < before


def _fewest_keys(model: Any, inputs: dict[str, Any]) -> int:
    """How many tokens the layer of the language model sees that sees the fewest."""
    keys: list[int] = []

    def count(call: AttentionCall) -> None:
        seen = call.scores if call.key is None else call.key.mT
        assert seen is not None
        keys.append(seen.shape[-1])

    with observe(model, count, modules="language"):
        logits_of(model, inputs)
    return min(keys)


def _stopped_after(step: int, run: Path, stopped: Path) -> None:
    """Copies the folder of a run as it was after a step."""
    shutil.copytree(run / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
