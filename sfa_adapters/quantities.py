"""Quantities in texts: a number as people write it, its scale ("12K", "1.5 million", "3만 5천") and its unit."""

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sfa_adapters.number_words import ENGLISH, english_value, korean_value
from sfa_adapters.units import COUNTERS, LABELS, YEAR, unit_name

__all__ = ["Quantity", "fold", "quantities_in", "quantity_of"]

_CURRENCY = r"(?:US)?[$£¥\u20a0-\u20cf]|\b(?:USD|KRW|EUR|GBP|JPY|CNY|RMB|INR)(?= ?[-+.\d])"
_PLAIN = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+"
_KOREAN_PART = r"\d+(?:,\d{3})*(?:\.\d+)? ?(?:[천백][만억조]?|[만억조])"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<currency>{_CURRENCY}) ?(?P<inner>[-+]?))?(?:"
    rf"(?P<korean>{_KOREAN_PART}(?: ?{_KOREAN_PART})*(?: ?\d{{1,3}},?\d{{1,3}}(?!\d|[.,]\d)|\d+(?!\d|[.,]\d))?)"
    r"|(?P<grouped>[1-9]\d{0,2}(?: \d{3})+(?!\d)(?:\.\d+)?)"
    rf"|(?P<digits>{_PLAIN})(?P<power>[eE][-+]?\d{{1,3}}(?!\d))?"
    rf"|(?P<words>(?<![\w-])(?i:{ENGLISH})(?![\w-])))"
    r"(?P<scale> ?(?i:thousand|million|billion|trillion|mln|bln|mn|bn|tn)(?![A-Za-z0-9])| ?[KkMBbT](?![A-Za-z0-9/]))?"
    r"(?P<percent> ?(?:%p(?![A-Za-z])|%))?"
)
_SCALES = {"thousand": 3, "k": 3, "million": 6, "mln": 6, "mn": 6, "m": 6, "billion": 9, "bln": 9, "bn": 9, "b": 9}
_SCALES |= {"trillion": 12, "tn": 12, "t": 12, "": 0}
_KOREAN_SCALES = {"": 0, "백": 2, "천": 3, "만": 4, "억": 8, "조": 12}
_YEAR = re.compile(r"1[5-9]\d\d|20\d\d")
# Full-width forms of ASCII, and the other ways to write a minus sign and a space.
_FOLDED = {0xFF01 + i: 0x21 + i for i in range(94)} | {0xFFE6: 0x20A9, 0xFFE5: 0xA5, 0xFFE1: 0xA3, 0x3002: 0x2E}
_FOLDED |= dict.fromkeys((0x2212, 0x2010, 0x2011, 0x2012, 0x2013, 0xFE63), ord("-"))


@dataclass(frozen=True)
class Quantity:
    """One number in a text, with its unit.

    Attributes:
        value: with its sign and scale; of "1.5 million" 1,500,000; of "25%" 25. Infinite where it is too large.
        digits: without its scale, as it is written; of "1.5 million" 1.5. NaN for numbers in words.
        hundredth: the value over 100, rounded once: a percentage as a fraction.
        unit: "" where there is none; see `unit_name`.
        bracketed: whether the whole text is in brackets, "(12)", which may be 12 or -12.
        exact: whether it is a year, or names something ("3rd"), so that no tolerance applies.
        parts: the numbers that the text may also mean, such as 1 and 510 for "1 510".
    """

    value: float
    digits: float
    hundredth: float
    unit: str = ""
    bracketed: bool = False
    exact: bool = False
    parts: tuple["Quantity", ...] = ()


def fold(text: str) -> str:
    """Normalises a text: composed letters, full-width forms as ASCII, one minus sign, one kind of space."""
    text = unicodedata.normalize("NFC", text).translate(_FOLDED)
    return re.sub(r"[^\S\n\t]", " ", text)  # lines and columns stay apart


def quantities_in(text: str) -> Iterator[Quantity]:
    """Yields all quantities in a running text, from left to right.

    Digits behind a Latin letter belong to a word ("COVID19"). Scripts that put no space between words (Hangul, Han,
    Kana) do not hide them ("총12명"). A dash between two numbers is no sign. "One" alone is no number in a sentence.
    """
    text = fold(text)
    for match in _NUMBER.finditer(text):
        before = text[match.start() - 1] if match.start() else " "
        if (match["words"] or "").lower() == "one" and not match["scale"]:
            continue
        dash = bool(match["sign"]) and (before.isalnum() or before == "%")
        # Scripts with case put spaces between words; "Lo" are letters of scripts without case.
        word = before.isalpha() and unicodedata.category(before) != "Lo"
        if match["currency"] or (not word and (dash or not before.isnumeric())):
            yield from _quantities(match, positive=dash)


def quantity_of(text: str) -> Quantity | None:
    """The quantity that a whole text is; None where it is not exactly one.

    Args:
        text: an answer such as "$1,234.5", "45 %", "-3", "12,000원", "12 years", "(12)" or "One thousand".

    Returns:
        The quantity with its unit; None where the text is more or less than one number.
    """
    text = fold(text).strip().removesuffix(".").strip()
    if text.startswith("(") and text.endswith(")"):
        inner = quantity_of(text[1:-1])
        return None if inner is None or inner.bracketed else replace(inner, bracketed=True)
    if match := re.match(r"([-+]?)\(([^()]*)\)$", text):  # "-(12)"
        return quantity_of(match[1] + match[2])
    words = _in_korean_words(text)
    match = _NUMBER.match(text)
    if match is None or words is not None:
        return words
    behind = unit_name(text[match.end() :])
    if behind is None or (behind and match["percent"]):
        return None
    currency = (match["currency"] or "").lower().removeprefix("us$")
    written = "$" if match["currency"] == "US$" else "%" if match["percent"] else unit_name(f" {currency}") or ""
    if written and behind and written != behind:
        # "$12 people" is no quantity; "$12 million" is, and so is "₩12,000원".
        return None
    if len(quantities := _quantities(match)) != 1:
        return None
    unit, quantity = written or behind, quantities[0]
    plain = match["digits"] and not match["scale"] and not match["power"]
    year = bool(plain and _YEAR.fullmatch(match["digits"]) and unit in ("", YEAR))
    return replace(quantity, unit=unit, exact=year or unit in LABELS)


def _in_korean_words(text: str) -> Quantity | None:
    match = re.fullmatch(rf"([가-힣 ]+?) ?({COUNTERS})?", text)
    if match is None:
        return None
    for word, counter in ((text, ""), (match[1], match[2] or "")):
        # Native numbers stand apart from their counter: "한국" is not one of something.
        value = korean_value(word, counted=f"{word} {counter}" == text)
        if value is not None and (counter == "" or " " in text or len(word) > 1):
            return Quantity(float(value), float("nan"), value / 100, unit_name(counter) or "")
    return None


def _quantities(match: re.Match[str], positive: bool = False) -> tuple[Quantity, ...]:
    """The one number that was matched, or several: "3만 2만" is two."""
    sign = -1.0 if "-" in match["sign"] + (match["inner"] or "") and not positive else 1.0
    scale = _SCALES[(match["scale"] or "").strip().lower()]
    unit = "%" if match["percent"] else ""
    if match["words"]:
        value = sign * english_value(match["words"]) * 10**scale
        return (Quantity(value, float("nan"), value / 100, unit),)
    if match["korean"]:
        parts, one = _korean_parts(match["korean"])
        if not one:
            return parts
        value = sign * math.fsum(part.value for part in parts) * 10**scale
        digits = sign * parts[0].digits if len(parts) == 1 else float("nan")
        return (Quantity(value, digits, value / 100, unit, parts=parts if len(parts) > 1 else ()),)
    written = (match["grouped"] or match["digits"]).replace(",", "")
    digits, power = written.replace(" ", ""), scale + int((match["power"] or "e0")[1:])
    # Powers of ten are put into the text, so that "24.9%" over 100 and "0.249" are the same float.
    value, plain, hundredth = (sign * float(f"{digits}e{p}") for p in (power, power - scale, power - 2))
    groups = tuple(quantities_in(written.replace(" ", " / "))) if match["grouped"] else ()
    return (Quantity(value, plain, hundredth, unit, parts=groups),)


def _korean_parts(text: str) -> tuple[tuple[Quantity, ...], bool]:
    """The parts of "3천 5백만", here 30,000,000 and 5,000,000, and whether they form one number.

    They do if each is smaller than the unit of the one before.
    """
    written = re.findall(r"(\d+(?:,\d{3})*(?:\.\d+)?) ?([천백]?)([만억조]?)", text)
    parts: list[Quantity] = []
    exponents: list[int] = []
    group = 0  # 만, 억 or 조 scales all parts in front of it, so parts are read from the end
    for digits, small, big in reversed(written):
        group = _KOREAN_SCALES[big] if big else group
        exponents.insert(0, _KOREAN_SCALES[small] + group)
        number = digits.replace(",", "")
        value = float(f"{number}e{exponents[0]}")
        parts.insert(0, Quantity(value, float(number), value / 100))
    return tuple(parts), all(p.value < 10**e for p, e in zip(parts[1:], exponents, strict=False))
