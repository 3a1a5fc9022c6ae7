"""The records of vision-language models: registered, found by entry point, and looked up by name or by model.

Modules named in the entry-point group `sfa_adapters.hosts` are imported when a record is first looked up, so others
add hosts in packages of their own. A module registers its record when it is imported.
"""

from __future__ import annotations

import copyreg

from torch import nn

from sfa_adapters.class_names import matches
from sfa_adapters.errors import RecipeError
from sfa_adapters.plugins import load_entry_points
from sfa_adapters.vlm.parts import plain_model
from sfa_adapters.vlm.spec import FEATURES, Feature, VLMSpec

__all__ = ["check_allowed", "find_spec", "register_vlm", "registered_vlms", "vlm_spec"]

ENTRY_POINT_GROUP = "sfa_adapters.hosts"

_SPECS: dict[str, VLMSpec] = {}
_loaded_entry_points: set[str] = set()


def register_vlm(spec: VLMSpec) -> VLMSpec:
    """Adds the record of a kind of vision-language model.

    Args:
        spec: The record.

    Returns:
        The same record.

    Raises:
        RecipeError: Its name is taken, or it refuses a feature that does not exist.
    """
    if spec.name in _SPECS:
        raise RecipeError(f"A host named {spec.name!r} is registered already; choose another name.")
    unknown = sorted(set(spec.refuses) - set(FEATURES))
    if unknown:
        raise RecipeError(f"The record {spec.name!r} refuses {unknown[0]!r}; it can refuse {', '.join(FEATURES)}.")
    _SPECS[spec.name] = spec
    return spec


def registered_vlms() -> dict[str, VLMSpec]:
    """All records by name, those of installed packages included."""
    load_entry_points(ENTRY_POINT_GROUP, _loaded_entry_points)
    return dict(_SPECS)


def vlm_spec(name: str) -> VLMSpec:
    """The record of a name.

    Args:
        name: The name, as `family` of a recipe.

    Raises:
        RecipeError: There is none; names those that there are.
    """
    specs = registered_vlms()
    if name not in specs:
        raise RecipeError(
            f"family={name!r} is not registered; there are {', '.join(specs)}. A host of your own: "
            "docs/adding_a_host.md."
        )
    return specs[name]


def find_spec(model: nn.Module) -> VLMSpec | None:
    """The record that a live model fits, by its class or that of the core inside it; None where none does.

    Args:
        model: A host, the core that joins its tower and its language model, or a wrapper of PEFT around them.
    """
    specs = registered_vlms().values()
    inner = plain_model(model)
    for module in (inner, *inner.children()):
        for spec in specs:
            if matches(module, spec.classes):
                return spec
    return None


def check_allowed(model: nn.Module, feature: Feature, error: type[Exception] = RecipeError) -> None:
    """Raises where the record of a model refuses a feature; a model without a record passes.

    Args:
        model: As for `find_spec`.
        feature: The feature.
        error: Class of the error.

    Raises:
        Exception: Of the given kind, with the reason of the record.
    """
    spec = find_spec(model)
    reason = None if spec is None else spec.refuses.get(feature)
    if reason is not None:
        assert spec is not None
        raise error(f"{spec.title}: {reason}")


def _by_name(spec: VLMSpec) -> tuple[object, tuple[str]]:
    if _SPECS.get(spec.name) is not spec:
        raise RecipeError(
            f"This is no record of a host that is registered as {spec.name!r}, so a name would not bring it back. Give "
            "it a name of its own and call register_vlm."
        )
    return vlm_spec, (spec.name,)


# Records hold functions: they are pickled and copied as their names.
copyreg.pickle(VLMSpec, _by_name)  # pyright: ignore[reportArgumentType]
