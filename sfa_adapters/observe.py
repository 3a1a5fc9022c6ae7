"""`observe`: attention statistics of a running model, streamed out while it computes, without an N x N matrix.

While the context is open, every chosen attention module runs inside a `torch.overrides.TorchFunctionMode`. It sees the
arguments of `scaled_dot_product_attention` (or, in eager implementations, the scores that go into the softmax), gives
them to the readers and calls the very same function with the very same arguments. So the outputs of the model are
those of the unobserved one bit for bit: unlike a wrapped mask, it changes neither `is_causal` nor grouped-query flags.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfa_adapters.attention import shown_to
from sfa_adapters.attention_call import AttentionCall, row_blocks
from sfa_adapters.compat import cache_of, plain_model
from sfa_adapters.errors import NoMatchingBackboneError, ObservationError, UnknownInterfaceError
from sfa_adapters.hooks import attached_while
from sfa_adapters.mask import LazyMask
from sfa_adapters.packing import PackedMask
from sfa_adapters.readers import Reader
from sfa_adapters.tower_search import find_tower

__all__ = ["Observation", "attention_modules", "observe"]

# A user-defined reader: called once per attention computation.
CallReader = Callable[[AttentionCall], None]
Modules = str | Sequence[str] | None


@dataclass
class Observation:
    """Which attention modules were observed; the measured values are in the readers.

    Attributes:
        layers: Paths of the observed attention modules.
        calls: How many attention computations each of them made.
    """

    layers: tuple[str, ...]
    calls: dict[str, int] = field(default_factory=dict)


@contextmanager
def observe(
    model: nn.Module,
    readers: Reader | CallReader | Sequence[Reader | CallReader],
    modules: Modules = None,
    block_bytes: int = 2**23,
) -> Iterator[Observation]:
    """Reads the attention of a model while it runs.

        entropy = RowEntropy(heads="mean")
        with observe(model, entropy, modules="vision"):
            model(**inputs)
        entropy.results["vision_tower.encoder.layers.0.self_attn"]     # a list, one tensor per forward

    Works with `sdpa` and `eager` attention, vision towers and language models, grouped-query attention, padding,
    caches and `generate`, with SFA and without. Close it before `backward` when activations are checkpointed: their
    recomputation would be read again.

    Args:
        model: A tower, a language model or a whole VLM.
        readers: What to read. `Reader`s share one pass over the rows; any other callable gets each `AttentionCall`,
            with gradients where they are on.
        modules: "vision", "language", a pattern such as "*layers.3.self_attn", several of these, or None
            for "vision" and "language".
        block_bytes: Size in bytes of the logits that are in memory at a time; about three times as much is used.

    Yields:
        An `Observation`.

    Raises:
        ObservationError: No attention module fits, a module ran without being read (flash or flex attention, compiled
            code), nothing ran at all, no reader was given anything to read (no call had a row that its `queries`
            name), or logits are NaN.
        UnknownInterfaceError: A module gets a cache under a name that is not known, so the positions of its queries
            are not known either.
    """
    chosen = attention_modules(model, modules)
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise ObservationError("A compiled model cannot be observed: pass the model that was given to torch.compile.")
    listed = [readers] if callable(readers) or isinstance(readers, Reader) else list(readers)
    if not listed:
        raise ObservationError("No reader was given: nothing would be read.")
    observation = Observation(tuple(chosen))
    served: set[int] = set()
    with attached_while("observe") as attach:
        for index, (name, module) in enumerate(chosen.items()):
            watcher = _Watcher(name, index, module, listed, observation, block_bytes, served)
            attach(module, observation, pre=watcher.enter, post=watcher.leave, always_call=True)
        yield observation
    unread = [name for name in chosen if name not in observation.calls]
    if len(unread) == len(chosen) or (modules is not None and unread):
        raise ObservationError(
            f"{len(unread)} of {len(chosen)} observed attention modules never ran, e.g. {unread[0]}. Call the model "
            "inside the context, with an image if its tower is observed, or name the modules that run."
        )
    if not served:
        wanted = ", ".join(f"{type(r).__name__}(queries={_short(r.queries)})" for r in listed if isinstance(r, Reader))
        raise ObservationError(
            f"{sum(observation.calls.values())} attention computations ran and nothing was read of them: none had a "
            f"row that {wanted} names. Positions count from the first token of the sequence; 'generated' are the rows "
            "of decoding steps, of which an answer of one token has none."
        )


class _Watcher:
    """The two hooks of one attention module."""

    def __init__(
        self,
        name: str,
        index: int,
        module: nn.Module,
        readers: Sequence[Reader | CallReader],
        observation: Observation,
        block_bytes: int,
        served: set[int],
    ) -> None:
        self.name, self.index, self.readers = name, index, readers
        self.observation, self.block_bytes, self.served = observation, block_bytes, served
        self.groups = int(getattr(module, "num_key_value_groups", 1))
        self.modes: list[Seam] = []
        self.is_causal = getattr(module, "is_causal", False) is True

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        mode = Seam(self, states.shape[-2] if isinstance(states, Tensor) else None, self._past(module, kwargs))
        self.modes.append(mode)
        mode.__enter__()

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.modes:  # the forward failed before `enter`
            return
        mode = self.modes.pop()
        mode.__exit__(None, None, None)
        # With `always_call` this also runs when the forward raised; then there is no output, and its error counts.
        if mode.segment == 0 and output is not None:
            implementation = getattr(getattr(module, "config", None), "_attn_implementation", "unknown")
            raise ObservationError(
                f"{self.name} ({type(module).__name__}) ran without scaled_dot_product_attention or a softmax that "
                f"could be read: the attention implementation {implementation!r} bypasses both. Load the model with "
                "attn_implementation='sdpa' or 'eager', or call model.set_attn_implementation('sdpa')."
            )

    def _past(self, module: nn.Module, kwargs: Mapping[str, Any]) -> int | None:
        """Tokens in the cache of this layer before the forward; None where no cache is in use."""
        cache = cache_of(module, kwargs, decodes=False)
        if cache is None:
            return None
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise UnknownInterfaceError(
                f"{self.name} ({type(module).__name__}) gets a cache and has no layer_idx, so how many tokens it holds "
                "of this layer is not known. Observe without a cache (use_cache=False)."
            )
        return int(cache.get_seq_length(layer))

    def read(self, call: AttentionCall) -> None:
        self.observation.calls[self.name] = self.observation.calls.get(self.name, 0) + 1
        for reader in self.readers:
            if not isinstance(reader, Reader):
                reader(call)
                self.served.add(id(reader))
        with torch.no_grad():
            read = _stream([r for r in self.readers if isinstance(r, Reader)], call.detach(), self.block_bytes)
            self.served.update(id(reader) for reader in read)


def _stream(readers: Sequence[Reader], call: AttentionCall, block_bytes: int) -> Sequence[Reader]:
    """Feeds the rows of one call to all readers in one pass; returns the readers that take any of its rows."""
    wanted = {reader: reader.chosen(call) for reader in readers}
    wanted = {reader: mask for reader, mask in wanted.items() if mask is None or bool(mask.any())}
    if not wanted:
        return ()
    masks = [mask for mask in wanted.values() if mask is not None]
    index = torch.stack(masks).any(0).nonzero()[:, 0] if len(masks) == len(wanted) else None
    states = {reader: reader.begin(call) for reader in wanted}
    for rows in row_blocks(call, index, block_bytes, trim=True):
        for reader, mask in wanted.items():
            chosen_rows = rows if mask is None else rows.choose(mask[rows.index])
            if chosen_rows is not None:
                reader.block(states[reader], call, chosen_rows)
    for reader in wanted:
        reader.keep(call, reader.end(states[reader], call))
    return tuple(wanted)


class Seam(TorchFunctionMode):
    """Sees the torch functions that one forward of an attention module calls."""

    def __init__(self, watcher: _Watcher, length: int | None, past: int | None) -> None:
        super().__init__()
        self.watcher, self.length, self.past, self.segment = watcher, length, past, 0
        self.reading = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.reading:  # a softmax of the reader is not the model's
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            bound = _SDPA.bind(*args, **kwargs).arguments
            mask = bound.get("attn_mask")
            if isinstance(mask, LazyMask) and not (isinstance(mask, PackedMask) and mask.biases is None):
                with self, shown_to(self._shown):  # reads the attention that the lazy mask computes
                    return LazyMask.__torch_function__(func, types, args, kwargs)
            self._attention(bound, mask)
        elif func in _SOFTMAX and isinstance(args[0], Tensor) and args[0].ndim == 4:
            self._record(scores=args[0])
        return func(*args, **kwargs)

    def _shown(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        self.reading = True  # no torch function is being answered here, so this mode sees what the reader calls
        try:
            self._record(query=query, key=key, scale=scale, mask=mask)
        finally:
            self.reading = False

    def _attention(self, bound: Mapping[str, Any], mask: Tensor | PackedMask | None) -> None:
        query, key = bound["query"], bound["key"]
        scale = bound.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        groups = self.watcher.groups
        if groups > 1 and self.length == 1 and query.shape[1] == key.shape[1] and query.shape[2] == groups:
            # transformers packs the heads of a group into the query axis at a decoding step.
            query = query.flatten(1, 2).unsqueeze(2)
            if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] != 1:
                mask = mask.flatten(1, 2).unsqueeze(2)
        if isinstance(mask, PackedMask):
            parts = zip(query.split(mask.lengths, 2), key.split(mask.lengths, 2), strict=True)
            for image_query, image_key in parts:
                self._record(query=image_query, key=image_key, scale=scale)
            return
        self._record(query=query, key=key, scale=scale, mask=mask, is_causal=bool(bound.get("is_causal", False)))

    def _record(self, **parts: Any) -> None:
        call = AttentionCall(self.watcher.name, self.watcher.index, self.segment, self.past or 0, **parts)
        if self.past is None and self.watcher.is_causal and call.num_keys > call.num_queries:
            raise UnknownInterfaceError(
                f"{call.layer} has {call.num_keys} keys for {call.num_queries} queries, so it keeps a cache, but it "
                "was called with none that sfa-adapters knows: the positions of its queries are not known. Install a "
                "tested version of transformers, or observe without a cache (use_cache=False)."
            )
        self.segment += 1
        self.watcher.read(call)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """Has the arguments of `F.scaled_dot_product_attention`, which has no signature to inspect."""


_SDPA = inspect.signature(_sdpa)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def _short(queries: Any) -> str:
    return f"{queries.dtype} {list(queries.shape)}" if isinstance(queries, Tensor) else repr(queries)


def attention_modules(model: nn.Module, modules: Modules = None) -> dict[str, nn.Module]:
    """The attention modules of a model by path, in order of execution.

    Args:
        model: A tower, a language model or a whole VLM.
        modules: As in `observe`.

    Returns:
        The modules by path.

    Raises:
        ObservationError: None fits; lists the attention modules.
    """
    try:
        vision = dict(find_tower(model).attentions)
    except NoMatchingBackboneError:
        vision = {}
    modules_found = {
        name: module
        for name, module in model.named_modules()
        if name in vision or (hasattr(module, "q_proj") and hasattr(module, "k_proj"))
    }
    kinds = {"vision": set(vision), "language": _of_language(model, set(modules_found) - set(vision))}
    chosen: set[str] = set()
    wanted = ["vision", "language"] if modules is None else [modules] if isinstance(modules, str) else modules
    for pattern in wanted:
        fitting = kinds.get(pattern, {name for name in modules_found if fnmatchcase(name, pattern)})
        if modules is None and not fitting:
            continue  # a tower or a language model by itself
        if not fitting:
            raise ObservationError(_no_module(model, pattern, modules_found))
        chosen |= fitting
    if not chosen:
        raise ObservationError(_no_module(model, modules, modules_found))
    return {name: module for name, module in modules_found.items() if name in chosen}


def _of_language(model: nn.Module, names: set[str]) -> set[str]:
    """Those of the language model; a tower for audio runs on other inputs."""
    host: Any = plain_model(model)
    decoder = host.get_decoder() if hasattr(host, "get_decoder") else host
    path = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    inside = {name for name in names if name.startswith(path)}
    return inside or names


def _no_module(model: nn.Module, wanted: Any, modules: Mapping[str, nn.Module]) -> str:
    names = list(modules)
    listed = f"{len(names)}, from {names[0]} to {names[-1]}" if names else "none"
    return (
        f"modules={wanted!r} fits no attention module of {type(model).__name__}. It has: {listed}. "
        "Use 'vision', 'language', a pattern over these paths, or None for all."
    )


class _CallableModule(ModuleType):
    """Makes this module callable like its function `observe`.

    The package has a function `observe` and this module of the same name. Importing the module sets the attribute of
    the package to the module, so `from sfa_adapters import observe` may give either one; both do the same.
    """

    __call__ = staticmethod(observe)


sys.modules[__name__].__class__ = _CallableModule
