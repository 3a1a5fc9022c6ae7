"""Serving trained adapters: plug-ins for vLLM and SGLang, and what they share. See docs/serving.md."""
