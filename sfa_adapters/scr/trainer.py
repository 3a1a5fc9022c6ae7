"""`SCRTrainerMixin`: adds the loss terms of SCR to a `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfa_adapters.compat import loss_is_scaled
from sfa_adapters.errors import InjectionError
from sfa_adapters.scr.config import SCRConfig
from sfa_adapters.scr.loss import SCRLoss

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["COLUMNS", "SCRTrainerMixin"]

# Columns of a batch for the loss terms; the model never gets them.
COLUMNS = ("evidence_boxes", "evidence_mask", "page_sizes")


class SCRTrainerMixin(_Trainer):
    """Adds the three terms of SCR to the training loss.

        class MyTrainer(SCRTrainerMixin, Trainer): ...
        MyTrainer(model=model, scr_config=SCRConfig(entropy=0.02), args=..., train_dataset=...).train()

    A batch may have the columns `evidence_boxes`, `evidence_mask` and `page_sizes`, see `SCRLoss`; a collator must make
    them. Terms are logged beside the loss as `scr/entropy`, `scr/grounding`, `scr/stability`, without their weights,
    with the counts and levels that `SCRLoss` returns. The loss of an evaluation has no such terms.

    Args:
        args: As for `Trainer`.
        scr_config: Settings.
        kwargs: As for `Trainer`.
    """

    def __init__(self, *args: Any, scr_config: SCRConfig | None = None, **kwargs: Any) -> None:
        self.scr_config = SCRConfig() if scr_config is None else scr_config
        self._scr: SCRLoss | None = None
        self._scr_sums: dict[str, tuple[float, int]] = {}
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As `Trainer.compute_loss`; in training, the weighted terms are added.

        Raises:
            InjectionError: The Trainer splits batches over GPUs inside one process (`torch.nn.DataParallel`).
        """
        evidence, inputs = _split(inputs)
        if not model.training or not self.scr_config.active:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.n_gpu > 1:
            raise InjectionError("SCR cannot watch torch.nn.DataParallel: start one process per GPU (torchrun).")
        if self._scr is None or self._scr.model is not model:
            self._scr = SCRLoss(model, self.scr_config)
        with self._scr.watch():
            # A copy: label smoothing takes the labels out of it.
            computed = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        loss, outputs = computed
        penalty, terms = self._scr(outputs, inputs, step=self.state.global_step, **evidence)
        self._remember(terms)
        loss = loss + penalty.to(loss.device) / self._accumulated(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _accumulated(self, num_items_in_batch: Tensor | int | None) -> int:
        """The divisor of the terms, which are means over a batch, where `Trainer` does not divide them."""
        batches = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return batches if loss_is_scaled(self, num_items_in_batch) else 1

    def _remember(self, terms: Mapping[str, float]) -> None:
        for name, value in terms.items():
            term = name.partition("_")[0]
            # A term without samples is not a measurement of 0; its counts are still logged.
            if terms[f"{term}_used"] or name.endswith(("_used", "_skipped", "_rows")):
                total, times = self._scr_sums.get(name, (0.0, 0))
                self._scr_sums[name] = (total + value, times + 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; the training log gets the means of the terms since the last one, over all processes."""
        if "loss" in logs and self._scr is not None:
            names = [f"{term}{end}" for term in self.scr_config.active for end in ("", "_used", "_skipped", "_rows")]
            names += [n for n, term in (("entropy_level", "entropy"), ("grounding_mass", "grounding")) if term in names]
            pairs = [self._scr_sums.get(name, (0.0, 0)) for name in names]
            sums = self.accelerator.reduce(torch.tensor(pairs, device=self.args.device), reduction="sum")
            assert isinstance(sums, Tensor)
            known = zip(names, sums.tolist(), strict=True)
            logs |= {f"scr/{name}": total / times for name, (total, times) in known if times}
            self._scr_sums.clear()
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Tensor | Any], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.prediction_step`, without the columns of the loss."""
        return super().prediction_step(model, _split(inputs)[1], *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns of the loss, which `Trainer` would drop as unknown to the model."""
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]


def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of the loss, and the others."""
    ours = {name: inputs[name] for name in COLUMNS if name in inputs}
    return ours, {name: value for name, value in inputs.items() if name not in COLUMNS}
