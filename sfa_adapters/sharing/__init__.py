"""Sharing: the model card, the hub, and a standalone folder with the bias baked in."""

from sfa_adapters.moved import old_names
from sfa_adapters.sharing.card import model_card
from sfa_adapters.sharing.export import BakedExport, export_baked
from sfa_adapters.sharing.hub import Shared, fetch, push_to_hub, share, write_card
from sfa_adapters.sharing.run_metadata import RunMetadata, describe_hardware, read_run_metadata, write_run_metadata

__all__ = [
    "BakedExport",
    "RunMetadata",
    "Shared",
    "describe_hardware",
    "export_baked",
    "fetch",
    "model_card",
    "push_to_hub",
    "read_run_metadata",
    "share",
    "write_card",
    "write_run_metadata",
]

__getattr__ = old_names(__name__)
