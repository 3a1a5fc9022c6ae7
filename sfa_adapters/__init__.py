"""Structural attention bias for the vision tower of any vision-language model.

The names below are imported when they are first used (PEP 562), so that `import sfa_adapters` and `sfa --help` do not
wait for torch. Once SFA is used, or where PEFT is imported already, SFA is registered as a PEFT method.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from sfa_adapters.attention import attend
    from sfa_adapters.axial_ramp import AxialRamp
    from sfa_adapters.bias import StructuralBias
    from sfa_adapters.config import SFAConfig
    from sfa_adapters.errors import SFAError
    from sfa_adapters.heads.axial_heads import calibrate_axial
    from sfa_adapters.hooks import features_of
    from sfa_adapters.inject import describe, eject_sfa, inject_sfa, load_sfa, save_sfa
    from sfa_adapters.layout import TokenLayout
    from sfa_adapters.module import SFAAttention
    from sfa_adapters.observe import observe
    from sfa_adapters.rate_check import check_rates
    from sfa_adapters.rates import largest_scalars, sfa_parameter_groups
    from sfa_adapters.registry import Backbone, register_backbone
    from sfa_adapters.trainer import SFATrainerMixin

__version__ = "0.1.0"

__all__ = [
    "AxialRamp",
    "Backbone",
    "SFAAttention",
    "SFAConfig",
    "SFAError",
    "SFATrainerMixin",
    "StructuralBias",
    "TokenLayout",
    "attend",
    "calibrate_axial",
    "check_rates",
    "describe",
    "eject_sfa",
    "features_of",
    "inject_sfa",
    "largest_scalars",
    "load_sfa",
    "observe",
    "register_backbone",
    "save_sfa",
    "sfa_parameter_groups",
]

_MODULES = {
    "attention": ("attend",),
    "axial_ramp": ("AxialRamp",),
    "bias": ("StructuralBias",),
    "config": ("SFAConfig",),
    "errors": ("SFAError",),
    "heads.axial_heads": ("calibrate_axial",),
    "hooks": ("features_of",),
    "inject": ("describe", "eject_sfa", "inject_sfa", "load_sfa", "save_sfa"),
    "layout": ("TokenLayout",),
    "module": ("SFAAttention",),
    "observe": ("observe",),
    "rate_check": ("check_rates",),
    "rates": ("largest_scalars", "sfa_parameter_groups"),
    "registry": ("Backbone", "register_backbone"),
    "trainer": ("SFATrainerMixin",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
# Registers SFA with PEFT when it is imported.
_PEFT_METHOD = "sfa_adapters.peft_tuner"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "SFAConfig":
        import_module(_PEFT_METHOD)
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    # The import above may have loaded the module `observe`, which sets this package's attribute to the module.
    if "sfa_adapters.observe" in sys.modules:
        globals()["observe"] = sys.modules["sfa_adapters.observe"].observe
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _OldPaths:
    """Finder of last resort: imports modules by the paths that they had before they moved."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """See `sfa_adapters.moved`."""
        if not name.startswith(f"{__name__}."):
            return None
        from sfa_adapters.moved import spec_of

        return spec_of(name)


sys.meta_path.append(_OldPaths)
# Where PEFT is imported already, torch is too, and `PeftModel.from_pretrained` may follow without another import of
# this package.
if "peft" in sys.modules:
    import_module(_PEFT_METHOD)
