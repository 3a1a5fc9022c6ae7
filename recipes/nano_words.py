"""The words of the nano hosts: one tokenizer for all, and the turns as each full-size host writes them.

The tokenizer knows characters, and bytes for every other one, so that Korean is read too.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerFast

from sfa_adapters.recipes.encode import PAD, SPECIAL, UNKNOWN, nano_tokenizer
from sfa_adapters.recipes.questions import PHRASES

__all__ = ["CHATML", "PLAIN", "VICUNA", "host_tokenizer", "token_id"]

# `PICTURE` stands for what a host writes where an image goes.
_PART = "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}"
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}" + _PART + "{% endfor %}{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}" + _CONTENT + "<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'] | upper }}: " + _CONTENT + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# The weights of the nano LLaVA-OneVision were trained on bare questions.
PLAIN = (
    "{% for message in messages %}" + _CONTENT + "{{ '<eos>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)


def host_tokenizer(end: str, specials: tuple[str, ...], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """The characters of `nano_tokenizer` under the same ids, then 256 bytes, then the special tokens of the host.

    Args:
        end: The token that ends a turn.
        specials: Other special tokens.
        named: Those that the processor of the host asks for by name, e.g. `image_token`.

    Returns:
        The tokenizer. What it encodes, it decodes to the same text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    base = nano_tokenizer()
    pad, unknown = SPECIAL[PAD], SPECIAL[UNKNOWN]
    words = sorted(base.get_vocab(), key=base.get_vocab().__getitem__)
    vocabulary = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore[reportAttributeAccessIssue]
    added = [w for w in (*words, *specials, *named.values()) if len(w) > 1]
    core.add_tokens([AddedToken(w, normalized=False) for w in added if w in PHRASES])
    core.add_special_tokens([AddedToken(w, normalized=False) for w in added if w not in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        extra_special_tokens=dict(named),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found
