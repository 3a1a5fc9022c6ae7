"""Callbacks of a run: the progress bar, and signals that stop it after a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Interrupted", "ProgressBar", "StopOnSignal", "ignore_signals"]


class Interrupted(SystemExit):
    """A signal stopped the run after it had saved a checkpoint; the exit code is 128 and its number.

    Attributes:
        number: The signal: 2 for Ctrl-C, 15 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, lets the step end, saves a checkpoint and stops; a second Ctrl-C stops at once.

    A context manager: outside of it, signals have their former handlers. It acts only in the main thread.

    Args:
        agree: Gives the largest of a number over all processes, so that all stop at the same step.
        report: Gets a line of text when a signal arrives.
    """

    def __init__(self, agree: Callable[[int], int], report: Callable[[str], None]) -> None:
        self.agree, self.report = agree, report
        self.received = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that was forked from this one
            return
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.report(f"{name}: this step is finished and a checkpoint saved. Ctrl-C again stops without one.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agrees with all processes, and lets the Trainer save and stop."""
        self.received = self.agree(self.received)
        if self.received:
            control.should_save = control.should_training_stop = True


def ignore_signals(worker: int) -> None:
    """Makes a process that loads data ignore SIGINT and SIGTERM, because it must outlive the last step.

    Args:
        worker: Number of the process, unused.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class ProgressBar(TrainerCallback):
    """A progress bar with loss, learning rate and gradient norm; a line per log where there is no terminal.

    Args:
        console: Where it is shown.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task: Any = None
        self.began, self.first = time.perf_counter(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the bar."""
        if not state.is_world_process_zero:
            return
        self.began, self.first = time.perf_counter(), state.global_step
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        shown = TextColumn("{task.fields[shown]}")
        self.bar = Progress(TextColumn("training"), *columns, shown, console=self.console)
        self.bar.disable = not self.console.is_terminal
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, shown="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the latest numbers."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        shown = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  grad norm {logs.get('grad_norm', 0.0):.3g}"
        self.bar.update(self.task, shown=shown)
        if self.bar.disable:
            rate = (time.perf_counter() - self.began) / max(state.global_step - self.first, 1)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {shown}  {rate:.2f} s/step", highlight=False
            )

    def stop(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
