"""`SFATrainerMixin`: what SFA adds to a `transformers.Trainer`.

The structural scalars get their own learning rate, and the logits of answer tokens alone may be computed.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback

from sfa_adapters.answer_logits import logits_at_answers, why_all_logits
from sfa_adapters.axial_ramp import AxialRamp
from sfa_adapters.errors import InjectionError, SFAWarning
from sfa_adapters.rate_check import bounded, check_learned, check_rates
from sfa_adapters.rates import DEFAULT_SFA_LR, SFA_GROUP, has_active_sfa, largest_scalars, sfa_parameter_groups

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["SFATrainerMixin"]

logger = logging.getLogger(__name__)


class ScalarCallback(TrainerCallback):
    """Steps the `AxialRamp` after each optimizer step, and checks the size of the scalars at the end of a run."""

    ramp: AxialRamp | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the ramp at the step of the resumed run or of the loaded adapter, whichever is later."""
        model: nn.Module = kwargs["model"]
        self.ramp = AxialRamp(model) if has_active_sfa(model) else None
        if self.ramp is not None and state.global_step > self.ramp.done:
            self.ramp = AxialRamp(model, done=state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps the ramp."""
        if self.ramp is not None:
            self.ramp.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warns if the bias has hardly any effect."""
        model: nn.Module = kwargs["model"]
        if has_active_sfa(model):
            check_learned(largest_scalars(model))


class SFATrainerMixin(_Trainer):
    """Trainer mixin: own learning rate for the structural scalars, axial warm-up, and their size in the log.

        class MyTrainer(SFATrainerMixin, Trainer): ...
        MyTrainer(model=inject_sfa(model), args=..., train_dataset=...).train()

    Also for `trl.SFTTrainer`, and together with `SCRTrainerMixin` in any order. The optimizer is the one that
    `args.optim` names, over `sfa_parameter_groups` with `args.learning_rate` and `args.weight_decay`; an optimizer that
    is passed in is not changed. The largest scalar of each term is logged beside the loss (`sfa/row`, ...).

    Args:
        args: As for the Trainer.
        sfa_lr: Learning rate of the structural scalars, in logits per step under Adam.
        answer_logits: In training, compute the logits in front of labels and no others (`logits_at_answers`): the same
            loss and gradients in less memory, and `outputs.logits` is `[1, N, V]`, which only code of yours that reads
            it in training can notice. Where it cannot be, one line in the log says why. Evaluations get all logits.
        kwargs: As for the Trainer.

    Raises:
        InjectionError: The model has no SFA, `sfa_lr` is not above 0, or `args.optim` makes its own parameter groups
            (GaLore, LOMO, Muon, ...).
        TrainingError: All scalars are frozen.

    Warns:
        SFAWarning: The rates of the run add up to less than 3 logits; no scalar has reached 1 logit at its end; or an
            optimizer that was passed in holds no scalars.
    """

    def __init__(self, *args: Any, sfa_lr: float = DEFAULT_SFA_LR, answer_logits: bool = False, **kwargs: Any) -> None:
        self.sfa_lr, self.answer_logits = sfa_lr, answer_logits
        self._answers_checked = False
        super().__init__(*args, **kwargs)
        self.add_callback(ScalarCallback())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `Trainer.compute_loss`; in training with `answer_logits`, from the logits in front of labels."""
        with logits_at_answers(model) if model.training and self._answers_suffice(model) else nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _answers_suffice(self, model: nn.Module) -> bool:
        """Whether to compute the logits of answers alone; once, says in the log why not."""
        if self.answer_logits and not self._answers_checked:
            self._answers_checked = True
            reason = self._why_all_logits() or why_all_logits(model)
            if reason is not None:
                self.answer_logits = False
                logger.warning("The logits of all tokens are computed, which takes more memory: %s.", reason)
        return self.answer_logits

    def _why_all_logits(self) -> str | None:
        """What in this Trainer reads the logits of all tokens, or hands them out; None where nothing does."""
        if self.compute_loss_func is not None:
            return "compute_loss_func reads them"
        if self.label_smoother is not None:
            return f"label_smoothing_factor={self.args.label_smoothing_factor:g} smooths them outside the model"
        if getattr(self.args, "use_liger_kernel", False):
            return "use_liger_kernel fuses head and loss already"
        if self.args.n_gpu > 1:
            return "torch.nn.DataParallel splits a batch over GPUs by its rows"
        trl = next((kind for kind in type(self).__mro__ if kind.__module__.partition(".")[0] == "trl"), None)
        return None if trl is None else f"{trl.__name__} measures them"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.create_optimizer`, with a parameter group for the structural scalars."""
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        model: Any = args[0] if args else kwargs.get("model")
        model = self.model if model is None else model
        groups = sfa_parameter_groups(model, self.args.learning_rate, self.sfa_lr, self.args.weight_decay)
        given = self.optimizer_cls_and_kwargs
        kind, options = given or self.get_optimizer_cls_and_kwargs(self.args, model)
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & options.keys() or _makes(kind):
            raise InjectionError(
                f"args.optim={self.args.optim!r} makes its own parameter groups, so the structural scalars cannot get "
                "their own rate. Use e.g. optim='adamw_torch', or pass optimizers=(optimizer, scheduler)."
            )
        try:
            # Trainer passes these options to the optimizer, its own groups among them.
            self.optimizer_cls_and_kwargs = (kind, {**options, "params": groups})
            return super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = given

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.create_scheduler`; then the rates of the whole run are checked."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        self._check_rates(scheduler, num_training_steps)
        return scheduler

    def _check_rates(self, scheduler: Any, steps: int) -> None:
        model: Any = self.model
        if not has_active_sfa(model) or not bounded(self.optimizer):
            return
        groups = scheduler.optimizer.param_groups
        if any(group.get("name") == SFA_GROUP for group in groups):
            check_rates(scheduler, steps, start=model)
            return
        scalars = {id(p) for name, p in model.named_parameters() if ".sfa.sfa_" in f".{name}"}
        rates = {group.get("initial_lr", group["lr"]) for group in groups for p in group["params"] if id(p) in scalars}
        if rates:
            check_rates(max(rates), steps, start=model)
        else:
            warnings.warn(
                "The optimizer that was passed in holds none of the structural scalars, so the bias does not train. "
                "Make its groups with sfa_parameter_groups(model, lr).",
                SFAWarning,
                stacklevel=3,
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; training logs get the largest scalar of each term, in logits."""
        model: Any = self.model
        if ("loss" in logs or "train_runtime" in logs) and has_active_sfa(model):
            logs |= {f"sfa/{term}": size for term, size in largest_scalars(model).items()}
        super().log(logs, *args, **kwargs)


def _makes(kind: type) -> bool:
    """Whether an "optimizer class" of transformers is a factory that takes the model."""
    return not hasattr(kind, "step")
