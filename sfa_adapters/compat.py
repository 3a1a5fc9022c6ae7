"""What differs between the supported versions of torch, transformers, peft and timm: one named function each.

No other module checks a version or handles two names of one thing. Where a thing is in use under none of the names that
are known here, an `UnknownInterfaceError` is raised rather than taking it for missing.

Nothing heavy is imported here, so that any module can import this one.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sfa_adapters.errors import UnknownInterfaceError, UntestedVersionWarning

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "TESTED",
    "cache_of",
    "cache_of_output",
    "check_versions",
    "checkpoint_activations",
    "eager_takes_masks",
    "encoded_images",
    "flop_counter",
    "has_vision_model",
    "loss_is_scaled",
    "resume_skips_outer_adapter",
    "with_cache",
    "with_encoded_images",
]

# From the first version on, and below the second: what the tests run with, and what pyproject.toml requires. Patch
# releases count as tested with their minor release. The releases of timm are all 1.0.x, so only its first is exact.
TESTED = {
    "torch": ("2.11", "2.16"),
    "transformers": ("5.17", "5.25"),
    "peft": ("0.19", "0.22"),
    "timm": ("1.0.26", "1.1"),
}

# Models whose towers are in transformers before they work: the release that mended them. Before it MiniCPM-V took
# images of one size only, and the attention of MiniMax M3 was not told where one image ends.
MENDED = {"minicpmv4_6": "5.19", "minimax_m3_vl": "5.23"}

# Models whose eager attention dropped every mask before that release, the bias with it; sdpa never did.
EAGER_TAKES_MASKS = {"dinov2": "5.18", "dinov2_with_registers": "5.18", "tipsv2": "5.18"}

# -- versions ---------------------------------------------------------------------------------------------------------

_checked = False


def check_versions() -> None:
    """Warns, once per process, of installed libraries outside the tested range. Reads metadata only, imports nothing.

    pip keeps to the range; `pip --no-deps` does not. Called when `layout` is imported, which all code on tensors needs.
    """
    global _checked  # noqa: PLW0603
    if _checked:
        return
    _checked = True
    for name, (first, end) in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:  # timm is optional
            continue
        if not _release(first) <= _release(installed) < _release(end):
            warnings.warn(
                f"sfa-adapters was tested with {name} from {first} to below {end}; {name} {installed} is installed. "
                f"Run its tests before you rely on results, or pip install '{name}>={first},<{end}'.",
                UntestedVersionWarning,
                stacklevel=2,
            )


def has_vision_model(folder: str) -> bool:
    """Whether the installed transformers has a model, in a release in which its tower works.

    Args:
        folder: Its folder in `transformers.models`.
    """
    there = find_spec(f"transformers.models.{folder}") is not None
    return there and _release(version("transformers")) >= _release(MENDED.get(folder, "0"))


def eager_takes_masks(folder: str) -> bool:
    """Whether the eager attention of a model in the installed transformers uses the mask that it is given.

    Args:
        folder: Its folder in `transformers.models`.
    """
    return _release(version("transformers")) >= _release(EAGER_TAKES_MASKS.get(folder, "0"))


def _release(text: str) -> tuple[int, ...]:
    """(2, 16) of "2.16.0.dev20261101+cu130": a pre-release counts as its release, and trailing zeros are dropped."""
    release_match = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(part) for part in release_match[0].split(".")] if release_match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# -- the cache of keys and values -------------------------------------------------------------------------------------

# transformers 5.24 renamed the argument of models, decoder layers and attention layers, and the field of outputs. Code
# that comes with a checkpoint keeps its names under any version, so the name is read from the module, not the version.
CACHE_NAMES = ("cache", "past_key_values")


def cache_of(module: nn.Module, kwargs: Mapping[str, Any], decodes: bool = True) -> Any:
    """The cache of keys and values that a module is called with.

    Args:
        module: A language model, a decoder layer or an attention layer.
        kwargs: Keyword arguments of its forward.
        decodes: Whether it is a part of a language model; a tower may get `use_cache` of its host without a cache.

    Returns:
        The cache, or None where none is in use.

    Raises:
        UnknownInterfaceError: A cache is in use, under a name that is not known. Treating it as missing would give
            other tokens.
    """
    for name in CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    hidden = _cache_names(kwargs.items())
    if hidden:
        raise UnknownInterfaceError(_unknown(module, f"gets a cache as {', '.join(hidden)}="))
    if decodes and kwargs.get("use_cache") and _name_of(module, kwargs) is None:
        raise UnknownInterfaceError(_unknown(module, "has use_cache=True and no cache argument"))
    return None


def with_cache(module: nn.Module, kwargs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Replaces the cache among the keyword arguments of a module, under the module's own name for it.

    Args:
        module: A model, a decoder layer or an attention layer.
        kwargs: Keyword arguments of its forward.
        cache: The cache, or None for none.

    Returns:
        New keyword arguments.

    Raises:
        UnknownInterfaceError: A cache is given, and the module takes none by a name that is known.
    """
    name = _name_of(module, kwargs)
    if name is None:
        if cache is None:
            return dict(kwargs)
        raise UnknownInterfaceError(_unknown(module, "takes no cache by a name that is known"))
    return {**kwargs, name: cache}


def cache_of_output(output: Any) -> Any:
    """The cache in the output of a model or of `generate`.

    Args:
        output: An output of transformers, or a tuple.

    Returns:
        The cache, or None where there is none.

    Raises:
        UnknownInterfaceError: The output holds a cache under a name that is not known.
    """
    if isinstance(output, tuple):
        return next((part for part in output if _is_cache(part)), None)
    if is_dataclass(output):  # `getattr` by the other name would warn
        given = {field.name: getattr(output, field.name) for field in fields(output)}
    else:
        given = dict(output) if isinstance(output, Mapping) else vars(output)
    for name in CACHE_NAMES:
        if given.get(name) is not None:
            return given[name]
    hidden = _cache_names(given.items())
    if hidden:
        raise UnknownInterfaceError(_unknown(output, f"returns a cache as {', '.join(hidden)}"))
    return None


def _name_of(module: nn.Module, kwargs: Mapping[str, Any]) -> str | None:
    """The name of a module's cache argument: from its keyword arguments, else from its signature."""
    for name in CACHE_NAMES:
        if name in kwargs:
            return name
    known = inspect.signature(plain_model(module).forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _cache_names(items: Iterable[tuple[str, Any]]) -> list[str]:
    return [name for name, value in items if _is_cache(value)]


def _unknown(what: Any, seen: str) -> str:
    return (
        f"{type(what).__name__} {seen}, and this version of sfa-adapters knows {' and '.join(CACHE_NAMES)}. Going on "
        "without the cache would give other tokens. Install a tested version of transformers "
        f"(>={TESTED['transformers'][0]},<{TESTED['transformers'][1]}), or pass use_cache=False."
    )


# -- wrappers ---------------------------------------------------------------------------------------------------------


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside all wrappers of PEFT."""
    inner: Any = model
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


# -- other names ------------------------------------------------------------------------------------------------------


def encoded_images(kwargs: Mapping[str, Any]) -> Any:
    """The output of the tower for the still images of a prompt, where the tower ran before the model; else None.

    Newer versions of transformers run the tower first inside `generate`; older ones run it inside the prefill.

    Args:
        kwargs: Keyword arguments of the forward of a vision-language model.
    """
    return (kwargs.get("mm_encoder_outputs") or {}).get("image")


def with_encoded_images(model: nn.Module, seen: Any) -> dict[str, Any]:
    """The keyword of a model's forward that takes what its tower has made of the images.

    Args:
        model: The model that is to be called, a `...Model` of transformers.
        seen: What its `get_image_features` gave.

    Raises:
        UnknownInterfaceError: Its forward has no such keyword (transformers before 5.18).
    """
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UnknownInterfaceError(
            f"{type(model).__name__} of transformers {version('transformers')} does not take the output of its tower "
            "in place of images: pip install 'transformers>=5.18'."
        )
    return {"mm_encoder_outputs": {"image": seen}}


def checkpoint_activations(model: Any, options: dict[str, Any]) -> None:
    """Turns activation checkpointing on; the method of transformers was renamed, and the old name warns.

    Args:
        model: A model of transformers.
        options: Of `torch.utils.checkpoint.checkpoint`, such as `use_reentrant`.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the loss of a `Trainer` is already divided by the number of gradient accumulation steps.

    Newer versions have an attribute for it; in older ones it depends on what computes the loss.

    Args:
        trainer: A `Trainer` inside `compute_loss`.
        num_items_in_batch: The argument of `compute_loss`.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = by_model or trainer.compute_loss_func is not None
    return bool(scaled)


def resume_skips_outer_adapter() -> bool:
    """Whether a `Trainer` that resumes loads only the adapters in folders of a checkpoint, and not the one beside them.

    Before transformers 5.23 it does: of a PEFT adapter with SFA in the folder `sfa/` it would load SFA alone.
    """
    return _release(version("transformers")) < (5, 23)


def flop_counter() -> FlopCounterMode:
    """A counter of floating-point operations that also counts grouped-query attention and attention on a CPU.

    Older releases of torch do not count the CPU's attention kernel, and fail on grouped-query attention in the others.
    """
    import torch
    from torch.utils import flop_counter as counter

    aten = torch.ops.aten
    if aten._scaled_dot_product_flash_attention_for_cpu in counter.flop_registry:
        return counter.FlopCounterMode(display=False)

    def operations(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        """From shapes: scores and weighted sums, once per query head."""
        batch, heads, queries, width = query
        return 2 * batch * heads * queries * key[2] * (width + value[3])

    kernels = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    )
    return counter.FlopCounterMode(display=False, custom_mapping=dict.fromkeys(kernels, operations))
