"""Hosts, data, training and evaluation: what a person runs rather than imports."""

if __name__ != "sfa_adapters.recipes":
    raise ImportError("Import sfa_adapters.recipes, not recipes. Run: pip install -e .")
