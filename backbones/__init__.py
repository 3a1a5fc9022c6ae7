"""The towers that come with sfa_adapters, one file each, found through the entry-point group of the same name."""

if __name__ != "sfa_adapters.backbones":
    raise ImportError("Import sfa_adapters.backbones, not backbones. Run: pip install -e .")
