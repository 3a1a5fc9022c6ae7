"""Measurements that end in a table and a figure."""

from sfa_adapters.analysis.dominance import modality_dominance
from sfa_adapters.analysis.dominance_report import DominanceReport
from sfa_adapters.analysis.entropy import attention_entropy
from sfa_adapters.analysis.entropy_report import EntropyReport
from sfa_adapters.analysis.hallucination import HallucinationReport, hallucination_report

__all__ = [
    "DominanceReport",
    "EntropyReport",
    "HallucinationReport",
    "attention_entropy",
    "hallucination_report",
    "modality_dominance",
]
