"""Saved adapters load equal: every way of injecting, times every way of saving, on a tower and on a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from sfa_adapters import inject_sfa, load_sfa, save_sfa
from sfa_adapters.errors import InjectionError
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.hosts import HOSTS
from tests.support.towers import CASES

TOWER = next(case for case in CASES if case.name == "siglip")
HOST = next(case for case in HOSTS if case.name == "llava_onevision")


@dataclass(frozen=True)
class Subject:
    """A model under test: how to build it, its inputs, what it answers, and a module beside the tower's layers."""

    name: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Any]
    answer: Callable[[Any], Tensor]
    extra: str

    def read(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.answer(model.eval()(**self.inputs))


SUBJECTS = (
    Subject("tower", TOWER.build, TOWER.inputs(0), lambda out: out.last_hidden_state, "post_layernorm"),
    Subject("vlm", HOST.build, HOST.inputs(0), lambda out: out.logits, "multi_modal_projector"),
)
every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)


def lora_then_sfa(model: Any) -> nn.Module:
    return inject_sfa(get_peft_model(model, lora()), compare.strong_config(block_grid=(2, 8)))


# A block grid that sixteen numbers do not tell.
INJECTIONS: dict[str, Callable[[Any, Subject], nn.Module]] = {
    "inject_sfa": lambda model, _: inject_sfa(model, compare.strong_config(block_grid=(2, 8))),
    "get_peft_model": lambda model, _: get_peft_model(model, compare.strong_config(block_grid=(2, 8))),
    "lora_then_sfa": lambda model, _: lora_then_sfa(model),
    "modules_to_save": lambda model, subject: get_peft_model(
        model, compare.strong_config(block_grid=(2, 8), modules_to_save=[subject.extra])
    ),
}
every_injection = pytest.mark.parametrize("way", INJECTIONS)


def injected(subject: Subject, way: str) -> nn.Module:
    torch.manual_seed(5)
    model = INJECTIONS[way](subject.build(), subject)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    return model


def reload(subject: Subject, way: str, folder: Path) -> nn.Module:
    """Loads as the documentation says, with the base model built or loaded again."""
    if way == "inject_sfa":  # the folder holds the whole model
        kind: Any = type(subject.build())
        return load_sfa(kind.from_pretrained(folder).eval(), folder)
    model: Any = PeftModel.from_pretrained(subject.build(), folder)
    return load_sfa(model, folder) if way == "lora_then_sfa" else model


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("sfa_adapters")]


@every_subject
@every_injection
def test_save_pretrained(subject: Subject, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model: Any = injected(subject, way)
    expected = subject.read(model)
    assert compare.difference(expected, subject.read(subject.build())) > 1e-3
    model.save_pretrained(tmp_path)
    again = reload(subject, way, tmp_path)
    assert torch.equal(subject.read(again), expected)
    assert {layer.configs["default"].block_grid for _, _, layer in injected_layers(again)} == {(2, 8)}
    model.save_pretrained(tmp_path / "once more")
    # Saving SFA beside LoRA says, once, how to load both.
    assert len(notices(caplog)) == (way == "lora_then_sfa")
    text = "PEFT's loader reads the LORA adapter only; load both with: load_sfa(PeftModel"
    assert all(text in notice for notice in notices(caplog))


@every_subject
@every_injection
@pytest.mark.parametrize("reader", ["load_sfa", "peft"])
def test_save_sfa(subject: Subject, way: str, reader: str, tmp_path: Path):
    model: Any = injected(subject, way)
    if way == "modules_to_save":
        with pytest.raises(InjectionError, match=r"modules_to_save=.*which save_sfa does not write.*save_pretrained"):
            save_sfa(model, tmp_path)
        return
    expected = subject.read(model)
    save_sfa(model, tmp_path / "sfa only")
    base: Any = subject.build()
    if way == "lora_then_sfa":
        model.save_pretrained(tmp_path / "both")
        base = PeftModel.from_pretrained(base, tmp_path / "both")
        if reader == "peft":
            base = base.merge_and_unload()  # PEFT puts one method into a PeftModel
            again: Any = PeftModel.from_pretrained(base, tmp_path / "sfa only")
            compare.assert_close(subject.read(again), expected)
            return
    again = load_sfa(base, tmp_path / "sfa only") if reader == "load_sfa" else PeftModel.from_pretrained(
        base, tmp_path / "sfa only"
    )  # fmt: skip
    assert torch.equal(subject.read(again), expected)


class Squares:
    """A loss for any model; SFT's own asks for text."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        out = model(**inputs)
        return (out.logits if "logits" in out else out.last_hidden_state).square().mean()


class PlainTrainer(Squares, Trainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


class SupervisedTrainer(Squares, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def trained(kind: str, model: Any, subject: Subject, folder: Path, **options: Any) -> Any:
    """One step of a real trainer, and its checkpoint."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 1, "save_steps": 1, "learning_rate": 1e-2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "per_device_train_batch_size": 1,
    }  # fmt: skip
    data = Dataset.from_list([{"number": 0}, {"number": 1}])
    batch = lambda _: dict(subject.inputs)  # noqa: E731
    if kind == "Trainer":
        trainer: Any = PlainTrainer(model, TrainingArguments(**settings), data_collator=batch, train_dataset=data)
    else:
        arguments = SFTConfig(
            **settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
            bf16=False,
        )  # fmt: skip
        trainer = SupervisedTrainer(
            model, arguments, data_collator=batch, train_dataset=data, processing_class=tokenizer(), **options
        )
    trainer.train()
    return trainer.model


@every_subject
@every_injection
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it itself
def test_checkpoint_of_a_trainer(subject: Subject, way: str, kind: str, tmp_path: Path):
    before = injected(subject, way)
    start = [p.detach().clone() for p in compare.structural(before).values()]
    model = trained(kind, before, subject, tmp_path)
    moved = [not torch.equal(old, new) for old, new in zip(start, compare.structural(model).values(), strict=True)]
    assert all(moved)
    assert torch.equal(subject.read(reload(subject, way, tmp_path / "checkpoint-1")), subject.read(model))


class Stop(TrainerCallback):
    """Ends a resumed run before its first step, when the checkpoint has been read."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        raise StopIteration


@every_subject
@every_injection
def test_a_trainer_that_resumes_has_its_scalars_back(subject: Subject, way: str, tmp_path: Path):
    model = trained("Trainer", injected(subject, way), subject, tmp_path)
    again = injected(subject, way)
    compare.fill(again, 0.0)
    settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    trainer = PlainTrainer(
        again,
        TrainingArguments(str(tmp_path / "other"), remove_unused_columns=False, save_strategy="no", **settings),
        data_collator=lambda _: dict(subject.inputs),
        train_dataset=Dataset.from_list([{"number": 0}, {"number": 1}]),
        callbacks=[Stop()],
    )
    with pytest.raises(StopIteration):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for old, new in zip(compare.structural(model).values(), compare.structural(again).values(), strict=True):
        assert torch.equal(old, new)


@every_subject
@every_injection
def test_torch_save_of_the_model(subject: Subject, way: str, tmp_path: Path):
    model = injected(subject, way)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(subject.read(again), subject.read(model))


@every_subject
@every_injection
def test_torch_save_of_the_state_dict(subject: Subject, way: str, tmp_path: Path):
    model = injected(subject, way)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = INJECTIONS[way](subject.build(), subject)
    compare.fill(again, 0.0)
    assert not torch.equal(subject.read(again), subject.read(model))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(subject.read(again), subject.read(model))
