"""Tokenizers of the nano hosts: `nano_tokenizer` for bare models, `host_tokenizer` for the processors of whole hosts.

Both know single characters, and the fixed parts of the questions as one token each. `host_tokenizer` knows bytes for
every other character, so that Korean is encoded too; the chat templates have the turns of the full-size hosts.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerFast

from sfa_adapters.recipes.synthetic.questions import PHRASES

__all__ = [
    "CHATML",
    "CONTENT",
    "EOS",
    "IMAGE",
    "PAD",
    "PLAIN",
    "VICUNA",
    "VIDEO",
    "host_tokenizer",
    "nano_tokenizer",
    "token_id",
]

SPECIAL = ("<pad>", "<eos>", "<unk>", "<image>", "<video>")
PAD, EOS, UNKNOWN, IMAGE, VIDEO = range(len(SPECIAL))

# `PICTURE` stands for the placeholder of an image.
_PART = "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}"
CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}" + _PART + "{% endfor %}{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}" + CONTENT + "<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'] | upper }}: " + CONTENT + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# The weights of the nano LLaVA-OneVision were trained on bare questions.
PLAIN = (
    "{% for message in messages %}" + CONTENT + "{{ '<eos>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)


def nano_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer: printable ASCII, the line break, and one token for each of the fixed question parts."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL, "\n", *(chr(c) for c in range(32, 127)), *(p for p in PHRASES if len(p) > 1)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[UNKNOWN]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(p, normalized=False) for p in PHRASES if len(p) > 1])
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=list(SPECIAL[3:]), clean_up_tokenization_spaces=False, **names
    )


def host_tokenizer(end: str, specials: tuple[str, ...], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """The characters of `nano_tokenizer` under the same ids, then 256 bytes, then the special tokens of the host.

    Args:
        end: The token that ends a turn.
        specials: Other special tokens.
        named: Special tokens that the processor of the host reads by name, e.g. `image_token`.

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
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number
