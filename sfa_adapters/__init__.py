"""Structural attention bias for the vision tower of any vision-language model."""

__version__ = "0.1.0"
