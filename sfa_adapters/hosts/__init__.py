"""Base models (VLMs) for training and answering: recipe, loading, placement on devices, adapters."""
