"""Logits of answer tokens only: in training the head gets the states that predict a label, and no others.

A question about a page has thousands of image tokens and a few tokens of an answer, and only the latter have a label.
Logits of all positions are the largest tensors of a step (`[B, L, V]`, several times in float32), and the loss leaves
nearly all of them out. Here the model runs as always, and a hook of its head lets through the states in front of a
label. The labels of these go to the host's own loss as `shift_labels`, an argument of the loss of transformers, so
sums, means over accumulated batches and auxiliary losses stay what they are: the same terms, in the same order.

`logits_to_keep` would take the same positions in every sample of a batch, means something else in each release, and
says nothing about the sequence that arrives at the head. The hook sees it, and refuses one of another length.

Shape letters: B samples, L tokens of a sequence, N positions before a label in the whole batch, V words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.errors import TrainingError
from sfa_adapters.hooks import attached_while

__all__ = ["answer_rows", "logits_at_answers", "why_all_logits"]

FEATURE = "answer_logits"  # for `sfa_adapters.hooks`
IGNORE = -100  # the label that transformers leaves out of the loss
OFF = "Train with answer_logits=False."


def answer_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions whose logits the loss needs: those in front of a token with a label.

    Args:
        labels: int64 `[B, L]`, -100 where there is none.

    Returns:
        Positions in the flattened batch, int64 `[N]`, ascending; and what they should predict, int64 `[N]`. Without any
        label it is the first position with -100, because kernels and gradients of nothing at all are a risk.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten()
    rows = (targets != IGNORE).nonzero().flatten()
    rows = rows if len(rows) else rows.new_zeros(1)
    return rows, targets[rows]


def why_all_logits(model: nn.Module) -> str | None:
    """Why the loss of a model needs the logits of all positions; None where those of answers are enough.

    Args:
        model: A vision-language model of transformers, also inside PEFT, `DistributedDataParallel` and the like.
    """
    modules = list(model.modules())
    host = _host(model)
    if host is None:
        return f"{type(model).__name__} has no model of transformers in it"
    name = type(host).__name__
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules):
        return f"{name} is compiled"
    configs = [config for module in modules for config in (getattr(module, "peft_config", None) or {}).values()]
    if any(config.is_prompt_learning for config in configs):
        return f"{name} gets virtual tokens of PEFT, which have no label"
    if not isinstance(host.get_output_embeddings(), nn.Module):
        return f"{name} has no head in get_output_embeddings()"
    forward = inspect.unwrap(type(host).forward)
    takes = {parameter.kind for parameter in inspect.signature(forward).parameters.values()}
    if "loss_function" not in forward.__code__.co_names or inspect.Parameter.VAR_KEYWORD not in takes:
        return f"{name} computes its loss by itself, not by its loss_function"
    if not _is_causal_loss(host.loss_function):
        return f"the loss_function of {name} is not that of causal language models"
    return None


@contextmanager
def logits_at_answers(model: nn.Module) -> Iterator[None]:
    """Context in which forwards with `labels` compute the logits that their loss needs, and no others.

        with logits_at_answers(model):
            outputs = model(**inputs)       # loss as before; logits [1, N, V] at `answer_rows(labels)`
        outputs.loss.backward()

    Forwards without `labels` run as always. So do those with `shift_labels` or `logits_to_keep`.

    Args:
        model: As it is called: with all wrappers. `why_all_logits` must have nothing against it.

    Raises:
        TrainingError: `why_all_logits` says why it cannot be; or in a forward, the head did not get the states of all
            tokens, once, or its logits are not those that it was to compute.
    """
    reason = why_all_logits(model)
    host = _host(model)
    if reason is not None or host is None:
        raise TrainingError(f"Logits of answer tokens alone cannot be computed: {reason}. {OFF}")
    state = _State()
    with attached_while(FEATURE) as attach:
        # The outermost module, because PEFT before 0.21 calls the forward of the host without its hooks.
        attach(model, state, pre=state.begin, post=state.end)
        attach(host.get_output_embeddings(), state, pre=state.select)
        try:
            yield
        except ValueError as error:  # the loss got all logits, and labels for some
            if state.pending is not None and not state.pending.calls:
                raise TrainingError(
                    f"The loss of {type(host).__name__} failed ({error}), and the head that get_output_embeddings() "
                    f"gives did not run before it. {OFF}"
                ) from error
            raise


@dataclass(eq=False)
class _Forward:
    """One forward: the shape of its labels, the positions that the head gets, and how often the head ran."""

    shape: tuple[int, int]
    rows: Tensor
    calls: int = 0


class _State:
    """The forward under way, and the hooks."""

    def __init__(self) -> None:
        self.pending: _Forward | None = None

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the model: chooses positions, and adds what they should predict."""
        labels = kwargs.get("labels")
        self.pending = None
        if not isinstance(labels, Tensor) or labels.ndim != 2 or "shift_labels" in kwargs:
            return None
        if isinstance(kwargs.get("logits_to_keep"), Tensor) or kwargs.get("logits_to_keep"):
            return None
        rows, targets = answer_rows(labels)
        self.pending = _Forward((labels.shape[0], labels.shape[1]), rows)
        return args, {**kwargs, "shift_labels": targets[None]}

    def select(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the head: `[B, L, D]` becomes `[1, N, D]`."""
        if self.pending is None:
            return None
        states, shape = args[0] if args else None, self.pending.shape
        self.pending.calls += 1
        if not isinstance(states, Tensor) or states.shape[:2] != shape or states.ndim != 3 or self.pending.calls > 1:
            raise TrainingError(
                f"Call {self.pending.calls} of the head got {tuple(getattr(states, 'shape', ()))}, and labels are "
                f"{shape}: their places in the sequence are not known. {OFF}"
            )
        rows = self.pending.rows.to(states.device)
        return (states.flatten(0, 1).index_select(0, rows)[None], *args[1:]), kwargs

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the model: the logits must be those of the positions."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        logits = output.get("logits") if isinstance(output, dict) else None
        wanted = (1, len(pending.rows))
        if pending.calls != 1 or (isinstance(logits, Tensor) and logits.shape[:2] != wanted):
            raise TrainingError(
                f"The head ran {pending.calls} times and gave logits {tuple(getattr(logits, 'shape', ()))}, expected "
                f"once and {wanted}: the loss is not that of the answers. {OFF}"
            )


def _host(model: nn.Module) -> Any:
    """The model of transformers inside all wrappers, None where there is none."""
    # Here, because a core module must not wait for transformers.
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _is_causal_loss(function: Callable[..., Any]) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return function is ForCausalLMLoss
