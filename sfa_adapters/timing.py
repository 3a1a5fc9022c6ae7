"""How long a host takes to answer and how much memory it takes for that. Arms that are compared must take turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["answer_seconds", "cache_bytes", "peak_bytes", "wait"]


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answer_seconds(model: Any, prompt: Mapping[str, Any], tokens: int) -> tuple[float, float]:
    """Times one greedy answer of a set length.

    Args:
        model: What generates.
        prompt: Keyword arguments of its forward, on its device.
        tokens: Length of the answer, at least 2.

    Returns:
        Seconds to the first token, and from there to the last: two runs and their difference.
    """
    seconds = []
    for count in (1, tokens):
        wait(model.device)
        start = time.perf_counter()
        _answer(model, prompt, count)
        wait(model.device)
        seconds.append(time.perf_counter() - start)
    return seconds[0], max(seconds[1] - seconds[0], 1e-6)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def peak_bytes(model: Any, prompt: Mapping[str, Any], tokens: int) -> int:
    """Most memory that one answer takes at a time, beyond what is held before. The CPU is read by a profiler.

    Args:
        model: What generates.
        prompt: Keyword arguments of its forward, on its device.
        tokens: Length of the answer.
    """
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        _answer(model, prompt, tokens)
        return torch.cuda.max_memory_allocated(model.device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        _answer(model, prompt, tokens)
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events):
        current += size
        peak = max(peak, current)
    return peak


def _answer(model: Any, prompt: Mapping[str, Any], tokens: int) -> Any:
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    return model.generate(**prompt, **options, return_dict_in_generate=True)
