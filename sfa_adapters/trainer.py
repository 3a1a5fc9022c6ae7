"""`SFATrainerMixin`: gives the structural scalars their own learning rate in a `transformers.Trainer`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from sfa_adapters.axial_ramp import AxialRamp
from sfa_adapters.errors import InjectionError, SFAWarning
from sfa_adapters.rate_check import bounded, check_learned, check_rates
from sfa_adapters.rates import DEFAULT_SFA_LR, SFA_GROUP, has_active_sfa, largest_scalars, sfa_parameter_groups

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

__all__ = ["SFATrainerMixin"]


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
        kwargs: As for the Trainer.

    Raises:
        InjectionError: The model has no SFA, `sfa_lr` is not above 0, or `args.optim` makes its own parameter groups
            (GaLore, LOMO, Muon, ...).
        TrainingError: All scalars are frozen.

    Warns:
        SFAWarning: The rates of the run add up to less than 3 logits; no scalar has reached 1 logit at its end; or an
            optimizer that was passed in holds no scalars.
    """

    def __init__(self, *args: Any, sfa_lr: float = DEFAULT_SFA_LR, **kwargs: Any) -> None:
        self.sfa_lr = sfa_lr
        super().__init__(*args, **kwargs)
        self.add_callback(ScalarCallback())

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
