"""The measurements of `sfa analyze`, each with a table and figures as its result."""

from sfa_adapters.moved import old_names

__getattr__ = old_names(__name__)
