"""`SFATrainer`: `transformers.Trainer` with checks of labels and gradients, and strict checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from sfa_adapters.data.datasets import Skipped
from sfa_adapters.errors import TrainingError
from sfa_adapters.hosts.load import Host
from sfa_adapters.moved import know_old_names
from sfa_adapters.scr import SCRConfig, SCRLoss, SCRTrainerMixin
from sfa_adapters.trainer import SFATrainerMixin
from sfa_adapters.training.callbacks import ignore_signals
from sfa_adapters.training.checks import GradientCheck, check_labels, save_batch
from sfa_adapters.training.optimizer import EpochOrder, build_optimizer
from sfa_adapters.training.saving import SavingMixin
from sfa_adapters.vlm.parts import still_image_id

__all__ = ["SFATrainer"]

know_old_names(__name__)
FOR_US = ("row_ids", "skipped")  # entries of a batch for the Trainer; the model never gets them


class SFATrainer(SavingMixin, SCRTrainerMixin, SFATrainerMixin, Trainer):
    """`transformers.Trainer` for a prepared host.

    What differs: logits of answer tokens only, unless the recipe turns it off; learning rates by part, and a check of
    how large the structural scalars become; whole batches in an order that depends on seed and epoch; checks of labels
    and gradients; NaN stops the run; checkpoints hold what trains, are written whole or not at all, and load strictly.

    Args:
        host: The host.
        kwargs: As for `Trainer`, without `model`.

    Raises:
        TrainingError: The Trainer would split batches over GPUs inside one process (`torch.nn.DataParallel`).
    """

    def __init__(self, host: Host, **kwargs: Any) -> None:
        self.host, recipe = host, host.recipe
        self.check = GradientCheck(host)
        self.skipped: dict[str, str] = {}
        self._steps_checked = 0
        self._partial: Path | None = None
        self._scr_random: Tensor | None = None
        scr = SCRConfig(
            entropy=recipe.scr_entropy,
            grounding=recipe.scr_grounding,
            stability=recipe.scr_stability,
            warmup_steps=recipe.warmup_steps,
            seed=recipe.seed,
            **_statistics(host),
        )
        with _trainable_although_quantized(host.model):
            super().__init__(
                model=host.model, scr_config=scr, sfa_lr=recipe.sfa_lr, answer_logits=recipe.answer_logits, **kwargs
            )
        if self.args.n_gpu > 1:
            raise TrainingError(
                f"{self.args.n_gpu} GPUs are visible to one process: Trainer would split each batch over them "
                "(torch.nn.DataParallel), which breaks vision-language models. Start one process per GPU (torchrun "
                f"--nproc-per-node {self.args.n_gpu}), take plan=split, or show one GPU (CUDA_VISIBLE_DEVICES=0)."
            )

    # -- data ---------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if rows is None or not hasattr(rows, "__len__"):
            return None
        return EpochOrder(rows, self.host.recipe.batch_size, self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As `Trainer.get_train_dataloader`; worker processes ignore signals that stop the run."""
        loader = super().get_train_dataloader()
        seed = loader.worker_init_fn
        loader.worker_init_fn = _Both(seed, ignore_signals)
        return loader

    # -- a step -------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for each part of the host."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.host)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As `Trainer.training_step`, with the checks.

        Raises:
            TrainingError: Labels are not on the answers alone, the loss is NaN, or a tensor that should train does not.
        """
        ours = {name: inputs[name] for name in FOR_US if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in FOR_US}
        ids: Sequence[str] = ours.get("row_ids", ())
        self.skipped |= {skipped.id: skipped.reason for skipped in ours.get("skipped", ())}
        if not self._steps_checked:
            self._check_labels(inputs, ids)
        self._batch, self._ids = inputs, ids
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            try:
                self.check(self.state.global_step + 1, scaled=self.accelerator.scaler is not None)
            except TrainingError as error:
                raise self._with_batch(error) from None
            self._steps_checked += 1
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `Trainer.compute_loss` with the terms of SCR; stops before the backward pass where the loss is NaN."""
        if model.training and self.scr_config.active and self._scr is None and self._scr_random is not None:
            self._scr = SCRLoss(model, self.scr_config)
            self._scr.generator.set_state(self._scr_random)
        computed: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = computed[0] if return_outputs else computed
        if model.training:
            wrong = not bool(loss.detach().isfinite())
            if self.largest(int(wrong)):
                where = f"the loss is {loss.item()}" if wrong else "the loss of another process is NaN or infinite"
                error = TrainingError(
                    f"Step {self.state.global_step + 1}: {where}. No weight was changed by this batch. Lower the "
                    "learning rate, or look at the rows."
                )
                raise self._with_batch(error) if wrong else error
        return computed

    def _check_labels(self, inputs: dict[str, Any], ids: Sequence[str]) -> None:
        problem: TrainingError | None = None
        try:
            check_labels(inputs, still_image_id(self.host.model.config), ids)
        except TrainingError as error:
            problem = error
        if self.largest(int(problem is not None)):
            raise problem or TrainingError("Another process found labels that are not on the answers alone.")

    def _with_batch(self, error: TrainingError) -> TrainingError:
        """Saves the batch that caused an error, and adds its folder to the error."""
        name = f"failed_batch_step{self.state.global_step + 1}_process{self.args.process_index}"
        details = {"step": self.state.global_step + 1, "error": str(error)}
        folder = save_batch(self.folder / name, self._batch, self._ids, **details)
        rows = f" ({', '.join(map(str, self._ids[:4]))})" if self._ids else ""
        return TrainingError(f"{error} The batch{rows} is in {folder}.")

    def largest(self, number: int) -> int:
        """The largest of a number over all processes."""
        if self.args.world_size <= 1:
            return number
        number_here = torch.tensor(number, device=self.args.device)
        torch.distributed.all_reduce(number_here, torch.distributed.ReduceOp.MAX)
        return int(number_here)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; adds the learning rates of all parts."""
        if "loss" in logs and self.optimizer is not None:
            groups = [group for group in self.optimizer.param_groups if "(" not in group["name"]]
            first = self.optimizer.param_groups[0]
            share = logs["learning_rate"] / first["initial_lr"]
            logs |= {f"lr/{group['name']}": share * group["initial_lr"] for group in groups or [first]}
        super().log(logs, *args, **kwargs)

    def all_skipped(self) -> list[Skipped]:
        """The rows that were skipped so far, in all processes."""
        reasons: list[tuple[str, str]] = sorted(self.skipped.items())
        if self.args.world_size > 1:
            reasons = sorted(dict(gather_object(reasons)).items())
        return list(itertools.starmap(Skipped, reasons))


class _Both:
    """Two functions for a new worker process, as one that can be pickled."""

    def __init__(self, first: Callable[[int], None] | None, second: Callable[[int], None]) -> None:
        self.first, self.second = first, second

    def __call__(self, worker: int) -> None:
        if self.first is not None:
            self.first(worker)
        self.second(worker)


@contextmanager
def _trainable_although_quantized(model: Any) -> Iterator[None]:
    """Lets Trainer accept a 4-bit model without adapters of PEFT, as what trains here is not in 4-bit."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = model.__dict__.get("_hf_peft_config_loaded")
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if before is None:
            del model._hf_peft_config_loaded
        else:
            model._hf_peft_config_loaded = before


def _statistics(host: Host) -> dict[str, Any]:
    images = getattr(host.processor, "image_processor", None)
    statistics = {name: getattr(images, name, None) for name in ("image_mean", "image_std")}
    return statistics if all(isinstance(value, list | tuple) for value in statistics.values()) else {}
