"""Sharing of adapters: the model card, upload to the hub, and a standalone export with the bias as buffers."""

from sfa_adapters.moved import know_old_names
from sfa_adapters.sharing.card import model_card
from sfa_adapters.sharing.engine_export import EngineExport, export_for_engine
from sfa_adapters.sharing.export import BakedExport, export_baked
from sfa_adapters.sharing.hub import Shared, fetch, push_to_hub, share, write_card
from sfa_adapters.sharing.run_metadata import RunMetadata, describe_hardware, read_run_metadata, write_run_metadata

__all__ = [
    "BakedExport",
    "EngineExport",
    "RunMetadata",
    "Shared",
    "describe_hardware",
    "export_baked",
    "export_for_engine",
    "fetch",
    "model_card",
    "push_to_hub",
    "read_run_metadata",
    "share",
    "write_card",
    "write_run_metadata",
]

know_old_names(__name__)  # `RunFacts`, `read_facts`, `write_facts`
