"""Two processes (gloo): DDP through `train`, and a sharded host (FSDP2); one launch of torchrun for all tests."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from sfa_adapters.answer_logits import logits_at_answers
from sfa_adapters.errors import RecipeError, TrainingError
from sfa_adapters.hosts.placement import shard
from sfa_adapters.training.callbacks import Interrupted
from sfa_adapters.training.checkpoints import load_trained, save_trained
from sfa_adapters.training.checks import GradientCheck
from sfa_adapters.training.optimizer import build_optimizer
from sfa_adapters.training.sharded import load_optimizer, optimizer_state
from tests.support.paths import ROOT
from tests.support.tiny_training import At, Rows, assert_equal, collate, recipe, run, tiny_host, trained

PLAIN = recipe(micro_batch=1, max_steps=4)  # four forwards of one process, or two of two
STEPS = 2


def train_plainly(folder: Path) -> Any:
    """Four steps without dropout, which is the one thing that differs between processes."""
    import tests.support.tiny_training as tiny

    built = tiny.tiny_host
    tiny.tiny_host = lambda given=None, dropout=0.0: built(given, 0.0)
    try:
        return run(folder, PLAIN, Rows(family=PLAIN.family))
    finally:
        tiny.tiny_host = built


def batch_of(*numbers: int) -> dict[str, Any]:
    batch = collate([Rows()[number] for number in numbers])
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def step_of(host: Any, optimizer: Any, batch: dict[str, Any]) -> float:
    loss = host.model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# -- what each process does -------------------------------------------------------------------------------------------


def ddp(folder: Path) -> dict[str, Any]:
    host, result = train_plainly(folder / "ddp")
    losses = [line["loss"] for line in result.history if "loss" in line]
    return {"weights": trained(host), "losses": losses, "skipped": [one.id for one in result.skipped]}


def restart(folder: Path) -> dict[str, Any]:
    """With dropout: each process has random numbers of its own."""

    def crash() -> None:
        raise InterruptedError

    given = PLAIN.replace(save_steps=1, max_steps=3)
    whole, _ = run(folder / "restart_whole", given)
    try:
        run(folder / "restart", given, callbacks=[At(2, crash)])
    except InterruptedError:
        dist.barrier()
    host, _ = run(folder / "restart", given, resume=True)
    return {"whole": trained(whole), "parts": trained(host)}


def one_signal(folder: Path) -> dict[str, Any]:
    """Only the second process gets the signal to stop."""

    def term() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        run(folder / "signal", PLAIN, callbacks=[At(1, term)])
    except Interrupted as stopped:
        return {"code": stopped.code}
    return {"code": None}


def nan(folder: Path) -> dict[str, Any]:
    """One row of one process is NaN."""

    class Poisoned(Rows):
        def __getitem__(self, number: int) -> dict[str, Any]:
            row = super().__getitem__(number)
            return {**row, "pixel_values": row["pixel_values"] * math.nan} if number == 3 else row

    return {"message": message_of(lambda: run(folder / "nan", PLAIN, Poisoned()))}


def full_disk(folder: Path) -> dict[str, Any]:
    """The first process cannot write."""
    import sfa_adapters.training.checkpoints as checkpoints

    before = checkpoints.save_file

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoints.save_file = full
    try:
        return {"message": message_of(lambda: run(folder / "full", PLAIN))}
    finally:
        checkpoints.save_file = before


def divide(folder: Path) -> dict[str, Any]:
    return {"message": message_of(lambda: run(folder / "divide", PLAIN.replace(batch_size=3)))}


def message_of(act: Any) -> str:
    try:
        act()
    except (TrainingError, RecipeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sharded(folder: Path) -> dict[str, Any]:
    """Two steps, each process with its half of the batch; saved, loaded, and one step more from there."""
    rank = dist.get_rank()
    host = tiny_host(dropout=0.0)
    shard(host.model, host.spec)
    kinds = {name for name, p in host.model.named_parameters() if isinstance(p, DTensor) and ".sfa." in name}
    optimizer = build_optimizer(host)
    check = GradientCheck(host)
    losses = []
    for number in range(STEPS):
        with logits_at_answers(host.model):  # the other host computes all logits
            loss = host.model(**batch_of(2 * rank + number, 4 + 2 * rank + number)).loss
        loss.backward()
        check(number + 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = optimizer_state(host.model, optimizer)
    save_trained(host, folder / "sharded")
    if rank == 0:
        torch.save(state, folder / "sharded_optimizer.pt")
    dist.barrier()
    again = tiny_host(dropout=0.0)
    shard(again.model, again.spec)
    second = build_optimizer(again)
    load_trained(again, folder / "sharded", resume=True)
    load_optimizer(again.model, second, torch.load(folder / "sharded_optimizer.pt", weights_only=True))
    for one, optimizer_of_one in ((host, optimizer), (again, second)):
        step_of(one, optimizer_of_one, batch_of(rank, 2 + rank))
    ends = [{n: p.full_tensor() for n, p in trained(one).items()} for one in (host, again)]  # pyright: ignore[reportAttributeAccessIssue]
    return {"losses": losses, "sfa": sorted(kinds), "waiting": sorted(check.waiting), "ends": ends}


WORK = (ddp, restart, one_signal, nan, full_disk, divide, sharded)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for work in WORK:
        result = work(Path(folder))
        torch.save(result, Path(folder) / f"{work.__name__}-{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, "-m", "tests.training.test_ddp", str(folder)],
        check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def results_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The results of both processes."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_are_one_with_the_same_batch(folder: Path, tmp_path: Path) -> None:
    host, result = train_plainly(tmp_path)
    expected, losses = trained(host), [line["loss"] for line in result.history if "loss" in line]
    first, second = results_of(folder, "ddp")
    assert_equal(first["weights"], second["weights"])
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(losses, rel=1e-5)
    for name, tensor in expected.items():
        # AdamW divides by the size of a gradient: rounding of small ones becomes a small share of a step of 1e-3.
        if not name.endswith("k_proj.bias"):  # no softmax sees it: its gradient is nothing but rounding
            torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_skipped_rows_are_counted_over_both_processes(folder: Path) -> None:
    assert [one["skipped"] for one in results_of(folder, "ddp")] == [["broken1", "broken6"]] * 2
    lines = (folder / "ddp" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["broken1", "broken6"]


def test_a_restart_of_two_processes_is_bit_for_bit(folder: Path) -> None:
    first, second = results_of(folder, "restart")
    assert_equal(first["whole"], first["parts"])
    assert_equal(first["parts"], second["parts"])
    names = {path.name for path in (folder / "restart" / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "tuned.safetensors"} <= names


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(folder: Path) -> None:
    assert [one["code"] for one in results_of(folder, "one_signal")] == [143, 143]
    assert [path.name for path in (folder / "signal").glob("checkpoint-*")] == ["checkpoint-1"]


def test_what_goes_wrong_in_one_process_stops_both(folder: Path) -> None:
    messages = [one["message"] for one in results_of(folder, "nan")]
    here = [text for text in messages if "the loss is nan" in text]
    assert len(here) == 1
    assert "row3" in here[0]
    assert [text for text in messages if "the loss of another process" in text]
    assert len(list((folder / "nan").glob("failed_batch*"))) == 1
    first, second = (one["message"] for one in results_of(folder, "full_disk"))
    assert "the disk is full" in first
    assert "could not be written by another process" in second


def test_a_batch_that_does_not_divide_is_refused_everywhere(folder: Path) -> None:
    messages = [one["message"] for one in results_of(folder, "divide")]
    assert all("batch_size=3 must be a multiple of micro_batch x processes = 1 x 2 = 2" in text for text in messages)


def test_a_sharded_host_trains_as_a_whole_one(folder: Path) -> None:
    host = tiny_host(dropout=0.0)
    optimizer = build_optimizer(host)
    # Answers have two tokens each, so that the mean over a batch is that over its halves.
    losses = [step_of(host, optimizer, batch_of(n, 4 + n, 2 + n, 6 + n)) for n in range(STEPS)]
    first, second = results_of(folder, "sharded")
    together = [(one + other) / 2 for one, other in zip(first["losses"], second["losses"], strict=True)]
    assert together == pytest.approx(losses, rel=1e-5)
    saved = {}
    for file in ("tuned.safetensors", "adapter_model.safetensors"):
        tensors = load_file(folder / "sharded" / file)
        saved |= {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    expected = {name.removesuffix(".default"): tensor for name, tensor in trained(host).items()}
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith("k_proj.bias"):  # as above
            torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    assert len(first["sfa"]) == 4  # the scalars are sharded, too
    assert first["waiting"] == []
    whole = tiny_host()
    load_trained(whole, folder / "sharded", resume=True)
    assert all(torch.equal(saved[name.removesuffix(".default")], tensor) for name, tensor in trained(whole).items())


def test_a_sharded_run_goes_on_from_what_was_saved(folder: Path) -> None:
    for process in results_of(folder, "sharded"):
        assert_equal(*process["ends"])


if __name__ == "__main__":
    main(sys.argv[1])
