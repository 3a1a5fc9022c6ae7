"""Times the answers of a host and measures their memory. Variants to compare must be timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from sfa_adapters.errors import RecipeError

__all__ = ["answer", "answer_seconds", "cache_bytes", "call_seconds", "peak_bytes", "peak_of", "token_seconds", "wait"]


def wait(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, with the work that it queues on the device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def token_seconds(model: Any, prompt: Mapping[str, Any], tokens: int) -> list[float]:
    """Times every token of one greedy answer of fixed length.

    Args:
        model: A model with `generate`.
        prompt: Keyword arguments of its forward, on its device.
        tokens: Length of the answer.

    Returns:
        Seconds to the first token, and from each to the next.

    Raises:
        RecipeError: The answer ended early.
    """
    wait(model.device)
    watch = _Stopwatch()
    answer(model, prompt, tokens, streamer=watch)
    seconds = [after - before for before, after in zip([watch.start, *watch.stamps], watch.stamps, strict=False)]
    if len(seconds) != tokens:
        raise RecipeError(
            f"The answer ended after {len(seconds)} of {tokens} tokens: the generation_config of "
            f"{type(model).__name__} stops it (max_time, stop_strings). Take that out to measure time."
        )
    return seconds


def answer_seconds(model: Any, prompt: Mapping[str, Any], tokens: int) -> tuple[float, float]:
    """Times one greedy answer of fixed length.

    Args:
        model: A model with `generate`.
        prompt: Keyword arguments of its forward, on its device.
        tokens: Length of the answer, at least 2.

    Returns:
        Seconds to the first token, and from there to the last.
    """
    first, *later = token_seconds(model, prompt, tokens)
    return first, sum(later)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def peak_bytes(model: Any, prompt: Mapping[str, Any], tokens: int) -> int:
    """Peak memory of one answer in bytes, beyond what is allocated before.

    Args:
        model: A model with `generate`.
        prompt: Keyword arguments of its forward, on its device.
        tokens: Length of the answer.
    """
    return peak_of(lambda: answer(model, prompt, tokens), model.device)


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of one call in bytes, beyond what is allocated before; on a CPU measured by torch's profiler."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # There is one cycle; acc_events only keeps older releases of torch from warning about further ones.
    on = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=on, profile_memory=True, acc_events=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events):
        current += size
        peak = max(peak, current)
    return peak


def answer(model: Any, prompt: Mapping[str, Any], tokens: int, **options: Any) -> Any:
    """Generates one greedy answer of fixed length; returns the output of `generate` with its cache."""
    fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1, "use_cache": True}
    return model.generate(**{**prompt, **fixed, **options}, return_dict_in_generate=True)


class _Stopwatch(BaseStreamer):
    """Records when each token reaches the CPU; the first call of `put` is for the prompt."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.prompt = False
        self.start = time.perf_counter()

    def put(self, value: Any) -> None:
        if self.prompt:
            self.stamps.append(time.perf_counter())
        self.prompt = True

    def end(self) -> None: ...
