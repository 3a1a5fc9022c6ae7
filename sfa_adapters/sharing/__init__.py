"""Sharing of adapters: the model card, upload to the hub, and a standalone export with the bias as buffers."""

from sfa_adapters.sharing.card import model_card
from sfa_adapters.sharing.export import BakedExport, export_baked
from sfa_adapters.sharing.facts import RunFacts, describe_hardware, read_facts, write_facts
from sfa_adapters.sharing.hub import Shared, fetch, push_to_hub, share, write_card

__all__ = [
    "BakedExport",
    "RunFacts",
    "Shared",
    "describe_hardware",
    "export_baked",
    "fetch",
    "model_card",
    "push_to_hub",
    "read_facts",
    "share",
    "write_card",
    "write_facts",
]
