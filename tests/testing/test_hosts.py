"""The contract of whole models, for every record of the library."""

from sfa_adapters.testing.hosts import VLMContract
from sfa_adapters.vlm.records import registered_vlms

# One class for each record, so that a failure names it.
for _name in registered_vlms():
    _class = f"Test{_name.title().replace('_', '')}"
    globals()[_class] = type(_class, (VLMContract,), {"family": _name, "__module__": __name__})
