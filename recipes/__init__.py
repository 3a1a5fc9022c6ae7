"""Recipes, studies, benchmarks and demos: programs to run rather than modules to import."""

if __name__ != "sfa_adapters.recipes":
    raise ImportError("Import sfa_adapters.recipes, not recipes. Run: pip install -e .")
