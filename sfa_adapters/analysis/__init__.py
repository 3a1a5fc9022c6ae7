"""Measurements of attention and answers (entropy, MDI and AEI, maps, hallucination), each with a table and a figure."""

from sfa_adapters.analysis.dominance import modality_dominance
from sfa_adapters.analysis.dominance_report import DominanceReport
from sfa_adapters.analysis.entropy import attention_entropy
from sfa_adapters.analysis.entropy_report import EntropyReport, compare_entropy, entropy_change
from sfa_adapters.analysis.hallucination import HallucinationReport, hallucination_report
from sfa_adapters.analysis.map_figures import plot_maps
from sfa_adapters.analysis.maps import AttentionMap, attention_map, attention_rollout

__all__ = [
    "AttentionMap",
    "DominanceReport",
    "EntropyReport",
    "HallucinationReport",
    "attention_entropy",
    "attention_map",
    "attention_rollout",
    "compare_entropy",
    "entropy_change",
    "hallucination_report",
    "modality_dominance",
    "plot_maps",
]
