"""The contract suite of vision-language models: checks a record (`VLMSpec`) on a small real model.

Derive a class, name the record, and pytest runs all of it:

    from sfa_adapters.testing.hosts import VLMContract

    class TestMine(VLMContract):
        family = "mine"

Each feature works, or the record refuses it and the error gives its reason.
"""

from __future__ import annotations

import io
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from sfa_adapters import eject_sfa, inject_sfa
from sfa_adapters.adat import PatchPolicy, eject_adat, inject_adat
from sfa_adapters.data.collator import NOT_FOR_MODEL, Collator
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import SFAError, SFAWarning
from sfa_adapters.evaluation.answers import generate
from sfa_adapters.heads import calibrate_heads, plan_heads, prune_heads
from sfa_adapters.hosts.load import load_host
from sfa_adapters.hosts.prepare import Host
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.predict import predict_memory
from sfa_adapters.memory.weights import count_parameters
from sfa_adapters.observe import observe
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint, nano_settings
from sfa_adapters.reduction import DyMUConfig, FastVConfig, eject_dymu, eject_fastv, inject_dymu, inject_fastv
from sfa_adapters.registry import find_tower
from sfa_adapters.training.train import train
from sfa_adapters.tuner import injected_layers
from sfa_adapters.vlm.parts import find_decoder, image_token_ids
from sfa_adapters.vlm.records import find_spec, vlm_spec
from sfa_adapters.vlm.spec import Feature, VLMSpec

__all__ = ["VLMContract"]

SIZES = ((150, 90), (96, 170))  # height and width in pixels: one tall, one wide
QUESTIONS = ("How many?", "What stands in the second row of the table?")


def _examples() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    pages = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    rows = [Row(f"r{n}", None, question, (str(n + 1),)) for n, question in enumerate(QUESTIONS)]
    return [{"row": row, "image": page, "skipped": ()} for row, page in zip(rows, pages, strict=True)]


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.examples = _examples() * 2

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.examples[number]


def _tensors(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class VLMContract:
    """The contract suite. Derived classes name the record, from which everything else comes.

    Attributes:
        family: Name of the record. It must have `nano`, which builds the small model.
    """

    family: ClassVar[str]

    # -- what tests share ---------------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> VLMSpec:
        """The record."""
        return vlm_spec(cls.family)

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The small model as a checkpoint, with its processor."""
        return nano_checkpoint(cls.family, tmp_path_factory.mktemp(cls.family) / "model")

    @pytest.fixture(scope="class")
    @classmethod
    def recipe(cls, spec: VLMSpec, folder: Path) -> Recipe:
        """A recipe of two steps on a CPU."""
        refused = spec.refusal("train")
        if refused is not None:
            pytest.skip(refused)
        made = nano_settings(Recipe(name="contract", model="model", family=cls.family))
        return made.replace(
            model=str(folder), max_steps=2, warmup_steps=1, batch_size=2, micro_batch=2, save_steps=1, max_new_tokens=4
        )

    @pytest.fixture
    def host(self, recipe: Recipe) -> Host:
        """The model with SFA, for inference."""
        return load_host(recipe, "cpu", train=False)

    @pytest.fixture
    def plain(self, recipe: Recipe) -> Host:
        """The same without SFA."""
        return load_host(recipe.replace(sfa=False), "cpu", train=False)

    @pytest.fixture
    def inputs(self, host: Host) -> dict[str, Any]:
        """Two prompts with pages of two sizes, and their answers as labels."""
        return _tensors(Collator(host.processor, host.spec, host.recipe)(_examples()))

    def allowed(self, spec: VLMSpec, feature: Feature, use: Callable[[], Any]) -> bool:
        """Whether the record allows a feature; where it does not, using it must raise its reason."""
        reason = spec.refuses.get(feature)
        if reason is None:
            return True
        with pytest.raises(SFAError, match=re.escape(reason)):
            use()
        return False

    # -- the record ---------------------------------------------------------------------------------------------------

    def test_the_record_is_that_of_the_model(self, spec: VLMSpec) -> None:
        """The small model, its core and its configuration are of the kind that the record says."""
        assert spec.nano is not None, f"{self.family}: the suite needs a small model; write the record's nano."
        model, processor = spec.nano()
        assert find_spec(model) is spec
        assert type(model).__name__ == spec.model_class
        assert model.config.model_type == spec.model_type
        tower = find_tower(model)
        core = model.get_submodule(tower.name.rpartition(".")[0])
        assert find_spec(core) is spec, "classes must name the core that joins tower and language model, too."
        assert find_decoder(model).layers
        assert image_token_ids(model)
        assert getattr(processor, "image_processor", None) is not None

    def test_every_parameter_is_in_one_part(self, spec: VLMSpec) -> None:
        """Every parameter is in one part, with adapters and without; the tower holds the attention layers."""
        assert spec.nano is not None
        model, _ = spec.nano()
        places = spec.places(model)
        assert places.tower == find_tower(model).name
        parts = {places.part_of(name) for name, _ in model.named_parameters()}
        assert {"vision", "llm"} <= parts
        inject_sfa(model)
        assert "sfa" in {places.part_of(name) for name, _ in model.named_parameters()}
        assert spec.places(model) == places

    def test_recipes_take_it_or_say_why_not(self, spec: VLMSpec) -> None:
        """A recipe refuses a record that cannot train, with the reason of the record."""
        reason = spec.refusal("train")
        if reason is None:
            assert Recipe(name="contract", model="model", family=self.family).family == self.family
            return
        with pytest.raises(SFAError, match=re.escape(reason)):
            Recipe(name="contract", model="model", family=self.family)

    # -- adapters -----------------------------------------------------------------------------------------------------

    def test_sfa_acts_and_ejects_bit_for_bit(self, host: Host, inputs: dict[str, Any]) -> None:
        """Scalars that are not 0 change the logits; after ejecting, the logits are as before."""
        for _, _, layer in injected_layers(host.model):
            for parameter in layer.parameters():
                nn.init.constant_(parameter, 0.7)
        biased = _logits(host.model, inputs)
        eject_sfa(host.model)
        before = _logits(host.model, inputs)
        assert biased.isfinite().all()
        assert not torch.equal(biased, before)
        eject_sfa(inject_sfa(host.model))
        assert torch.equal(_logits(host.model, inputs), before)

    def test_a_bare_model_that_recipes_refuse_takes_sfa(self, spec: VLMSpec) -> None:
        """SFA can be injected also where the record refuses training."""
        assert spec.nano is not None
        model, _ = spec.nano()
        assert injected_layers(inject_sfa(model))

    # -- data, training, answers --------------------------------------------------------------------------------------

    def test_a_batch_has_a_place_for_every_image_token(self, host: Host, inputs: dict[str, Any]) -> None:
        """The model checks that placeholders and features are equally many; labels are those of the answer alone."""
        loss = host.model(**inputs).loss
        assert loss.isfinite()
        labelled = inputs["labels"] != -100
        assert labelled.any(1).all()
        assert not torch.isin(inputs["input_ids"][labelled], torch.tensor(image_token_ids(host.model))).any()

    def test_training_moves_what_it_should_and_resumes_bit_for_bit(self, recipe: Recipe, tmp_path: Path) -> None:
        """Two steps, or one, a checkpoint and another step, give the same weights; nothing frozen changes."""
        quiet = Console(file=io.StringIO())
        states = []
        before: dict[str, Tensor] = {}
        for number, resume in enumerate((False, True)):
            host = load_host(recipe, "cpu")
            before = before or _state(host.model)
            trains = {name for name, p in host.model.named_parameters() if p.requires_grad}
            collator = Collator(host.processor, host.spec, recipe)
            if not resume:
                assert _without_gradient(host, _tensors(collator(_examples()))) == []
            if resume:
                _stopped_after(1, tmp_path / "run0", tmp_path / "run1")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SFAWarning)  # two steps cannot move a scalar far
                train(host, _Rows(), collator, folder=tmp_path / f"run{number}", resume=resume, console=quiet)
            states.append(_state(host.model))
            moved = {name for name in before if not torch.equal(before[name], states[-1][name])}
            assert moved
            assert moved <= trains
            assert {host.places.part_of(name) for name in moved} >= {"sfa"}
        assert all(torch.equal(states[1][name], value) for name, value in states[0].items())

    def test_answers_do_not_depend_on_the_neighbour(self, host: Host) -> None:
        """A batch of two pages of different size is answered as each of them alone."""
        collator = Collator(host.processor, host.spec, host.recipe, train=False)
        together, _ = generate(host, collator(_examples()))
        alone = [generate(host, collator([example]))[0][0] for example in _examples()]
        assert together == alone

    # -- looking, reducing, pruning -----------------------------------------------------------------------------------

    def test_attention_can_be_observed(self, host: Host, inputs: dict[str, Any]) -> None:
        """`observe` sees the attention of the tower and of the language model."""
        calls: list[str] = []
        for modules in ("vision", "language"):
            with observe(host.model, lambda call: calls.append(call.layer), modules=modules):
                _logits(host.model, inputs)
        assert any(host.places.tower in name for name in calls)
        assert any(host.places.language_model in name for name in calls)

    def test_fastv(self, spec: VLMSpec, host: Host, inputs: dict[str, Any]) -> None:
        """FastV changes the logits; after ejecting, they are as before."""
        config = FastVConfig(layer=1, ratio=0.75)
        if not self.allowed(spec, "fastv", lambda: inject_fastv(host.model, config)):
            return
        before = _logits(host.model, inputs)
        reduced = _logits(inject_fastv(host.model, config), inputs)
        assert not torch.equal(reduced, before)
        assert torch.equal(_logits(eject_fastv(host.model), inputs), before)

    def test_dymu(self, spec: VLMSpec, host: Host, inputs: dict[str, Any]) -> None:
        """DyMU changes the logits; after ejecting, they are as before."""
        config = DyMUConfig(thresholds=0.2)
        if spec.image_tokens is None or not self.allowed(spec, "dymu", lambda: inject_dymu(host.model, config)):
            with pytest.raises(SFAError):
                inject_dymu(host.model, config)
            return
        before = _logits(host.model, inputs)
        merged = _logits(inject_dymu(host.model, config), inputs)
        assert not torch.equal(merged[:, -1], before[:, -1])
        assert torch.equal(_logits(eject_dymu(host.model), inputs), before)

    def test_adat(self, spec: VLMSpec, host: Host, inputs: dict[str, Any]) -> None:
        """Adaptive tokens change the logits; after ejecting, they are as before."""
        policy = PatchPolicy(budget=0.6)
        if not self.allowed(spec, "adat", lambda: inject_adat(host.model, policy)):
            return
        before = _logits(host.model, inputs)
        adaptive = _logits(inject_adat(host.model, policy), inputs)
        assert not torch.equal(adaptive, before)
        assert torch.equal(_logits(eject_adat(host.model), inputs), before)

    def test_heads(self, spec: VLMSpec, plain: Host) -> None:
        """Heads are scored on a prompt, planned and pruned."""
        batch = _tensors(Collator(plain.processor, plain.spec, plain.recipe)(_examples()))
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        if not self.allowed(spec, "heads", lambda: calibrate_heads(plain.model, [prompt], progress=False)):
            return
        plan = plan_heads(calibrate_heads(plain.model, [prompt], progress=False), 0.5)
        before = sum(p.numel() for p in plain.model.parameters())
        logits = _logits(prune_heads(plain.model, plan), prompt)
        assert logits.isfinite().all()
        assert sum(p.numel() for p in plain.model.parameters()) < before

    # -- memory -------------------------------------------------------------------------------------------------------

    def test_memory_is_predicted_from_the_configuration(self, spec: VLMSpec, recipe: Recipe, host: Host) -> None:
        """Every weight is counted; more tokens need more memory."""
        config = host.model.config
        reason = spec.refusal("memory")
        if reason is not None:
            with pytest.raises(SFAError, match=re.escape(reason)):
                predict_memory(recipe, config, gpus=1)
            return
        counts = count_parameters(recipe, config)
        names = [name for name, _ in host.model.named_parameters() if host.places.part_of(name) != "sfa"]
        weights = dict(host.model.named_parameters())
        assert sum(counts.parts.values()) == sum(weights[name].numel() for name in names)
        one, four = (predict_memory(recipe, config, gpus=1, batch=batch) for batch in (1, 4))
        assert four.devices[0].activations > one.devices[0].activations > 0


def _without_gradient(host: Host, inputs: dict[str, Any]) -> list[str]:
    """Trainable parameters without a gradient: `unread` of the record must name them."""
    host.model(**inputs, use_cache=False).loss.backward()
    missing = [name for name, p in host.model.named_parameters() if p.requires_grad and p.grad is None]
    host.model.zero_grad(set_to_none=True)
    return missing


def _stopped_after(step: int, run: Path, stopped: Path) -> None:
    """Copies the folder of a run as it was after a step."""
    shutil.copytree(run / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
