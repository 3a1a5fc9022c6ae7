"""`calibrate_heads`: scores how much each attention head matters, from prompts with images.

    s4      mean over text queries of (variance + gamma * mean) of their attention over the image tokens
    gate    mean over samples of |dL/dg|, g = 1 a factor on a head where it enters the output projection
    flap    variance of each channel that enters the output projection times the squared norm of its column,
            standardised within its layer, mean over the channels of a head (FLAP, arXiv 2312.11983)
    random  uniform numbers, to compare with

The published description of s4 does not define the axis of the variance. Here it is over the image tokens that a query
sees (population variance), and then averaged over the text queries behind the first image token. Gates are before the
output projection, which mixes the heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sfa_adapters.analysis.forward import to_device
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.heads.flap import FlapScore
from sfa_adapters.heads.layers import head_layers, model_identity
from sfa_adapters.heads.measures import GateScore, Measure, S4Score
from sfa_adapters.heads.scores import HeadScores
from sfa_adapters.vlm.records import check_allowed

__all__ = ["Method", "calibrate_heads", "check_method"]

Method = Literal["s4", "gate", "flap", "random"]


def calibrate_heads(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] = (),
    method: Method = "s4",
    gamma: float = 0.4,
    *,
    modules: Literal["language", "vision"] = "language",
    image_token_id: int | None = None,
    seed: int = 0,
    data: str = "",
    progress: bool = True,
) -> HeadScores:
    """Scores the attention heads of a model, which is not changed.

    Args:
        model: A vision-language model of transformers with `sdpa` or `eager` attention.
        batches: Keyword arguments of the model, prompts with their images: `input_ids` and `attention_mask` `[B, L]`,
            `pixel_values`, and so on. "gate" uses `labels` `[B, L]` if there are some, and otherwise predicts the text
            behind the first image token. Every sample has the same weight. "random" needs none.
        method: "s4", "gate", "flap" or "random", as above.
        gamma: Weight of the mean in "s4"; 0.4 was published.
        modules: "language", or "vision" for the tower; "s4" needs text queries, so it supports only the first.
        image_token_id: Id of the image placeholder in the prompt; by default that in the config.
        seed: Seed of "random".
        data: Description of the batches, for the record.
        progress: Whether to show a progress bar.

    Returns:
        The scores. Samples that cannot be measured are counted in `data["skipped"]` with the reason; so are batches
        that do not fit into the memory of the device even when they are read in smaller blocks.

    Raises:
        RecipeError: An option is unknown, the method does not fit the modules or packed 4-bit weights, two layers share
            weights, or a score is NaN.
        DataError: No sample can be measured, or a batch has no `input_ids`.
        ObservationError: Attention cannot be read, as in `observe`.
    """
    check_method(method, gamma)
    check_allowed(model, "heads")
    layers = head_layers(model, modules)
    groups = {name: layer.num_kv_heads for name, layer in layers.items()}
    settings: dict[str, Any] = {"modules": modules}
    about: dict[str, Any] = {"about": data}
    identity = model_identity(model, layers)
    if method == "random":
        drawn = torch.Generator().manual_seed(seed)
        values = {name: torch.rand(layer.num_heads, generator=drawn).tolist() for name, layer in layers.items()}
        return HeadScores(_tuples(values), groups, method, identity, about | {"samples": 0}, settings | {"seed": seed})
    measure: Measure
    if method == "s4":
        measure = S4Score(model, layers, gamma, image_token_id, modules)
        settings |= {"gamma": gamma, "variance": "over image tokens, mean over text queries"}
    elif method == "gate":
        measure = GateScore(model, layers, image_token_id)
    else:
        measure = FlapScore(model, layers, modules)
    digest = hashlib.sha256()
    with evaluating(model), _bar(progress, len(batches) if isinstance(batches, Sized) else None) as advance:
        for batch in batches:
            ids = batch.get("input_ids")
            if not isinstance(ids, Tensor) or ids.ndim != 2:
                raise DataError(f"A batch holds {sorted(batch)}; input_ids [batch, length] are needed.")
            digest.update(repr(ids.tolist()).encode())
            _measured(measure, to_device(batch, model), len(ids))
            advance()
    measure.skipped.refuse_all(measure.samples, "samples")
    about |= {"samples": measure.samples, "skipped": measure.skipped.counts(), "prompts": digest.hexdigest()[:16]}
    return HeadScores(_tuples(measure.scores()), groups, method, identity, about, settings)


def check_method(method: str, gamma: float) -> None:
    """Checks `method` and `gamma` of `calibrate_heads`.

    Raises:
        RecipeError: There is no such method, or gamma is no number of at least 0.
    """
    if method not in get_args(Method):
        raise RecipeError(f"method={method!r} must be one of {', '.join(get_args(Method))}.")
    if isinstance(gamma, bool) or not 0 <= gamma < float("inf"):
        raise RecipeError(f"gamma={gamma!r} must be a number of at least 0.")


def _measured(measure: Measure, batch: dict[str, Any], count: int) -> None:
    """Measures a batch; when out of memory, again in smaller blocks; if that fails too, skips it."""
    for block_bytes in (2**23, 2**19):
        try:
            measure.take(batch, block_bytes)
        except torch.OutOfMemoryError:
            pass  # the error holds on to the tensors of the forward: it has to be gone before memory is given back
        else:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    measure.skip(count, "the device has no room for it; give smaller batches or images")


def _tuples(values: Mapping[str, Iterable[float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(numbers) for name, numbers in values.items()}


@contextmanager
def _bar(shown: bool, total: int | None) -> Iterator[Callable[[], None]]:
    """Shows a progress bar; yields the function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("calibrating heads"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True, disable=not shown) as progress:
        task = progress.add_task("calibrating", total=total)
        yield lambda: progress.advance(task)
