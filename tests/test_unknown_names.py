"""A cache argument of an unknown name, as a later transformers could bring: readers of the cache raise an error.

The simulated version hands the cache over as `kv_store`, either as a cache of transformers or in an object of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from sfa_adapters import compat, observe
from sfa_adapters.errors import UnknownInterfaceError
from sfa_adapters.readers import MeanPerKey
from sfa_adapters.reduction.dymu.config import DyMUConfig
from sfa_adapters.reduction.dymu.inject import inject_dymu
from sfa_adapters.reduction.fastv.inject import FastVConfig, inject_fastv
from sfa_adapters.vlm.parts import find_decoder
from tests.support.dymu import BY_NAME, THRESHOLD
from tests.support.fastv_prompts import FAMILIES, Ask, prompt
from tests.test_observe import language, prompts

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}
as_what = pytest.mark.parametrize("opaque", [False, True], ids=["cache", "opaque"])


@dataclass
class Store:
    """A cache that does not look like one."""

    value: Any


def rename_cache(module: nn.Module, opaque: bool) -> None:
    """From now on the module takes its cache as `kv_store`, and callers hand it over so."""
    forward, hidden = module.forward, []

    def renamed(*args: Any, kv_store: Any = None, **kwargs: Any) -> Any:
        cache = kv_store.value if isinstance(kv_store, Store) else kv_store
        return forward(*args, **kwargs, **dict.fromkeys(hidden[-1:], cache))

    def rename(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        for name in compat.CACHE_NAMES:
            if name in kwargs:
                hidden.append(name)
                cache = kwargs.pop(name)
                kwargs["kv_store"] = Store(cache) if opaque and cache is not None else cache
        return args, kwargs

    module.forward = renamed  # type: ignore[method-assign]
    module.register_forward_pre_hook(rename, with_kwargs=True, prepend=True)


@as_what
def test_observe_around_generate(opaque: bool) -> None:
    model, inputs = language(LlamaConfig), prompts("none")
    with observe(model, MeanPerKey()):  # before
        model.generate(**inputs, **GREEDY)
    for layer in model.model.layers:
        rename_cache(layer.self_attn, opaque)
    with (
        pytest.raises(UnknownInterfaceError, match=r"kv_store=|keeps a cache, but it was called with none"),
        observe(model, MeanPerKey()),
    ):
        model.generate(**inputs, **GREEDY)
    with observe(model, MeanPerKey()) as seen:
        model(**inputs, use_cache=False)
    assert len(seen.calls) == 3


@as_what
@pytest.mark.parametrize("prune_at", ["layer", "input"])
def test_fastv(prune_at: Any, opaque: bool) -> None:
    family = FAMILIES[0]
    model: Any = family.build()
    decoder: Any = find_decoder(model).module
    for module in (decoder, *decoder.layers):
        rename_cache(module, opaque)
    inputs = prompt(family, Ask((3, 5), seed=1))
    with torch.no_grad():
        plain = model.generate(**inputs, **GREEDY)
    inject_fastv(model, FastVConfig(layer=2, prune_at=prune_at))
    # Hooks that were there before the library's stay in front of them.
    with pytest.raises(UnknownInterfaceError, match=r"kv_store=|no cache argument"):
        model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        pruned = model.generate(**inputs, **GREEDY, use_cache=False)
    assert pruned.shape == plain.shape


@as_what
@pytest.mark.parametrize("mode", ["vtu", "logical_rope"])
def test_dymu(mode: Any, opaque: bool) -> None:
    host = BY_NAME["llava"]
    model: Any = host.build()
    rename_cache(model.model.language_model, opaque)
    inject_dymu(model, DyMUConfig(thresholds=THRESHOLD, language=mode))
    inputs = host.inputs(0)
    with pytest.raises(UnknownInterfaceError, match=r"kv_store=|no cache argument"):
        model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        model(**inputs, use_cache=False)
