"""What `sfa demo` does."""

from sfa_adapters.moved import old_names

__getattr__ = old_names(__name__)
