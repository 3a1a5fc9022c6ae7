"""Two processes with gloo, forked from a server that has imported the libraries: that takes longer than the tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

__all__ = ["run_two"]

_SERVER = "forkserver"


def _start(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def run_two(work: Callable[..., None], *arguments: Any) -> None:
    """Calls a function in two processes of one gloo group, and waits for both.

    Args:
        work: A function of a module; it gets the number of its process, 0 or 1.
        *arguments: Its other arguments.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload([__name__, "sfa_adapters.inject", "transformers.models.auto", "peft"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        context: Any = start_processes(_start, (port, work, arguments), nprocs=2, join=False, start_method=_SERVER)
        try:
            for _ in range(60):
                if context.join(timeout=5):
                    break
            else:
                pytest.fail("the two processes did not finish in five minutes")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.terminate()
