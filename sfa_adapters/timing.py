"""How long a host takes to answer and how much memory it takes for that. Arms that are compared must take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from sfa_adapters.errors import RecipeError

__all__ = ["answer", "answer_seconds", "cache_bytes", "call_seconds", "peak_bytes", "peak_of", "token_seconds", "wait"]


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Times one call."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def token_seconds(model: Any, prompt: Mapping[str, Any], tokens: int) -> list[float]:
    """Times every token of one greedy answer of a set length.

    Args:
        model: What generates.
        prompt: Keyword arguments of its forward, on its device.
        tokens: Length of the answer.

    Returns:
        Seconds to the first token, and from each to the next.

    Raises:
        RecipeError: The answer ended before its time.
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
    """Times one greedy answer of a set length.

    Args:
        model: What generates.
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
    """Most memory that one answer takes at a time, beyond what is held before.

    Args:
        model: What generates.
        prompt: Keyword arguments of its forward, on its device.
        tokens: Length of the answer.
    """
    return peak_of(lambda: answer(model, prompt, tokens), model.device)


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Most memory that one call takes at a time, in bytes beyond what is held before. The CPU is read by a profiler."""
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
    """One greedy answer of a set length, with its cache: what `generate` returns as a dictionary."""
    fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1, "use_cache": True}
    return model.generate(**{**prompt, **fixed, **options}, return_dict_in_generate=True)


class _Stopwatch(BaseStreamer):
    """Notes when each token is on the host; what is put first is the prompt."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.prompt = False
        self.start = time.perf_counter()

    def put(self, value: Any) -> None:
        if self.prompt:
            self.stamps.append(time.perf_counter())
        self.prompt = True

    def end(self) -> None: ...
