"""`predict_memory`: the memory that a recipe needs on each GPU, and whether it fits, before any download."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.activations import Activations, activations_of
from sfa_adapters.memory.report import DeviceMemory, MemoryPlan
from sfa_adapters.memory.shapes import Lengths, lengths_of
from sfa_adapters.memory.weights import ParameterCounts, Weights, count_parameters, weights_of
from sfa_adapters.vlm.records import vlm_spec

__all__ = ["WORKSPACE", "DeviceMemory", "MemoryPlan", "predict_memory"]

# What a process takes on a GPU besides tensors: the CUDA context with its loaded kernels, workspaces of cuBLAS, and
# what the caching allocator cannot use because it is in pieces. Set by experience, not measured for each card.
WORKSPACE = 1_000_000_000
GRADIENT, MOMENTS = 4, 8  # bytes for each trained weight: its gradient, and the two moments of AdamW, in float32


def predict_memory(
    recipe: Recipe,
    architecture_config: Any,
    gpus: int = 2,
    memory: float = 40e9,
    batch: int | None = None,
    tiles: int | None = None,
    answer_tokens: int | None = None,
) -> MemoryPlan:
    """Predicts weights, gradients, optimizer and activations on each GPU, from the meta device.

    Args:
        recipe: The recipe.
        architecture_config: Configuration of its host.
        gpus: How many GPUs, one process each; `split` is one process on two.
        memory: Of each GPU, in bytes.
        batch: Questions per forward of one process, in place of `micro_batch`.
        tiles: Tiles of every image, in place of `max_tiles`.
        answer_tokens: Tokens of the longest answer, beside 96 of template and question; by default the answer is within
            these 96, and logits are counted for all of them.

    Returns:
        The prediction, with what would make it fit where it does not.

    Raises:
        RecipeError: The plan does not work with this number of GPUs, the host does not tile, or `answer_tokens` is
            below 1.
    """
    if gpus < 1 or memory <= 0:
        raise RecipeError(f"gpus={gpus} and memory={memory:g} must be above 0.")
    if recipe.plan == "split" and gpus < 2:
        raise RecipeError("plan=split puts tower and language model on two GPUs; with one, use plan=nf4 or plan=bf16.")
    if batch is not None:
        rounded = max(batch, recipe.batch_size // batch * batch) if batch >= 1 else recipe.batch_size
        recipe = recipe.replace(micro_batch=batch, batch_size=rounded)
    lengths_of(recipe, architecture_config, tiles, answer_tokens)  # refuses tiles that this host cannot have
    if tiles is not None and _setting(recipe) == "max_tiles":
        recipe = recipe.replace(max_tiles=tiles)
    counts = count_parameters(recipe, architecture_config)

    def predicted(changed: Recipe) -> MemoryPlan:
        lengths = lengths_of(changed, architecture_config, answer_tokens=answer_tokens)
        return _predict(changed, architecture_config, lengths, counts, gpus, memory)

    prediction = predicted(recipe)
    if prediction.fits:
        return prediction
    savings = tuple(_savings(recipe, predicted))
    return replace(prediction, savings=savings)


def _predict(
    recipe: Recipe, config: Any, lengths: Lengths, counts: ParameterCounts, gpus: int, memory: float
) -> MemoryPlan:
    vision, text = activations_of(recipe, config, lengths, recipe.micro_batch)
    front, model = weights_of(recipe, counts)
    if recipe.plan == "split":
        halves = (
            _device("GPU 0", "tower, projector", front, _peak(recipe, front, vision)),
            _device("GPU 1", "language model", model, _peak(recipe, model, text)),
        )
        return MemoryPlan(recipe, halves, memory, lengths)
    everything = Weights(
        front.stored + model.stored, front.trained + model.trained, front.casts + model.casts, model.unpacked
    )
    on = recipe.gradient_checkpointing
    # During the backward pass of the tower, the activations of the language model are free already.
    peak = max(vision.kept(on) + _peak(recipe, everything, text), _peak(recipe, everything, vision))
    one = _device("GPU 0", "everything", everything, peak, exchanged=gpus > 1)
    if recipe.plan == "fsdp2" and gpus > 1:
        one = _sharded(recipe, counts, one, gpus)
    devices = tuple(replace(one, device=f"GPU {number}") for number in range(gpus))
    return MemoryPlan(recipe, devices, memory, lengths)


def _peak(recipe: Recipe, weights: Weights, activations: Activations) -> int:
    return activations.peak(recipe.gradient_checkpointing, weights.casts)


def _device(name: str, holds: str, weights: Weights, activations: int, exchanged: bool = False) -> DeviceMemory:
    gradients = weights.trained * GRADIENT * (2 if exchanged else 1)
    moments = weights.trained * MOMENTS
    return DeviceMemory(name, holds, weights.stored, gradients, moments, activations, WORKSPACE + weights.unpacked)


def _sharded(recipe: Recipe, counts: ParameterCounts, whole: DeviceMemory, gpus: int) -> DeviceMemory:
    """One shard, with what is gathered: everything outside the layers, one layer, and the next, prefetched one."""
    size = 2 if recipe.dtype != "float32" else 4
    gathered = (counts.outside + 2 * counts.largest_layer) * size
    return replace(
        whole,
        holds=f"1/{gpus} of everything",
        weights=whole.weights // gpus,
        gradients=whole.gradients // 2 // gpus,
        optimizer=whole.optimizer // gpus,
        workspace=whole.workspace + gathered,
    )


# -- what would save it -----------------------------------------------------------------------------------------------


def _savings(recipe: Recipe, predicted: Callable[[Recipe], MemoryPlan]) -> Iterator[tuple[str, int]]:
    """Single changes of settings that make it fit; if none does, the first few that do together."""
    alone = False
    together: dict[str, Any] = {}
    listed: list[str] = []
    for changes, text in _changes(recipe):
        single = predicted(recipe.replace(**changes))
        if single.fits and not _listed_already(text, listed):
            alone = True
            listed.append(text)
            yield text, single.peak
    if alone:
        return
    listed = []
    for changes, text in _changes(recipe):
        kind = text.partition("=")[0]
        listed = [other for other in listed if other.partition("=")[0] != kind] + [text]
        together |= changes
        both = predicted(recipe.replace(**together))
        if both.fits:
            yield " with ".join(listed), both.peak
            return


def _listed_already(text: str, listed: list[str]) -> bool:
    """Whether a milder change of the same setting is listed."""
    return any(other.partition("=")[0] == text.partition("=")[0] for other in listed)


def _changes(recipe: Recipe) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings that need less memory, from those that cost nothing in quality to those that do."""
    if not recipe.answer_logits:
        yield {"answer_logits": True}, "answer_logits=true"
    if not recipe.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "gradient_checkpointing=true"
    batch = recipe.micro_batch // 2
    while batch >= 1:
        # The batch of a step stays a multiple of it.
        while recipe.batch_size % batch:
            batch -= 1
        yield {"micro_batch": batch}, f"micro_batch={batch}"
        batch //= 2
    if not recipe.freeze_llm:
        yield {"freeze_llm": True}, "freeze_llm=true"
    if recipe.plan != "nf4":
        yield {"plan": "nf4", "freeze_llm": True}, "plan=nf4" if recipe.freeze_llm else "plan=nf4 freeze_llm=true"
    if _setting(recipe) == "max_pixels":
        for share in (2, 4):
            yield {"max_pixels": recipe.max_pixels // share}, f"max_pixels={recipe.max_pixels // share}"
    elif _setting(recipe) == "max_tiles":
        tiles = recipe.max_tiles // 2
        while tiles >= 1:
            yield {"max_tiles": tiles}, f"max_tiles={tiles}"
            tiles //= 2
    if not recipe.freeze_vision:
        yield {"freeze_vision": True}, "freeze_vision=true"


def _setting(recipe: Recipe) -> str | None:
    """The setting that limits an image of this host."""
    rules = vlm_spec(recipe.family).images
    return None if rules is None else rules.setting
