"""Logits of answer tokens alone: exact, what refuses them, and in Trainers. All hosts: the contract suite."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from sfa_adapters import SFATrainerMixin, inject_sfa
from sfa_adapters.answer_logits import answer_rows, logits_at_answers, why_all_logits
from sfa_adapters.compat import checkpoint_activations
from sfa_adapters.errors import TrainingError
from sfa_adapters.hooks import features_of
from sfa_adapters.scr import SCRConfig, SCRLoss, SCRTrainerMixin
from sfa_adapters.testing.contract_answers import assert_same_step
from tests.support.hosts import HOSTS, HostCase

BY_NAME = {host.name: host for host in HOSTS}
HOST = BY_NAME["llava"]
SCR: dict[str, Any] = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "entropy": 0.0, "grounding": 0.0}


def inputs_of(host: HostCase = HOST, seed: int = 0) -> dict[str, Any]:
    """Two samples, with one label and with three."""
    inputs = host.inputs(seed)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[0, -2:-1], labels[1, -3:] = ids[0, -2:-1], ids[1, -3:]
    return {**inputs, "pixel_values": inputs["pixel_values"].clamp(-1, 1), "labels": labels}


def counting(model: Any) -> list[int]:
    """How many rows the head gets, one number for each call from now on."""
    counts: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: counts.append(args[0][..., 0].numel()))
    return counts


# -- a forward --------------------------------------------------------------------------------------------------------


def test_rows_are_those_before_a_label() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [5, -100, 6, -100], [-100] * 4])
    rows, targets = answer_rows(labels)
    assert rows.tolist() == [1, 2, 5]  # nothing predicts the first token of a sample
    assert targets.tolist() == [7, 8, 6]
    rows, targets = answer_rows(labels[2:])
    assert (rows.tolist(), targets.tolist()) == ([0], [-100])


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_hosts_of_other_towers(host: HostCase) -> None:
    model: Any = host.build()
    assert why_all_logits(model) is None
    assert_same_step(model, {**inputs_of(host), "use_cache": False})


def test_experts_keep_their_auxiliary_loss() -> None:
    """It is added to the loss by the host, over all tokens."""
    text: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "decoder_sparse_step": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "router_aux_loss_coef": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config={**vision, "deepstack_visual_indexes": []},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    torch.manual_seed(0)
    model: Any = transformers.Qwen3VLMoeForConditionalGeneration(config)
    ids = torch.randint(3, 50, (2, 9))
    inputs = {"input_ids": ids, "labels": ids.where(torch.arange(9) > 6, -100), "use_cache": False}
    plain = model(**inputs).loss
    inputs["output_router_logits"] = True
    assert model(**inputs).loss > plain + 0.1
    assert_same_step(model, inputs)


class Around(nn.Module):
    """Calls the forward of a host without its hooks, as PEFT did before 0.21."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.host = host

    def forward(self, **kwargs: Any) -> Any:
        return self.host.forward(**kwargs)


def test_in_a_wrapper() -> None:
    model: Any = HOST.build()
    counts = counting(model)
    assert_same_step(Around(model), inputs_of())
    assert counts == [inputs_of()["labels"].numel(), 4]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")  # peft 0.19
def test_in_peft_with_checkpointing_under_autocast() -> None:
    model: Any = HOST.build()
    lora = LoraConfig(TaskType.CAUSAL_LM, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(model, lora)
    assert why_all_logits(model) is None
    counts = counting(model.get_base_model())
    assert_same_step(model, inputs_of())
    assert counts == [2 * inputs_of()["labels"].shape[1], 4]
    checkpoint_activations(model.get_base_model(), {"use_reentrant": False})
    model.train()
    assert_same_step(model, inputs_of())
    losses = []
    for answers in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if answers:
                with logits_at_answers(model):
                    losses.append(model(**inputs_of()))
            else:
                losses.append(model(**inputs_of()))
    assert losses[0].loss.dtype == losses[1].loss.dtype == torch.float32
    torch.testing.assert_close(losses[1].loss, losses[0].loss, rtol=1e-6, atol=0.0)


def test_forwards_that_need_all_logits_get_them() -> None:
    model, inputs = HOST.build(), inputs_of()
    batch, length = inputs["labels"].shape
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    with torch.no_grad(), logits_at_answers(model):
        assert "answer_logits" in features_of(model)
        assert model(**prompt).logits.shape[:2] == (batch, length)
        assert model(**prompt, logits_to_keep=1).logits.shape[:2] == (batch, 1)
        assert model(**inputs, shift_labels=shifted).logits.shape[:2] == (batch, length)
        assert model(**inputs).logits.shape[:2] == (1, 4)
    assert not features_of(model)
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == (batch, length)


def test_the_stability_of_scr_reads_either_logits() -> None:
    values = []
    for answers in (False, True):
        model: Any = HOST.build()
        scr, inputs = SCRLoss(model, SCRConfig(stability=1.0, **SCR)), inputs_of()
        if answers:
            with logits_at_answers(model), scr.watch():
                outputs = model(**inputs)
            assert outputs.logits.shape[:2] == (1, 4)
        else:
            with scr.watch():
                outputs = model(**inputs)
        penalty, terms = scr(outputs, inputs)
        assert terms["stability_rows"] == 4
        values.append(penalty)
    assert values[0] > 0
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0.0)


# -- what cannot be ---------------------------------------------------------------------------------------------------


Base: Any = transformers.LlavaForConditionalGeneration


class OwnLoss(Base):
    """As models with code of their own compute it."""

    def forward(self, labels: Any = None, **kwargs: Any) -> Any:
        output: Any = super().forward(**kwargs)
        output.loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.11, while it imports its own compiler
def test_reasons() -> None:
    model: Any = HOST.build()
    assert why_all_logits(model) is None
    assert why_all_logits(nn.Sequential(model)) is None
    assert why_all_logits(nn.Linear(2, 2)) == "Linear has no model of transformers in it"
    own = OwnLoss(model.config)
    assert why_all_logits(own) == "OwnLoss computes its loss by itself, not by its loss_function"
    with pytest.raises(TrainingError, match=r"OwnLoss computes its loss by itself.*answer_logits=False"):
        logits_at_answers(own).__enter__()
    tuned = get_peft_model(
        copy.deepcopy(model), PromptTuningConfig(TaskType.CAUSAL_LM, num_virtual_tokens=2, token_dim=32, num_layers=2)
    )
    assert "virtual tokens" in str(why_all_logits(tuned))
    assert "is compiled" in str(why_all_logits(torch.compile(model)))  # pyright: ignore[reportArgumentType]
    model.loss_function = lambda **_: None
    assert "loss_function of LlavaForConditionalGeneration is not" in str(why_all_logits(model))
    assert "no head" in str(why_all_logits(model.model))


def test_states_of_another_length_are_refused() -> None:
    model: Any = HOST.build()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0][:, 1:],))
    with logits_at_answers(model), pytest.raises(TrainingError, match=r"head got \(2, \d+, 32\), and labels are \(2, "):
        model(**inputs_of())


def test_a_head_that_runs_twice_is_refused() -> None:
    class Twice(Base):
        def forward(self, **kwargs: Any) -> Any:
            self.loss_function  # noqa: B018
            return [super(Twice, self).forward(**kwargs) for _ in range(2)]

    model: Any = Twice(HOST.build().config)
    with logits_at_answers(model), pytest.raises(TrainingError, match="Call 2 of the head"):
        model(**inputs_of())


def test_a_head_that_does_not_run_is_refused() -> None:
    model: Any = HOST.build()
    other = nn.Linear(32, 64)
    model.get_output_embeddings = lambda: other
    with pytest.raises(TrainingError, match=r"loss of Llava.* failed .*did not run before it"):
        _with_answers(model)
    model.loss_function = model.loss_function
    model.lm_head.register_forward_hook(lambda _, args, output: output.flatten(0, 1)[:4])  # as many as there are labels
    with pytest.raises(TrainingError, match=r"ran 0 times and gave logits"):
        _with_answers(model)


def _with_answers(model: Any) -> Any:
    with logits_at_answers(model):
        return model(**inputs_of())


# -- Trainers ---------------------------------------------------------------------------------------------------------


class Rows(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        inputs = inputs_of(seed=number)
        return {name: value[number % 2] for name, value in inputs.items()}


class PlainTrainer(SFATrainerMixin, Trainer): ...


class SCRFirst(SCRTrainerMixin, SFATrainerMixin, Trainer): ...


class SCRLast(SFATrainerMixin, SCRTrainerMixin, Trainer): ...


def trainer(folder: Path, kind: Any = PlainTrainer, given: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = inject_sfa(HOST.build().train())
    model.config.use_cache = False
    model.requires_grad_(True)
    settings: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 1, "optim": "sgd",
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return kind(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(), **(given or {}))


def run(folder: Path, *args: Any, **options: Any) -> tuple[list[float], dict[str, Tensor], list[int], Any]:
    """Losses, weights at the end, rows that the head got, and the Trainer."""
    made = trainer(folder, *args, **options)
    counts = counting(made.model)
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return losses, {name: p.detach().clone() for name, p in made.model.named_parameters()}, counts, made


def assert_same_run(first: Any, second: Any) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    for name, value in first[1].items():
        torch.testing.assert_close(value, second[1][name], rtol=1e-5, atol=1e-6)


ON: dict[str, Any] = {"answer_logits": True}


def test_a_trainer_with_it_and_without(tmp_path: Path) -> None:
    """Off unless it is asked for; in an evaluation all logits are handed out."""
    shapes: list[tuple[int, ...]] = []

    def measure(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    given = {"compute_metrics": measure}
    off, on = run(tmp_path, given=given), run(tmp_path, given={**ON, **given})
    length = inputs_of()["labels"].shape[1]
    assert off[2] == [2 * length] * 3
    assert all(rows in (2, 4, 6) for rows in on[2])
    assert_same_run(on, off)
    unread = ["cache", "past_key_values", "image_outputs", "image_hidden_states"]  # no Trainer can gather these
    evaluated = [made[3].evaluate(ignore_keys=unread)["eval_loss"] for made in (off, on)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-5)
    assert shapes[0] == shapes[1] == (8, length, 64)


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Rows of one label and of three: a mean of means would be another number."""
    whole = run(tmp_path, given=ON, per_device_train_batch_size=4, max_steps=2)
    parts = run(tmp_path, given=ON, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    assert sum(whole[2]) == sum(parts[2]) == 4 * 1 + 4 * 3
    assert_same_run(parts, whole)


@pytest.mark.parametrize("kind", [SCRFirst, SCRLast])
def test_with_scr_in_either_order(kind: Any, tmp_path: Path) -> None:
    given = {"scr_config": SCRConfig(stability=1.0, **SCR)}
    off, on = run(tmp_path, kind, given), run(tmp_path, kind, {**given, **ON})
    assert_same_run(on, off)
    assert sum(on[2]) < sum(off[2])
    assert all(line["scr/stability"] > 0 for line in on[3].state.log_history if "loss" in line)


def _sum_of_logits(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.square().mean()


@pytest.mark.parametrize(
    ("given", "options", "reason"),
    [
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"compute_loss_func": _sum_of_logits}, {}, "compute_loss_func reads them"),
    ],
    ids=["smoothing", "function"],
)
def test_where_a_trainer_reads_the_logits_all_are_there(
    given: dict[str, Any], options: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    off = run(tmp_path, given=given, **options)
    with caplog.at_level(logging.WARNING, logger="sfa_adapters.trainer"):
        on = run(tmp_path, given={**given, **ON}, **options)
    messages = [record.getMessage() for record in caplog.records if record.name == "sfa_adapters.trainer"]
    assert len(messages) == 1
    assert messages[0].startswith(f"The logits of all tokens are computed, which takes more memory: {reason}")
    assert on[0] == off[0]
    assert on[2] == off[2]


@pytest.mark.parametrize(("name", "value"), [("use_liger_kernel", True), ("_n_gpu", 2)])
def test_arguments_that_need_all_logits(
    name: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path, given=ON)
    setattr(made.args, name, value)
    reason = {"use_liger_kernel": "fuses head and loss", "_n_gpu": "DataParallel"}[name]
    with caplog.at_level(logging.WARNING, logger="sfa_adapters.trainer"):
        assert not made._answers_suffice(made.model)
    assert reason in caplog.text


def test_where_a_model_needs_all_logits_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, given=ON)
    losses = []
    made.model.loss_function = lambda *args, **kwargs: losses.append(1) or kwargs["logits"].square().mean()
    with caplog.at_level(logging.WARNING, logger="sfa_adapters.trainer"):
        made.train()
    assert len(losses) == 3
    assert "is not that of causal language models" in caplog.text
