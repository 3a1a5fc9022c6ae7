"""`Prompt`: puts a question into the host's chat template, and keeps texts from becoming control tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.thinking import without_thinking

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["Prompt"]

QUESTION, ANSWER = "QUESTIONGOESHERE", "ANSWERGOESHERE"
CONTROLS = ("image_token", "video_token", "start_image_token", "end_image_token", "image_placeholder")


class Prompt:
    """The chat template of a host around a question, and its tokens.

    Args:
        processor: The host's processor.
        question: Text of the user's turn, in which `{question}` stands for the question.

    Attributes:
        head: Rendered text before the question, with the image.
        tail: Rendered text after it, up to the answer.
        adds_special: Whether the tokenizer must add its own tokens at the start, because the template does not.
        end_id: Id of the token that ends an answer.
        pad_id: Id of the padding token.
        image_id: Id of the image token.

    Raises:
        RecipeError: The processor has no tokenizer, or its template has no place for an image and a question.
    """

    def __init__(self, processor: ProcessorMixin, question: str) -> None:
        tokenizer: Any = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise RecipeError(f"{type(processor).__name__} has no tokenizer; load it from the host with AutoProcessor.")
        self.tokenizer, self.question = tokenizer, question
        self.image_token: str = getattr(processor, "image_token", "<image>")
        image_id = getattr(processor, "image_token_id", None)
        self.image_id: int = tokenizer.convert_tokens_to_ids(self.image_token) if image_id is None else image_id
        rendered = _rendered(processor, self.image_token, answered=False)
        if rendered.count(QUESTION) != 1 or rendered.partition(QUESTION)[0].count(self.image_token) != 1:
            raise RecipeError(
                f"The chat template of {type(processor).__name__} must write one {self.image_token} in front of the "
                f"question, it writes {rendered!r}. Load the processor that belongs to the host."
            )
        self.head, _, self.tail = rendered.partition(QUESTION)
        bos = tokenizer.bos_token
        self.adds_special = not (bos and rendered.startswith(bos))
        self._controls = _pattern(processor, tokenizer)
        self.end_id = self._end(processor)
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def pieces(self, question: str) -> tuple[str, list[int]]:
        """Makes the prompt of one question.

        A control token that the question spells out ("<image>", the end of a turn) is cut in two, and its halves are
        tokenized separately: the host reads the letters, never the token.

        Args:
            question: The question.

        Returns:
            The text for the processor, and the ids that follow it; these are empty unless a token was cut.
        """
        parts = self._cut(self.question.replace("{question}", question))
        parts[0] = self.head + parts[0]
        parts[-1] += self.tail
        return parts[0], [i for part in parts[1:] for i in self._encode(part)]

    def ids(self, text: str) -> list[int]:
        """Tokenizes a text so that no control token is among the ids."""
        return [i for part in self._cut(text) for i in self._encode(part)]

    def _cut(self, text: str) -> list[str]:
        parts, start = [], 0
        for match in self._controls.finditer(text):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [*parts, text[start:]]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end(self, processor: ProcessorMixin) -> int:
        """Id of the control token that the template writes after an answer, else of the tokenizer's end token."""
        after = _rendered(processor, self.image_token, answered=True).partition(ANSWER)[2]
        control_match = self._controls.match(after.lstrip())
        token = control_match[0] if control_match else self.tokenizer.eos_token
        if token is None:
            raise RecipeError("The tokenizer has no token that ends a text (eos_token), and the template writes none.")
        return self.tokenizer.convert_tokens_to_ids(token)


def _rendered(processor: ProcessorMixin, image_token: str, answered: bool) -> str:
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not template:
        return f"{image_token}\n{QUESTION}\n{ANSWER if answered else ''}"
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    turns = [user, reply] if answered else [user]
    return str(
        processor.apply_chat_template(
            turns, add_generation_prompt=not answered, tokenize=False, **without_thinking(processor)
        )
    )


def _pattern(processor: ProcessorMixin, tokenizer: Any) -> re.Pattern[str]:
    """Pattern of all texts that are control tokens, longest first."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    named = (getattr(owner, name, None) for name in CONTROLS for owner in (processor, tokenizer))
    texts = {*added, *tokenizer.all_special_tokens, *(text for text in named if isinstance(text, str))}
    longest = sorted((text for text in texts if len(text) > 1), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")
