"""The contract suites, for records of towers and of whole models, in this library and outside of it."""
