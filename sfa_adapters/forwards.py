"""`ForwardLog`: which forward of a tower a hidden state belongs to, also when checkpointing recomputes it in backward.

While a tower runs, its layers use the forward under way. By the time of the backward pass other images may have passed
the tower, so the forward is found from the recomputed hidden states themselves. Two traces survive every kind of
checkpointing: a recomputation starts from a tensor that shares its storage with what the checkpoint saved, and where
autograd is not reentrant it also keeps the node that made it. Both are recorded in the forward pass
(`ForwardLog.note`), and looked up along the autograd graph in the backward pass (`ForwardLog.trace`).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sfa_adapters.arrangement import TokenArrangement
from sfa_adapters.packing import Packing

__all__ = ["NOT_IN_BACKWARD", "Arrangement", "ForwardLog", "TowerForward", "backward_task", "begin_gradient"]

# How the tokens of a forward lie: as a feature packed them, or as the tower was given them.
Arrangement = Packing | TokenArrangement
METADATA_KEY = "sfa_adapters.forwards"
NOT_IN_BACKWARD = -1
# Forwards without a call of the tower that may still reach its layers.
WAITING_KEPT = 8


def backward_task() -> int:
    """The id of the backward pass that runs in this thread; `NOT_IN_BACKWARD` outside of one."""
    return torch._C._current_graph_task_id()


@dataclass(eq=False)
class TowerForward:
    """One forward of a tower, alive as long as its autograd graph.

    Attributes:
        inputs: How the tokens lie that the tower was given, by their number.
        packing: How images of different token counts are packed into one sequence, set by the feature that packs them;
            it takes precedence.
        with_grad: Whether gradients were on when the forward began.
        requires_grad: Whether a hidden state that required gradients was seen.
    """

    inputs: dict[int, TokenArrangement] = field(default_factory=dict)
    packing: Packing | None = None
    with_grad: bool = True
    requires_grad: bool = False
    storages: set[StorageWeakRef] = field(default_factory=set, repr=False)
    last_layer: int = -1
    task: int = NOT_IN_BACKWARD

    def arrangement(self, num_tokens: int) -> Arrangement | None:
        """How a sequence of `num_tokens` tokens lies in this forward; None where it has no such sequence."""
        if self.packing is not None and self.packing.total == num_tokens:
            return self.packing
        return self.inputs.get(num_tokens)


@dataclass(eq=False)
class _Call:
    """A call of the tower itself that is under way; its forward is known once the image module ran."""

    tower: nn.Module
    task: int
    forward: TowerForward | None = None


class _Thread(threading.local):
    """Calls of the tower under way in this thread, and forwards that began without one."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.waiting: list[TowerForward] = []  # the newest of them
        self.running: TowerForward | None = None
        # Of the latest recomputed input of an encoder or layer: the backward pass, that module, and its forward.
        self.traced: tuple[int, nn.Module, TowerForward | None] | None = None


class ForwardLog:
    """The forwards of one tower.

    Attributes:
        compiled: The forward that compiled code sees; inside a graph there are no threads and no recomputation.
    """

    def __init__(self) -> None:
        self._thread = _Thread()
        self._alive: weakref.WeakSet[TowerForward] = weakref.WeakSet()
        self.compiled: TowerForward | None = None

    def __reduce__(self) -> tuple[type[ForwardLog], tuple[()]]:
        return ForwardLog, ()  # copies and pickles of a model have no forward under way

    # -- recording --------------------------------------------------------------------------------------------------

    def enter(self, tower: nn.Module) -> None:
        """Records that a call of the tower begins."""
        self._thread.calls.append(_Call(tower, backward_task()))
        self._thread.waiting, self._thread.running = [], None

    def leave(self) -> None:
        """Records that a call of the tower ended or failed."""
        if self._thread.calls:
            self._thread.calls.pop()
        self._thread.waiting, self._thread.running = [], None

    def begin(self, forward: TowerForward) -> None:
        """Records a new forward, when the image module of the tower gets its images."""
        forward.with_grad, forward.task = torch.is_grad_enabled(), backward_task()
        self._alive.add(forward)
        call = self._call()
        if call is not None:
            call.forward = self.compiled = forward
        else:  # the embedding was called by hand, or the tower's forward without its hooks
            self._thread.waiting = [*self._thread.waiting[1 - WAITING_KEPT :], forward]

    def _call(self) -> _Call | None:
        calls = self._thread.calls
        return calls[-1] if calls and calls[-1].task == backward_task() else None

    def current(self) -> TowerForward | None:
        """The forward under way in this thread; None in a recomputation that does not run the tower itself."""
        call = self._call()
        if call is not None and call.forward is not None:
            return call.forward
        task, waiting = backward_task(), self._thread.waiting
        latest = waiting[-1] if waiting else self._thread.running
        return latest if latest is not None and latest.task == task else None

    def tower(self) -> nn.Module | None:
        """The tower, while a call of it is under way."""
        call = self._call()
        return None if call is None else call.tower

    def of_call(self) -> TowerForward | None:
        """The forward of the tower's call that is under way; None outside of one."""
        call = self._call()
        return None if call is None else call.forward

    def without_call(self, num_tokens: int, layer: int) -> list[TowerForward]:
        """Forwards without a call of the tower to which layer `layer` on `num_tokens` tokens may belong.

        Layers run once and in order, so a layer that ran already belongs to another forward.
        """
        thread = self._thread
        running = [] if thread.running is None or thread.running.last_layer >= layer else [thread.running]
        possible = [forward for forward in running + thread.waiting if forward.task == backward_task()]
        return [forward for forward in possible if forward.arrangement(num_tokens) is not None]

    def run_layer(self, forwards: Sequence[TowerForward], layer: int) -> None:
        """Records that a layer runs in the first of the possible forwards without a call of the tower."""
        thread = self._thread
        if forwards[0] is not thread.running:
            thread.waiting = [forward for forward in thread.waiting if forward is not forwards[0]]
            thread.running = forwards[0]
        forwards[0].last_layer = layer

    def note(self, states: Tensor, holder: nn.Module | None = None) -> None:
        """Records that a tensor belongs to the forward under way, or to the one being recomputed.

        Args:
            states: The tensor.
            holder: The encoder or layer whose input it is.
        """
        forward = self.current()
        if forward is None and backward_task() != NOT_IN_BACKWARD:  # there may be a checkpoint inside the checkpoint
            traced = self.trace(states, holder)
            forward = traced[0] if len(traced) == 1 else None
            if holder is not None:
                self._thread.traced = (backward_task(), holder, forward)
        if forward is None or not forward.with_grad:
            return
        forward.requires_grad |= states.requires_grad
        storage = _storage(states)
        if storage is not None:
            forward.storages.add(storage)
        if states.grad_fn is not None:
            noted: list[Any] = states.grad_fn.metadata.setdefault(METADATA_KEY, [])  # pyright: ignore[reportAttributeAccessIssue]
            if not any(entry is forward for entry in noted):
                noted.append(forward)

    # -- looking up -------------------------------------------------------------------------------------------------

    def trace(self, states: Tensor, module: nn.Module | None = None) -> list[TowerForward]:
        """The forwards from which a recomputed hidden state may come: one, unless forwards share tensors.

        Args:
            states: The hidden state, in a backward pass.
            module: The module whose input it is.
        """
        if not torch.is_grad_enabled():
            # A reentrant checkpoint inside what is being recomputed: no graph, but the layer's input had one.
            task, holder, forward = self._thread.traced or (NOT_IN_BACKWARD, None, None)
            inside = holder is not None and any(inner is module for inner in holder.modules())
            if task == backward_task() and inside and forward is not None:
                return [forward]
        matches = self._of_storage(states)
        queue = deque([states.grad_fn] if states.grad_fn is not None else [])
        visited = set(queue)
        while queue and not matches:
            node: Any = queue.popleft()
            matches = [forward for forward in node.metadata.get(METADATA_KEY, ()) if forward in self._alive]
            if not matches and isinstance(variable := getattr(node, "variable", None), Tensor):  # a leaf
                matches = self._of_storage(variable)
            for upper, _ in node.next_functions:
                if upper is not None and upper not in visited:
                    visited.add(upper)
                    queue.append(upper)
        return matches

    def _of_storage(self, states: Tensor) -> list[TowerForward]:
        storage = _storage(states)
        return [forward for forward in self._alive if storage in forward.storages]


def _storage(states: Tensor) -> StorageWeakRef | None:
    """A weak reference to the storage of a tensor, which its detached copies share.

    While it lives, the address of the storage is not reused. None for fake and distributed tensors.
    """
    return StorageWeakRef(states.untyped_storage()) if type(states) is Tensor else None


class _BeginGradient(torch.autograd.Function):
    """Identity whose output requires gradients, and whose input gets none."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, anchor: Tensor) -> Tensor:
        return states.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        return None, None


def begin_gradient(states: Tensor) -> Tensor:
    """Returns the same values in the same memory, with an autograd graph that begins here.

    Reentrant checkpointing records no graph where none of its inputs requires gradients, so that trainable scalars
    inside would get none. Unlike with `requires_grad_`, no gradient is stored on the tensor, and operations in place
    stay allowed.
    """
    anchor = torch.empty(0, device=states.device, requires_grad=True)
    return _BeginGradient.apply(states, anchor)  # pyright: ignore[reportReturnType]
