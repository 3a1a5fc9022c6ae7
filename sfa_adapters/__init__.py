"""Structural attention bias for the vision tower of any vision-language model."""

from sfa_adapters.attention import attend
from sfa_adapters.bias import StructuralBias
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import SFAError
from sfa_adapters.inject import describe, eject_sfa, inject_sfa, load_sfa, save_sfa
from sfa_adapters.layout import TokenLayout
from sfa_adapters.module import SFAAttention
from sfa_adapters.observe import observe
from sfa_adapters.registry import Backbone, register_backbone

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "SFAAttention",
    "SFAConfig",
    "SFAError",
    "StructuralBias",
    "TokenLayout",
    "attend",
    "describe",
    "eject_sfa",
    "inject_sfa",
    "load_sfa",
    "observe",
    "register_backbone",
    "save_sfa",
]
