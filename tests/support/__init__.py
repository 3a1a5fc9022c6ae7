"""Shared parts of tests: small models, references, comparisons, programs that tests start."""
