"""What `sfa analyze` does: measurements that end in a table and pictures."""

from sfa_adapters.moved import old_names

__getattr__ = old_names(__name__)
