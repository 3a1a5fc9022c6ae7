"""The backbones that come with sfa_adapters: one file per kind of tower, found through the entry-point group."""

if __name__ != "sfa_adapters.backbones":
    raise ImportError("Import sfa_adapters.backbones, not backbones. Run: pip install -e .")
