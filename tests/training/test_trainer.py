"""`SFATrainer`: a run, its checks, its restarts and its files."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sfa_adapters.errors import DataError, RecipeError, TrainingError
from sfa_adapters.training.arguments import require_logger, training_arguments
from sfa_adapters.training.checks import GradientCheck, check_labels
from sfa_adapters.training.curves import plot_training, write_log
from sfa_adapters.training.optimizer import EpochOrder, accumulation, parameter_groups, total_steps
from sfa_adapters.training.trainer import SFATrainer
from tests.support.paths import ROOT
from tests.support.tiny_training import (
    BY_NAME,
    At,
    Rows,
    Stream,
    assert_equal,
    collate,
    recipe,
    run,
    tiny_host,
    trained,
)

FAMILIES = ("llava", "llava_onevision", "internvl")


class Stopped(Exception):
    """Ends a run without any cleanup, as a crash does."""


def stop() -> None:
    raise Stopped


def state_of(folder: Path, step: int) -> dict[str, Any]:
    """The optimizer's state in a checkpoint, flat."""
    saved = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
    return {f"{number}.{name}": value for number, state in saved["state"].items() for name, value in state.items()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], Any]:
    """Six steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    host, result = run(folder, curves=True)
    return folder, trained(host), result


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_frozen_parts_stay(family: str, tmp_path: Path) -> None:
    given = recipe(family=family, max_steps=24, lr=1e-2, logging_steps=4, save_steps=24, sfa_layers=(0, 1))
    before = tiny_host(given)
    start = {name: p.detach().clone() for name, p in before.model.named_parameters()}
    host, result = run(tmp_path, given)
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
    assert result.loss == losses[-1]
    for name, parameter in host.model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    assert not host.model.training


def test_a_run_leaves_its_curves_and_the_rows_that_were_skipped(whole_run: tuple[Path, Any, Any]) -> None:
    folder, _, result = whole_run
    assert (result.steps, result.folder, result.trained) == (6, folder, folder / "final")
    lines = (folder / "log.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,loss,learning_rate,grad_norm,lr/projector,lr/sfa,lr/vision,sfa/col,sfa/row"
    assert len(lines) == 1 + 6
    with Image.open(folder / "training.png") as picture:
        assert picture.size[0] > 1000
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [{"id": f"broken{number}", "reason": "cut off"} for number in (1, 6)]
    assert [(one.id, one.reason) for one in result.skipped] == [(one["id"], one["reason"]) for one in skipped]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(folder.rglob("*.bin"))


def test_the_forward_is_the_plain_one_afterwards(tmp_path: Path) -> None:
    host, _ = run(tmp_path, recipe(dtype="bfloat16", max_steps=1, warmup_steps=0))
    assert "forward" not in vars(host.model)
    assert host.model.config.get_text_config().use_cache == BY_NAME["llava"].build().config.get_text_config().use_cache  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    batch = collate([Rows()[0]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad(), host.autocast():
        assert host.model(**inputs).logits.dtype == torch.bfloat16


def test_the_table_and_a_line_per_log_are_printed(tmp_path: Path) -> None:
    out = StringIO()
    run(tmp_path, recipe(max_steps=4), console=Console(file=out, width=120))
    text = out.getvalue()
    assert text.index("model.vision_tower") < text.index("step 1/4")
    assert "loss" in text
    assert "grad norm" in text
    assert "2 training rows could not be used" in text
    assert "broken1: cut off" in text


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    out = StringIO()
    run(tmp_path, recipe(max_steps=2, warmup_steps=0), console=Console(file=out, width=160, force_terminal=True))
    assert "2/2" in out.getvalue()
    assert "step 1/2" not in out.getvalue()


def test_the_head_gets_the_rows_of_answers_unless_it_is_turned_off(tmp_path: Path) -> None:
    """Two samples of two answer tokens each, and the same losses."""
    losses, rows = [], []
    for number, answers in enumerate((True, False)):
        host = tiny_host(given := recipe(answer_logits=answers, max_steps=2))
        counts: list[int] = []
        head: Any = host.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        head.register_forward_hook(lambda _, args, __, counts=counts: counts.append(args[0][..., 0].numel()))
        arguments = training_arguments(given, tmp_path / str(number), 2, host)
        trainer = SFATrainer(host, args=arguments, train_dataset=Rows(), data_collator=collate)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        rows.append(counts)
    assert recipe().answer_logits
    assert rows[0] == [4] * 4
    assert all(count > 2 * 16 for count in rows[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -- restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 6))
def test_a_restart_is_the_uninterrupted_run_bit_for_bit(
    step: int, whole_run: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    """From each step, also from those at the end of an epoch (two steps); with dropout, order, rates and AdamW."""
    folder, expected, uninterrupted = whole_run
    with pytest.raises(Stopped):
        run(tmp_path, callbacks=[At(step + 1 if step % 2 else step, stop)], given=recipe(save_steps=1))
    host, result = run(tmp_path, recipe(save_steps=1), resume=True)
    assert_equal(trained(host), expected)
    assert_equal(state_of(tmp_path, 6), state_of(folder, 6))
    assert [line for line in result.history if "loss" in line] == [
        line for line in uninterrupted.history if "loss" in line
    ]
    assert result.skipped == uninterrupted.skipped


def test_a_run_that_is_finished_gets_no_more_steps(tmp_path: Path) -> None:
    given = recipe(max_steps=3)  # in the middle of an epoch
    first, _ = run(tmp_path, given)
    again, result = run(tmp_path, given, resume=True)
    assert result.steps == 3
    assert_equal(trained(again), trained(first))


def test_dropout_and_order_matter_in_these_runs(whole_run: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Else equal restarts would show nothing."""
    _, expected, _ = whole_run
    host, _ = run(tmp_path, recipe(seed=1))
    other = trained(host)
    assert any(not torch.equal(other[name], expected[name]) for name in expected)
    model = tiny_host().model.train()
    batch = collate([Rows()[0]])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    assert model(**inputs).loss != model(**inputs).loss


def test_a_restart_with_the_terms_of_scr_and_a_lora(tmp_path: Path) -> None:
    given = recipe(
        family="llava_onevision",
        max_steps=4,
        save_steps=1,
        scr_stability=0.3,
        scr_entropy=0.02,
        lora_llm=2,
        llm_lr=1e-2,
    )
    expected, _ = run(tmp_path / "whole", given)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", given, callbacks=[At(3, stop)])
    host, result = run(tmp_path / "parts", given, resume=True)
    assert_equal(trained(host), trained(expected))
    assert any("scr/stability" in line for line in result.history)


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    given = recipe(max_steps=4, save_steps=1, streaming=True)  # 16 rows: one pass and a half
    expected, _ = run(tmp_path / "whole", given, Stream(10))
    with pytest.raises(Stopped):
        run(tmp_path / "parts", given, Stream(10), callbacks=[At(3, stop)])
    host, _ = run(tmp_path / "parts", given, Stream(10), resume=True)
    assert_equal(trained(host), trained(expected))
    with pytest.raises(DataError, match="is empty"):
        run(tmp_path / "empty", given, Stream(0))
    with pytest.raises(RecipeError, match="max_steps=None"):
        run(tmp_path / "endless", recipe(streaming=True), Stream(10))


@pytest.mark.nightly  # 25 seconds
def test_signals_to_the_whole_group(tmp_path: Path) -> None:
    """SIGKILL leaves the last checkpoint; SIGTERM and Ctrl-C make one; in the end all is as without them."""
    folder = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.support.tiny_training", str(folder), "kill:3", "term:4", "int:5"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    terminated, interrupted = ((tmp_path / f"{name}.log").read_text() for name in ("term", "int"))
    assert json.loads((tmp_path / "outcomes.json").read_text()) == {
        "kill": [-signal.SIGKILL, ["checkpoint-2"]],
        "term": [128 + signal.SIGTERM, ["checkpoint-2", "checkpoint-4"]],
        "int": [128 + signal.SIGINT, ["checkpoint-4", "checkpoint-5"]],
    }, terminated + interrupted
    assert "checkpoint-4 is in" in terminated
    assert "Traceback" not in terminated + interrupted
    host, _ = run(folder, resume=True)
    expected, _ = run(tmp_path / "whole")
    assert_equal(trained(host), trained(expected))


# -- what stops a run -------------------------------------------------------------------------------------------------


def test_nan_stops_with_the_batch_saved_and_no_weight_changed(tmp_path: Path) -> None:
    class Poisoned(Rows):
        def __getitem__(self, number: int) -> dict[str, Any]:
            row = super().__getitem__(number)
            return {**row, "pixel_values": row["pixel_values"] * math.nan} if number == 3 else row

    given = recipe(save_steps=1)
    with pytest.raises(TrainingError, match=r"the loss is nan.*failed_batch_step\d_process0") as raised:
        run(tmp_path, given, Poisoned())
    folder = next(tmp_path.glob("failed_batch*"))
    record = json.loads((folder / "rows.json").read_text())
    assert "row3" in record["rows"]
    assert "row3" in str(raised.value)
    batch = load_file(folder / "batch.safetensors")
    assert bool(batch["pixel_values"][record["rows"].index("row3")].isnan().all())
    assert set(batch) == {"input_ids", "labels", "attention_mask", "pixel_values"}
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(checkpoint / "tuned.safetensors").values())


def test_tensors_that_get_no_gradient_are_named_in_the_first_step(tmp_path: Path) -> None:
    host = tiny_host()
    last = "model.vision_tower.encoder.layers.2.self_attn.q_proj.weight"  # the host reads layer -2
    dict(host.model.named_parameters())[last].requires_grad_(True)
    with pytest.raises(TrainingError, match=rf"Step 1: 1 of \d+ .* no gradient at all: {last}.*vision_feature_layer"):
        trainer_of(host, tmp_path).train()


def test_gradients_of_zero_are_named_in_the_first_step(tmp_path: Path) -> None:
    host = tiny_host()
    with torch.no_grad():
        host.model.model.multi_modal_projector.linear_2.weight.zero_()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    with pytest.raises(TrainingError, match=r"gradient of zero: .*multi_modal_projector\.linear_1.* more"):
        trainer_of(host, tmp_path).train()


def test_gradients_that_overflow_are_named_and_the_batch_saved(tmp_path: Path) -> None:
    host = tiny_host()
    weight = host.model.model.multi_modal_projector.linear_1.weight  # pyright: ignore[reportAttributeAccessIssue]
    weight.register_hook(lambda gradient: gradient * math.inf)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TrainingError, match=r"infinite in model\.multi_modal_projector\.linear_1\.weight\. Lower"):
        trainer_of(host, tmp_path).train()
    assert list(tmp_path.glob("failed_batch_step1_process0/rows.json"))


def test_overflows_of_scaled_gradients_are_passed_over_a_while() -> None:
    host = tiny_host()
    check = GradientCheck(host)
    for parameter in check.parameters.values():
        parameter.grad = torch.full_like(parameter, math.inf)
    for step in range(20):
        check(step, scaled=True)
    assert check.waiting
    with pytest.raises(TrainingError, match="infinite"):
        check(21, scaled=True)


def test_the_first_matrix_of_a_lora_is_checked_once_the_second_moved(tmp_path: Path) -> None:
    given = recipe(lora_llm=2, max_steps=4)
    host = tiny_host(given)
    trainer = trainer_of(host, tmp_path)
    seen: list[set[str]] = []
    for step in range(1, 5):
        trainer.add_callback(At(step, lambda: seen.append(set(trainer.check.waiting))))
    trainer.train()
    # The rate of the first step is 0 (warm-up), so the second matrices move in the second one.
    assert all("lora_A" in name for name in seen[0])
    assert len(seen[0]) == len(seen[1]) == 14
    assert seen[2:] == [set(), set()]


def trainer_of(host: Any, folder: Path) -> SFATrainer:
    arguments = training_arguments(host.recipe, folder, 4, host)
    return SFATrainer(host, args=arguments, train_dataset=Rows(), data_collator=collate)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    host = tiny_host()
    arguments = training_arguments(host.recipe, tmp_path, 4, host)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2
    with pytest.raises(TrainingError, match=r"2 GPUs are visible.*--nproc-per-node 2"):
        SFATrainer(host, args=arguments, train_dataset=Rows(), data_collator=collate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["labels"][1].fill_(-100), r"row 'row1' has no answer token"),
        (lambda b: b["labels"].copy_(b["input_ids"]), "labels on image tokens"),
        (lambda b: b["labels"][0].__setitem__(-1, 0), "labels on padding"),
        (lambda b: b["labels"][1].__setitem__(-1, 7), "not its own tokens"),
        (lambda b: b["labels"][1].__setitem__(17, int(b["input_ids"][1, 17])), "one piece at the end"),
        (lambda b: b["labels"][0].__setitem__(-2, -100), "one piece at the end"),
    ],
    ids=["no answer", "image", "padding", "others", "prompt", "no end"],
)
def test_labels_must_be_on_the_answer_alone(change: Any, message: str) -> None:
    batch = collate([Rows()[0], Rows()[1]])
    check_labels(batch, 60, batch["row_ids"])
    change(batch)
    with pytest.raises(TrainingError, match=message):
        check_labels(batch, 60, batch["row_ids"])


def test_a_prompt_that_is_not_masked_is_found_without_images() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(TrainingError, match="the prompt is not masked"):
        check_labels({"input_ids": ids, "labels": ids}, None)
    with pytest.raises(TrainingError, match="input_ids and labels"):
        check_labels({"input_ids": ids}, None)


def test_a_collator_that_forgets_the_mask_stops_the_first_step(tmp_path: Path) -> None:
    def forgetful(examples: list[Any]) -> dict[str, Any]:
        batch = collate(examples)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    host = tiny_host()
    trainer = trainer_of(host, tmp_path)
    trainer.data_collator = forgetful
    with pytest.raises(TrainingError, match="labels on image tokens"):
        trainer.train()


# -- settings ---------------------------------------------------------------------------------------------------------


def test_every_part_has_its_rate_and_only_matrices_decay() -> None:
    given = recipe(vision_lr=1e-4, projector_lr=2e-4, llm_lr=3e-4, sfa_lr=4e-2, lora_llm=2, weight_decay=0.1)
    host = tiny_host(given)
    groups = {group["name"]: group for group in parameter_groups(host)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "vision": (1e-4, 0.1),
        "vision (no decay)": (1e-4, 0.0),
        "projector": (2e-4, 0.1),
        "projector (no decay)": (2e-4, 0.0),
        "lora": (3e-4, 0.1),
        "sfa": (4e-2, 0.0),
    }
    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trained(host))
    assert all(p.ndim < 2 for name, group in groups.items() if "no decay" in name for p in group["params"])
    default = {group["name"]: group["lr"] for group in parameter_groups(tiny_host(recipe(lr=5e-4)))}
    assert default["vision"] == default["projector"] == 5e-4
    frozen = tiny_host(recipe(freeze_vision=True, freeze_projector=True, sfa=False))
    with pytest.raises(RecipeError, match="Nothing trains"):
        parameter_groups(frozen)


def test_a_batch_is_micro_batches_times_processes() -> None:
    given = recipe(batch_size=32, micro_batch=2)
    assert [accumulation(given, processes) for processes in (1, 2, 8)] == [16, 8, 2]
    with pytest.raises(RecipeError, match=r"batch_size=32 must be a multiple of micro_batch x processes = 2 x 3 = 6"):
        accumulation(given, 3)


def test_steps_are_whole_batches() -> None:
    published = recipe(batch_size=32, micro_batch=1, epochs=3.0)
    assert total_steps(published, 28_299) == 2_652
    assert total_steps(published.replace(max_steps=7), 28_299) == 7
    assert total_steps(published.replace(epochs=0.5), 320) == 5
    with pytest.raises(RecipeError, match="8 training rows are fewer than batch_size=32"):
        total_steps(published, 8)


def test_the_order_follows_from_seed_and_epoch() -> None:
    order = EpochOrder(range(10), 4, seed=3)
    first = list(order)
    assert len(order) == len(first) == len(set(first)) == 8
    order.set_epoch(1)
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first
    assert list(EpochOrder(range(10), 4, seed=4)) != first


def test_a_warm_up_longer_than_the_run_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="warmup_steps=2 of 1 steps"):
        run(tmp_path, recipe(max_steps=1))


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for log in ("tensorboard", "trackio", "wandb"):
        with pytest.raises(RecipeError, match=rf"log='{log}' cannot be used: .*{log}.* log=none keeps"):
            require_logger(recipe(log=log))
    require_logger(recipe())


@pytest.mark.parametrize("log", sorted(INTEGRATION_TO_CALLBACK))
def test_every_logger_of_transformers_gets_the_curves(
    log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, log, Recorder)
    arguments = training_arguments(recipe(log=log, max_steps=1), tmp_path, 1, tiny_host(recipe(log=log)))
    assert arguments.report_to == [log]
    if log == "wandb":
        run(tmp_path, recipe(log=log, max_steps=3))
        assert len(losses) == 3


def test_a_logger_that_transformers_does_not_know_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"log='wandbb' must be one of .*wandb.*none"):
        recipe(log="wandbb")


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard itself
        run(tmp_path, recipe(log="tensorboard", max_steps=3))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"output=.*file/run' cannot be written: Not a directory"):
        run(tmp_path / "file" / "run")


def test_curves_without_lines_are_no_picture(tmp_path: Path) -> None:
    assert plot_training([], tmp_path / "training.png") is None
    assert write_log([], tmp_path / "log.csv").read_text().splitlines() == ["step,epoch,loss,learning_rate,grad_norm"]


# -- precision --------------------------------------------------------------------------------------------------------


def test_small_steps_do_not_vanish_in_bfloat16(tmp_path: Path) -> None:
    """At 2e-5 a bfloat16 weight stays where it is; with float32 copies under autocast it moves."""
    given = recipe(dtype="bfloat16", lr=2e-5, max_steps=4, warmup_steps=1)
    start = trained(tiny_host(given))
    host, _ = run(tmp_path, given)
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    after = trained(host)
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert host.model.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue, reportCallIssue]
    assert (after[name] != start[name]).float().mean() > 0.99
    weight = torch.nn.Parameter(start[name].bfloat16())
    optimizer = torch.optim.AdamW([weight], lr=2e-5)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert (weight != start[name].bfloat16()).float().mean() < 0.3


def test_a_step_is_that_of_the_stock_trainer(tmp_path: Path) -> None:
    """The same four rows: as one batch of the stock Trainer, as two of ours."""
    given = recipe(sfa=False)
    arguments = training_arguments(given, tmp_path, 1, host := tiny_host(given, dropout=0.0))
    ours = SFATrainer(host, args=arguments, train_dataset=Rows(4), data_collator=collate)
    arguments = training_arguments(given.replace(micro_batch=4), tmp_path / "stock", 1, host := tiny_host(given, 0.0))
    stock = Trainer(
        model=host.model,
        args=arguments,
        train_dataset=Rows(4),
        data_collator=lambda rows: {k: v for k, v in collate(rows).items() if k not in ("row_ids", "skipped")},
    )
    ours.train()
    stock.train()
    for name in ("loss", "grad_norm"):
        first, second = (trainer.state.log_history[0][name] for trainer in (ours, stock))
        assert first == pytest.approx(second, rel=1e-5)
