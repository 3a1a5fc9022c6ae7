"""`SavingMixin`: checkpoints of a Trainer that hold what trains, are written whole or not at all, and load strictly."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from sfa_adapters.errors import RecipeError, SFAWarning, TrainingError
from sfa_adapters.files import seal, writing
from sfa_adapters.training.checkpoints import load_trained, save_trained, write_trained
from sfa_adapters.training.runs import checkpoints_of, keep_newest
from sfa_adapters.training.sharded import load_optimizer, optimizer_state

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer

    from sfa_adapters.data.datasets import Skipped
    from sfa_adapters.hosts.load import Host
    from sfa_adapters.scr import SCRLoss
else:
    _Trainer = object

__all__ = ["SavingMixin"]


class SavingMixin(_Trainer):
    """Makes a `Trainer` write the checkpoints of `save_trained`, and resume from them.

    `Trainer` writes into a folder beside the checkpoints, which is renamed when it is complete, so that after a kill or
    with a full disk the previous checkpoint is there.
    """

    host: Host
    skipped: dict[str, str]
    _partial: Path | None
    _scr_random: Tensor | None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    if TYPE_CHECKING:  # methods of the Trainer that this is mixed into

        def largest(self, number: int) -> int:
            """The largest of a number over all processes."""
            ...

        def all_skipped(self) -> list[Skipped]:
            """The rows that were skipped so far, in all processes."""
            ...

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)

    def go_on(self, checkpoint: Path | None) -> None:
        """Trains from a checkpoint or from the beginning; a finished run gets no further steps.

        Args:
            checkpoint: The checkpoint, or None.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.folder
        name = f"checkpoint-{self.state.global_step}"
        partial = folder / ".partial"
        older = [path.name for path in checkpoints_of(folder) if path.name != name]
        advice = f"The last good checkpoint is {older[-1]}." if older else "There is no older checkpoint."
        skipped = self.all_skipped()
        problem: TrainingError | None = None
        try:
            with writing(name, folder, f"{advice} Free some space and go on with --resume."):
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                self.accelerator.wait_for_everyone()
                self._partial = partial
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    reasons = {one.id: one.reason for one in skipped}
                    (partial / name / "skipped.json").write_text(json.dumps(reasons), encoding="utf-8")
        except TrainingError as error:
            problem = error
        finally:
            self._partial = None
        # Another process waits for this answer: it must come whatever went wrong.
        if not self.largest(int(problem is not None)) and self.args.should_save:
            try:
                with writing(name, folder, advice):
                    seal(partial / name, folder / name)
                    keep_newest(folder, self.host.recipe.save_total_limit)
            except TrainingError as error:
                problem = error
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        if self.largest(int(problem is not None)):
            raise problem or TrainingError(f"{name} could not be written by another process. {advice}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained tensors, as `save_trained`."""
        if _internal_call:
            assert output_dir is not None
            write_trained(self.host, Path(output_dir), write=self.args.should_save)
        else:
            save_trained(self.host, output_dir or self.folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # The stock one writes the whole frozen host into every checkpoint.
        state = optimizer_state(self.host.model, self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        scr: SCRLoss | None = getattr(self, "_scr", None)
        if scr is not None:
            torch.save(scr.generator.get_state(), self._scr_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.host, resume_from_checkpoint, resume=True)
        skipped_file = Path(resume_from_checkpoint) / "skipped.json"
        if self.args.process_index == 0 and skipped_file.is_file():
            self.skipped |= json.loads(skipped_file.read_text(encoding="utf-8"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        # Older releases of transformers read the files of several CPU processes onto "cpu:0", which torch.load refuses.
        several_on_cpu = self.args.world_size > 1 and self.args.device.type == "cpu"
        try:
            if not (self.is_fsdp_enabled or several_on_cpu):
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            if self.is_fsdp_enabled:
                load_optimizer(self.host.model, optimizer, state)
            else:
                optimizer.load_state_dict(state)
            scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise RecipeError(
                f"The state of the optimizer in {checkpoint} (optimizer.pt, scheduler.pt) cannot be read: {error} Take "
                "another checkpoint."
            ) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file_name = "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}.pth"
        if not (Path(checkpoint) / file_name).is_file():
            warnings.warn(
                f"{checkpoint} has no {file_name}: it was made by another number of processes. Dropout and other "
                "chance will not go on as they would have; the order of the rows does.",
                SFAWarning,
                stacklevel=2,
            )
        if self._scr_file(checkpoint).is_file():
            self._scr_random = torch.load(self._scr_file(checkpoint), weights_only=True)

    def _scr_file(self, folder: str) -> Path:
        return Path(folder) / f"scr_rng_state_{self.args.process_index}.pt"
