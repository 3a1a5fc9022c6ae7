"""`SFATrainerMixin` in real Trainers: groups, ramp, logs, warnings, resume, beside SCR and in TRL."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset as Table
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from sfa_adapters import SFAConfig, SFATrainerMixin, inject_sfa, sfa_parameter_groups
from sfa_adapters.errors import InjectionError, SFAWarning, TrainingError
from sfa_adapters.scr import SCRConfig, SCRTrainerMixin
from sfa_adapters.tuner import injected_layers
from tests.support.hosts import HOSTS

HOST = next(host for host in HOSTS if host.name == "llava")


class Rows(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        inputs = HOST.inputs(number)
        row = {name: value[0] for name, value in inputs.items()}
        row["pixel_values"] = row["pixel_values"].clamp(-1, 1)
        labels = row["input_ids"].clone()
        labels[:-3] = -100
        return {**row, "labels": labels}


class PlainTrainer(SFATrainerMixin, Trainer): ...


class SCRFirst(SCRTrainerMixin, SFATrainerMixin, Trainer): ...


class SCRLast(SFATrainerMixin, SCRTrainerMixin, Trainer): ...


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = inject_sfa(HOST.build().train(), SFAConfig(**options))
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" in name or "projector" in name)
    return model


def trainer(model: Any, folder: Path, kind: Any = PlainTrainer, steps: int = 4, **options: Any) -> Any:
    keywords = {
        name: options.pop(name) for name in ("sfa_lr", "scr_config", "optimizers", "callbacks") if name in options
    }
    settings: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.1,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "remove_unused_columns": False, "seed": 1, "optim": "adamw_torch",
    }  # fmt: skip
    rows = options.pop("rows", None) or Rows()
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return kind(model=model, args=arguments, train_dataset=rows, **keywords)


def scalars(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".sfa_" in name}


def test_groups_rates_and_logs(tmp_path: Path) -> None:
    model = adapted()
    before = scalars(model)
    made = trainer(model, tmp_path, sfa_lr=1.0, lr_scheduler_type="constant")
    made.train()
    groups = {group["name"]: (group["initial_lr"], group["weight_decay"]) for group in made.optimizer.param_groups}
    assert groups == {"model": (1e-3, 0.1), "model (no decay)": (1e-3, 0.0), "sfa": (1.0, 0.0)}
    assert made.optimizer_cls_and_kwargs is None
    moved = max((value - before[name]).abs().max().item() for name, value in scalars(model).items())
    assert 1.5 < moved < 6
    logged = [line for line in made.state.log_history if "loss" in line]
    assert len(logged) == 4
    for line in logged:
        assert {"sfa/row", "sfa/col"} <= line.keys()
    assert logged[-1]["learning_rate"] == 1e-3
    last = made.state.log_history[-1]
    assert "train_runtime" in last
    rows = max(value.abs().max().item() for name, value in scalars(model).items() if "sfa_row" in name)
    assert last["sfa/row"] == pytest.approx(rows)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd", "lion_32bit"])
def test_the_optimizer_is_that_of_the_arguments(optim: str, tmp_path: Path) -> None:
    if optim == "lion_32bit":
        pytest.importorskip("bitsandbytes")
    made = trainer(adapted(), tmp_path, optim=optim)
    plain: Any = Trainer(model=adapted(), args=made.args)
    assert type(made.create_optimizer()) is type(plain.create_optimizer())
    assert [group["name"] for group in made.optimizer.param_groups] == ["model", "model (no decay)", "sfa"]
    ignored = {"params", "lr", "weight_decay", "name"}
    ours, theirs = ({k: v for k, v in t.optimizer.param_groups[0].items() if k not in ignored} for t in (made, plain))
    assert ours == theirs


def test_optimizers_with_groups_of_their_own_are_refused(tmp_path: Path) -> None:
    made = trainer(adapted(), tmp_path)
    made.get_optimizer_cls_and_kwargs = lambda *_: (torch.optim.AdamW, {"optimizer_dict": {}})
    with pytest.raises(InjectionError, match=r"args\.optim=.* makes its own parameter groups"):
        made.create_optimizer()
    made.get_optimizer_cls_and_kwargs = lambda *_: (object, {})
    with pytest.raises(InjectionError, match="makes its own parameter groups"):
        made.create_optimizer()


def test_models_that_cannot_learn(tmp_path: Path) -> None:
    model: Any = HOST.build()
    with pytest.raises(InjectionError, match="has no SFA"):
        trainer(model, tmp_path).train()
    with pytest.raises(InjectionError, match="sfa_lr=0"):
        trainer(adapted(), tmp_path, sfa_lr=0).train()
    frozen = adapted()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("projector" in name)
    with pytest.raises(TrainingError, match="structural scalars are frozen"):
        trainer(frozen, tmp_path).train()


def test_a_run_that_cannot_reach_three_logits_warns_at_its_start_and_at_its_end(tmp_path: Path) -> None:
    """Of a linear schedule from 0.1 in four steps: 0.1 + 0.075 + 0.05 + 0.025."""
    made = trainer(adapted(), tmp_path)
    with pytest.warns(SFAWarning) as caught:
        made.train()
    texts = [str(one.message) for one in caught if issubclass(one.category, SFAWarning)]
    assert len(texts) == 2
    assert "add up to 0.25 logits over 4 steps" in texts[0]
    assert "The bias hardly acts" in texts[1]


def test_an_axial_start_needs_no_rate(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(adapted(init="axial"), tmp_path, sfa_lr=1e-5, steps=1).train()


def test_an_optimizer_that_is_passed_in_is_left_alone_and_checked(tmp_path: Path) -> None:
    model = adapted()
    constant = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0)  # noqa: E731
    named = torch.optim.AdamW(sfa_parameter_groups(model, 1e-3, sfa_lr=0.5))
    with pytest.warns(SFAWarning, match="add up to 2 logits"):
        trainer(model, tmp_path, optimizers=(named, constant(named))).train()
    mixed = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.warns(SFAWarning, match=r"add up to 0\.04 logits"):
        trainer(model, tmp_path, optimizers=(mixed, None)).create_optimizer_and_scheduler(4)
    without = torch.optim.AdamW([p for name, p in model.named_parameters() if ".sfa_" not in name], lr=0.01)
    with pytest.warns(SFAWarning, match="holds none of the structural scalars"):
        trainer(model, tmp_path, optimizers=(without, None)).create_optimizer_and_scheduler(4)


# -- the ramp --------------------------------------------------------------------------------------------------------


def row_of(model: nn.Module) -> float:
    return injected_layers(model)[0][2].tensors("default")["sfa_row"][0].item()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_ramp_runs_by_itself(accumulation: int, tmp_path: Path) -> None:
    """At a rate that changes nothing, the strength is the number of optimizer steps."""
    model = adapted(init="axial", init_warmup_steps=6, init_strength=3.0)
    made = trainer(model, tmp_path, sfa_lr=1e-9, gradient_accumulation_steps=accumulation)
    made.train()
    assert row_of(model) == pytest.approx(2.0, abs=1e-6)
    assert injected_layers(model)[0][2].configs["default"].init_warmup_done == 4


class Pictures(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        pixels = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(number))
        return {"pixel_values": pixels, "labels": number % 2}


def classifier() -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = SiglipConfig(vision_config={**size, "image_size": 56, "patch_size": 14}, text_config=size)
    return SiglipForImageClassification(config)


@pytest.mark.parametrize("way", ["inject_sfa", "beside LoRA", "get_peft_model"])
def test_a_resumed_run_is_the_run_without_a_break(way: str, tmp_path: Path) -> None:
    """Bit for bit: ramp, optimizer state and all."""

    def build() -> Any:
        model = classifier()
        config = SFAConfig.published(init="axial", init_warmup_steps=5, init_strength=3.0)
        if way == "get_peft_model":
            return get_peft_model(model, config).train()
        if way == "beside LoRA":
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        return inject_sfa(model, config).train()

    options: dict[str, Any] = {"sfa_lr": 0.5, "steps": 6, "save_strategy": "steps", "save_steps": 3}
    options["rows"] = Pictures()
    whole = build()
    trainer(whole, tmp_path / "a", **options).train()
    again = build()
    trainer(again, tmp_path / "a", **options).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    expected = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    assert len(expected) >= 8
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, expected[name]), name
    assert injected_layers(again)[0][2].configs["default"].init_warmup_done == 5


def test_a_trained_adapter_is_not_ramped_again(tmp_path: Path) -> None:
    model = adapted(init="axial", init_warmup_steps=2, init_strength=3.0)
    trainer(model, tmp_path, sfa_lr=1e-9).train()
    trainer(model, tmp_path, sfa_lr=1e-9).train()
    assert row_of(model) == pytest.approx(3.0, abs=1e-6)


# -- beside others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SCRFirst, SCRLast])
def test_with_scr_in_any_order(kind: Any, tmp_path: Path) -> None:
    model = adapted(init="axial", init_warmup_steps=8)
    given = SCRConfig(entropy=0.1, scorer=left_half, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    made = trainer(model, tmp_path, kind, steps=2, sfa_lr=1.0, scr_config=given)
    made.train()
    assert made.optimizer.param_groups[-1]["name"] == "sfa"
    logged = [line for line in made.state.log_history if "loss" in line]
    assert all("sfa/row" in line and "scr/entropy" in line for line in logged)
    assert injected_layers(model)[0][2].configs["default"].init_warmup_done == 2


def left_half(images: Tensor) -> Tensor:
    """A scorer: print on the left half of every page."""
    return torch.tensor([1.0, 0.0]).expand(len(images), 1, 2)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_in_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    class SupervisedTrainer(SFATrainerMixin, trl.SFTTrainer): ...

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, per_device_train_batch_size=2,
        gradient_checkpointing=False, remove_unused_columns=False, max_length=None,
    )  # fmt: skip
    model = adapted(init="axial", init_warmup_steps=4)
    rows = Rows()
    made: Any = SupervisedTrainer(
        model=model, args=arguments, train_dataset=Table.from_list([{"number": n} for n in range(4)]),
        data_collator=lambda picked: default_data_collator([rows[one["number"]] for one in picked]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
        sfa_lr=1e-9, answer_logits=True,
    )  # fmt: skip
    made.train()
    assert not made.answer_logits  # this Trainer measures all logits
    assert made.optimizer.param_groups[-1]["name"] == "sfa"
    assert row_of(model) == pytest.approx(1.5, abs=1e-6)
    assert "sfa/row" in made.state.log_history[0]
