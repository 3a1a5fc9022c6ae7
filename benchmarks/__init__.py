"""Benchmarks: run as modules from the top of the repository, e.g. `python -m benchmarks.encoder --help`."""
