"""The demo, `sfa demo`: fine-tuning of a nano host with and without SFA."""

from sfa_adapters.moved import old_names

__getattr__ = old_names(__name__)
