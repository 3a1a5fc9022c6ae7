"""ADAT, adaptive density-aware tokenization: small patches where text is dense, large ones where the page is empty."""

from sfa_adapters.adat.density import DensityEstimator
from sfa_adapters.adat.groups import GroupPolicy, drop_blank_groups
from sfa_adapters.adat.inject import eject_adat, inject_adat, latest_plans, token_padding
from sfa_adapters.adat.labels import density_labels
from sfa_adapters.adat.plan import PatchPlan
from sfa_adapters.adat.policy import PatchPolicy
from sfa_adapters.adat.tokenizer import AdaptiveTokenizer

__all__ = [
    "AdaptiveTokenizer",
    "DensityEstimator",
    "GroupPolicy",
    "PatchPlan",
    "PatchPolicy",
    "density_labels",
    "drop_blank_groups",
    "eject_adat",
    "inject_adat",
    "latest_plans",
    "token_padding",
]
