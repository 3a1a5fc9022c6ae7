"""Finds the attention modules of a model with their heads, and identifies the model by its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.analysis.prompts import decoder_layers
from sfa_adapters.errors import RecipeError
from sfa_adapters.hooks import attached_while
from sfa_adapters.observe import attention_modules
from sfa_adapters.tower_search import find_tower

__all__ = ["HeadLayer", "entering", "head_layer", "head_layers", "model_identity", "weights_digest"]

_SAMPLED = 64  # entries of each weight in the digest
_OUTPUTS = ("o_proj", "out_proj", "proj", "projection_layer")  # in this order: some towers have several


@dataclass(frozen=True, eq=False)
class HeadLayer:
    """One attention module with its heads.

    Attributes:
        module: The attention module.
        output: Its output projection; query head h enters the columns h * head_dim to (h + 1) * head_dim.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Channels of a head.
    """

    module: nn.Module
    output: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int


def head_layers(model: nn.Module, modules: str = "language") -> dict[str, HeadLayer]:
    """The attention modules whose heads can be scored, by path, in order of execution.

    Args:
        model: A language model, a tower or a whole vision-language model.
        modules: "language": the layers of the language model; "vision": the layers of the tower that the host reads.

    Raises:
        RecipeError: `modules` is unknown, or two layers share a module or a weight.
        ObservationError: The model has no such layer.
    """
    if modules == "language":
        names = decoder_layers(model)
    elif modules == "vision":
        names = tuple(attention_modules(model, "vision"))[: find_tower(model).used_layers]
    else:
        raise RecipeError(f"modules={modules!r} must be 'language' or 'vision'.")
    inside = {name: model.get_submodule(name) for name in names}
    _refuse_shared(model, inside)
    return {name: head_layer(name, module) for name, module in inside.items()}


def model_identity(model: nn.Module, layers: Mapping[str, HeadLayer]) -> dict[str, str]:
    """Identifies a model by its class, its name, and a digest of its attention weights.

    Args:
        model: The model.
        layers: From `head_layers`.

    Returns:
        "class", "name" (of a local folder only its last part) and "weights".
    """
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    name = Path(name).name if Path(name).exists() else name
    digest = weights_digest({path: layer.module for path, layer in layers.items()})
    return {"class": type(model).__name__, "name": name, "weights": digest}


def head_layer(name: str, module: nn.Module) -> HeadLayer:
    """Reads the heads of an attention module from its projections.

    Args:
        name: Its path, for messages.
        module: The module.

    Raises:
        RecipeError: It has no output projection with a known name.
    """
    output = next((getattr(module, n) for n in _OUTPUTS if isinstance(getattr(module, n, None), nn.Module)), None)
    width = getattr(output, "in_features", None)
    if output is None or width is None:
        raise RecipeError(
            f"{name} ({type(module).__name__}) has no output projection that is known ({', '.join(_OUTPUTS)}): its "
            "heads cannot be told apart."
        )
    size = getattr(module, "head_dim", None) or width // int(getattr(module, "num_heads", 1))
    keys: Any = getattr(module, "k_proj", None)
    groups = width if keys is None else keys.out_features
    return HeadLayer(module, output, width // size, groups // size, size)


def _refuse_shared(model: nn.Module, inside: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    wanted = {id(module) for module in inside.values()}
    paths = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if id(m) in wanted]
    for path, module in paths:
        for thing in (module, *module.parameters()):
            first = owners.setdefault(id(thing), path)
            if first != path:
                raise RecipeError(
                    f"{first} and {path} share {'a weight' if isinstance(thing, nn.Parameter) else 'one module'}: "
                    "heads pruned in one would be missing in the other. Untie them first (copy.deepcopy of one)."
                )


def weights_digest(modules: Mapping[str, nn.Module]) -> str:
    """Digest of names, shapes and some entries of each weight, in bfloat16: the same for any dtype of loading."""
    digest = hashlib.sha256()
    for path, module in modules.items():
        for name, parameter in module.named_parameters():
            flat = parameter.detach().flatten()
            # With integers: float32 is not exact above 2^24, and large weights have more entries.
            count = min(_SAMPLED, flat.numel())
            chosen = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
            values = flat[chosen].to(torch.bfloat16).float().cpu()
            digest.update(f"{path}.{name} {tuple(parameter.shape)} {values.tolist()}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def entering(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Context in which `see` gets the input of each module (e.g. of output projections), and may replace it.

    Args:
        modules: Modules by name.
        see: Function of a name and the first positional input; a returned tensor replaces the input.
    """

    def hook(name: str) -> Callable[..., Any]:
        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = see(name, args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)

        return run

    with attached_while("heads") as attach:
        for name, module in modules.items():
            attach(module, None, pre=hook(name))
        yield
