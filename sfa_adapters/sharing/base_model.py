"""Loads any base model of transformers with an SFA adapter, for exports of adapters without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.inject import load_sfa

__all__ = ["load_adapted"]


def load_adapted(model: str, adapter: str | Path, revision: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Loads a base model by the class that its configuration names, and the adapter into it.

    Args:
        model: Hub id or local folder, of a whole model or a bare tower.
        adapter: Folder of the adapter.
        revision: Revision of the base.

    Returns:
        The model in eval mode, and `base_model` and `revision` for the card.

    Raises:
        RecipeError: The model cannot be loaded without code of its own.
        WeightsError: A file of the adapter is missing.
        AdapterMismatchError: It belongs to another tower.
    """
    import transformers

    pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False, **pinned)
        name = next(iter(config.architectures or ()), None)
        kind = getattr(transformers, name, None) if name else None
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise RecipeError(
                f"model={model!r} is a {name or config.model_type}, which transformers has no class for. Take the "
                "variant of the model that needs no code of its own (its name often ends in -HF)."
            )
        loaded: Any = kind.from_pretrained(model, dtype="auto", use_safetensors=True, **pinned)
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RecipeError(f"model={model!r} cannot be loaded: {first}") from error
    return load_sfa(loaded.eval(), adapter), {"base_model": model, "revision": revision}
