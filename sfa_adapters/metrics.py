"""Answer metrics. `relaxed_accuracy` is the one of ChartQA: numbers may be 5% off, everything else must match."""

import math
import re
from typing import Literal, get_args

__all__ = ["RelaxedMode", "numbers_in", "parse_number", "relaxed_accuracy"]

RelaxedMode = Literal["reference", "strict"]
TOLERANCE = 0.05
# A number as people write it: sign, currency, thousands separators, exponent, percent.
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)[$\u20ac\u00a3\u00a5]?(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?P<power>[eE][-+]?\d+)?"
    r"\s?(?P<percent>%?)"
)
_YEAR = re.compile(r"1[5-9]\d\d|20\d\d")


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


def _value(match: re.Match[str]) -> float:
    value = float(match["digits"].replace(",", "") + (match["power"] or ""))
    return -value if match["sign"] in ("-", "\u2212") and match["sign"] else value


def _reference_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, target: str, mode: RelaxedMode = "reference") -> bool:
    """Whether an answer is right in the sense of ChartQA.

    Args:
        prediction: what the model said.
        target: the true answer.
        mode: "reference" gives what the published code gives, bugs included: years may be 5% off, "25%" is 0.25,
            "1,234" and "$12" are not numbers, a zero target is compared as text, and text must match up to case.
            "strict" understands separators, currency and percent, wants years and zero exactly, and ignores outer space
            and a final dot.

    Returns:
        True where it counts as right.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in get_args(RelaxedMode):
        raise ValueError(f"Unknown mode {mode!r}. Use 'reference' or 'strict'.")
    if mode == "reference":
        said, true = _reference_float(prediction), _reference_float(target)
        if said is not None and true:
            return abs(said - true) / abs(true) <= TOLERANCE
        return prediction.lower() == target.lower()
    said, true = parse_number(prediction), parse_number(target)
    if said is None or true is None:
        return _plain(prediction) == _plain(target)
    if true == 0 or _YEAR.fullmatch(target.strip()):
        return said == true
    return math.isfinite(said) and abs(said - true) / abs(true) <= TOLERANCE


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").strip()
