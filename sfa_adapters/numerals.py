"""Numbers in running text: what a person would read as a number, and its value."""

import re
from collections.abc import Iterable

__all__ = ["numbers_in", "parse_number", "unprinted_numbers"]

# A number as people write it: sign, currency, thousands separators, exponent, percent.
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)[$\u20ac\u00a3\u00a5]?(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?P<power>[eE][-+]?\d+)?"
    r"\s?(?P<percent>%?)"
)


def parse_number(text: str) -> float | None:
    """The number that a whole text is, or None.

    Understands thousands separators, one currency sign, a percent sign (dropped: "25%" is 25) and a final dot.

    Args:
        text: an answer such as "$1,234.5", "45 %" or "-3".

    Returns:
        Its value, None if it is not one number.
    """
    text = text.strip().removesuffix(".").strip()
    match = _NUMBER.fullmatch(text) or _NUMBER.fullmatch(re.sub(r"^([$\u20ac\u00a3\u00a5])([-+])", r"\2\1", text))
    return None if match is None else _value(match)


def numbers_in(text: str) -> list[float]:
    """All numbers in a text, from left to right; digits inside a word ("COVID19") do not count.

    A dash between two numbers ("1952-1957") is no sign.
    """
    found: list[float] = []
    for match in _NUMBER.finditer(text):
        before = text[match.start() - 1] if match.start() else " "
        if not before.isalnum():
            found.append(_value(match))
        elif before.isdigit() and match["sign"]:
            found.append(abs(_value(match)))
    return found


def unprinted_numbers(answer: str, printed: Iterable[str], signed: bool = False) -> list[float]:
    """Numbers of an answer that stand nowhere among printed texts.

    Both sides are read by `numbers_in`, and values must then be equal: "1,234" is on a page that prints "1234", "25" on
    one that prints "25%", 24.9 on neither.

    Args:
        answer: what a model said.
        printed: the texts on the image.
        signed: whether 3 differs from a printed -3. By default it does not: the digits stand there.

    Returns:
        These numbers, from left to right, as the answer gives them.
    """
    there = {n if signed else abs(n) for text in printed for n in numbers_in(text)}
    return [n for n in numbers_in(answer) if (n if signed else abs(n)) not in there]


def _value(match: re.Match[str]) -> float:
    value = float(match["digits"].replace(",", "") + (match["power"] or ""))
    return -value if match["sign"] in ("-", "\u2212") and match["sign"] else value
