"""`without_thinking`: how a chat template that opens a thought is told not to."""

from __future__ import annotations

from typing import Any

__all__ = ["without_thinking"]


def without_thinking(processor: Any) -> dict[str, Any]:
    """The variable of a chat template that makes the answer follow at once (Qwen3.5); empty where it has none.

    Without it the answer would be learned inside a thought that the template has opened.

    Args:
        processor: The host's processor.
    """
    templates = (getattr(owner, "chat_template", None) for owner in (processor, getattr(processor, "tokenizer", None)))
    template = next((template for template in templates if template), "")
    return {"enable_thinking": False} if "enable_thinking" in str(template) else {}
