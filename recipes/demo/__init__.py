"""What `sfa demo` does."""
