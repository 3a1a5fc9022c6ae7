"""The host contract suite over every record of a vision-language model."""

from sfa_adapters.testing.test_hosts import HOST_CLASSES, test_every_record_has_a_small_model

__all__ = ["test_every_record_has_a_small_model"]

globals().update(HOST_CLASSES)
