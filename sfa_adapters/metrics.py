"""Metrics that score one answer against the true answers. The score of a set is the mean over its answers.

`relaxed_accuracy` is the one of ChartQA, `anls` of DocVQA and InfographicVQA, `vqa_accuracy` of VQA and TextVQA,
`ocrbench` of OCRBench.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, get_args

from sfa_adapters.errors import DataError
from sfa_adapters.numerals import numbers_in, parse_number, unprinted_numbers
from sfa_adapters.quantities import Quantity, fold, quantity_of
from sfa_adapters.units import LABELS

__all__ = [
    "OCRBenchKind",
    "RelaxedMode",
    "anls",
    "exact_match",
    "numbers_in",
    "ocrbench",
    "parse_number",
    "relaxed_accuracy",
    "unprinted_numbers",
    "vqa_accuracy",
]

RelaxedMode = Literal["reference", "strict"]
OCRBenchKind = Literal["text", "handwritten_maths"]
TOLERANCE = 0.05
FEWEST = 4  # answers of `vqa_accuracy`: three others must be able to agree
_DIGITS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "none": "0",
}  # fmt: skip
# Contractions written without an apostrophe; those that are another word (well, were, ill, its) are left out.
_NOT = re.compile(r"(ai|are|ca|could|did|does|do|had|has|have|is|must|need|should|was|were|wo|would)nt")
_SHORT = re.compile(
    r"(he|she|that|there|what|where|who)(s)|(i)(m)|(i|you|they|could|should|would)(ve)|(you|they)(re|ll)"
)
_PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!|~^')  # that of the published code of VQA, and three more


def _reference_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, target: str, mode: RelaxedMode = "reference") -> bool:
    """Whether an answer is right by the relaxed accuracy of ChartQA: numbers may be 5% off.

    Args:
        prediction: the model's answer.
        target: the true answer.
        mode: "reference" gives what the published code gives, bugs included: years may be 5% off, "25%" is 0.25,
            "1,234" and "$12" are not numbers, a zero target is compared as text, and text must match up to case.
            "strict" reads numbers as people write them (`parse_number`), wants years, ranks and zero exactly, wants
            equal units where both have one, and ignores case, outer space and a final dot. "(12)" may be 12 or -12.

    Returns:
        Whether it counts as right.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in get_args(RelaxedMode):
        raise ValueError(f"Unknown mode {mode!r}. Use 'reference' or 'strict'.")
    if mode == "reference":
        predicted, true = _reference_float(prediction), _reference_float(target)
        if predicted is not None and true:
            return abs(predicted - true) / abs(true) <= TOLERANCE
        return prediction.lower() == target.lower()
    predicted, true = quantity_of(prediction), quantity_of(target)
    if predicted is None or true is None or not (math.isfinite(predicted.value) and math.isfinite(true.value)):
        return _plain(prediction) == _plain(target)
    return _same_quantity(predicted, true)


def _same_quantity(predicted: Quantity, true: Quantity) -> bool:
    if predicted.unit and true.unit and predicted.unit != true.unit:
        return False
    exact = true.exact or predicted.unit in LABELS
    # Brackets are a minus sign in accounting, and mean nothing elsewhere.
    pairs = [(a, b) for a in _readings(predicted) for b in _readings(true)]
    return any(a == b or (not exact and b != 0 and abs(a - b) / abs(b) <= TOLERANCE) for a, b in pairs)


def _readings(quantity: Quantity) -> tuple[float, ...]:
    return (quantity.value, -quantity.value) if quantity.bracketed else (quantity.value,)


def _plain(text: str) -> str:
    return _folded(fold(text)).removesuffix(".").strip()


def _accepted(answers: str | Sequence[str]) -> tuple[str, ...]:
    """All true answers as a tuple."""
    accepted = (answers,) if isinstance(answers, str) else tuple(answers)
    if not accepted or not all(isinstance(answer, str) for answer in accepted):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(f"answers={answers!r} must be a text, or a sequence of at least one text.")
    return accepted


def exact_match(prediction: str, answers: str | Sequence[str]) -> bool:
    """Whether an answer equals one of the true ones, apart from case and white space.

    Args:
        prediction: the model's answer.
        answers: the true answer, or all that count as right.

    Returns:
        Whether it does.

    Raises:
        DataError: there is no true answer.
    """
    return _folded(prediction) in {_folded(answer) for answer in _accepted(answers)}


def _folded(text: str) -> str:
    """Normalises a text for comparison: composed letters, single spaces, no case ("ß" equals "SS")."""
    text = unicodedata.normalize("NFC", text).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split())


def anls(prediction: str, answers: str | Sequence[str], threshold: float = 0.5) -> float:
    """Average normalized Levenshtein similarity of one answer (Biten et al. 2019, arXiv:1905.13648, eq. 1).

    s = 1 - edit distance / length of the longer text, 0 below the threshold, best over the true answers. White space is
    collapsed first and case does not count; lengths are those of the folded texts, where "ß" is "ss". An answer that is
    exactly half wrong scores 0.5, as in the scripts that are in use; by the formula of the paper it would score 0.

    Args:
        prediction: the model's answer.
        answers: the true answer, or all that count as right.
        threshold: similarities below it are 0; it is in [0, 1].

    Returns:
        Similarity in [0, 1]. Two empty texts are equal: 1.

    Raises:
        DataError: there is no true answer.
        ValueError: the threshold is outside [0, 1].
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold={threshold!r} must be from 0 to 1.")
    predicted = _folded(prediction)
    return max(_similarity(predicted, _folded(answer), threshold) for answer in _accepted(answers))


def _similarity(a: str, b: str, threshold: float) -> float:
    longer = max(len(a), len(b))
    if not longer:
        return 1.0
    # The edit distance is at least the difference in length, so a long wrong answer needs no further computation.
    if min(len(a), len(b)) / longer < threshold:
        return 0.0
    row = list(range(len(b) + 1))  # distances of the part of `a` read so far to every beginning of `b`
    for i, letter in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    similarity = (longer - row[-1]) / longer
    return similarity if similarity >= threshold else 0.0


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy against the answers of several people (Antol et al. 2015, arXiv:1505.00468; TextVQA has ten).

    Mean of min(1, matches / 3) over all ways to leave one person out: 1, 2, 3, 4 of ten matches give 0.3, 0.6, 0.9, 1.
    Texts are compared in lower case, without punctuation and articles, with "two" as 2 and "dont" as "don't".

    Args:
        prediction: the model's answer.
        answers: one per person, at least four; equal ones count each.

    Returns:
        Accuracy in [0, 1].

    Raises:
        DataError: fewer than four answers: even a perfect answer could not reach 1. `exact_match` is for these.
    """
    people = _accepted(answers)
    if len(people) < FEWEST:
        raise DataError(
            f"vqa_accuracy needs the answers of at least {FEWEST} people, found {people!r}. Use exact_match."
        )
    predicted = _vqa_text(prediction)
    matches = sum(_vqa_text(answer) == predicted for answer in people)
    agreeing, others = matches * min(3, matches - 1), (len(people) - matches) * min(3, matches)
    return (agreeing + others) / (3 * len(people))


def _vqa_text(text: str) -> str:
    """Normalises an answer as the published VQA code: lower case, no punctuation, no articles (but never no words)."""
    text = text.lower().replace("\u2019", "'")
    text = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)", "", text)
    # A typographic dash in front of a number is a minus sign. The ASCII hyphen goes, as in the published code.
    text = re.sub(r"(?<!\w)[\u2012-\u2015\ufe63\uff0d](?=\.?\d)", "\u2212", text)
    words = "".join(" " if _is_punctuation(letter) else letter for letter in text).split()
    kept = [word for word in words if word not in ("a", "an", "the")] or words
    return " ".join(_DIGITS.get(word) or _apostrophe(word) for word in kept)


def _is_punctuation(letter: str) -> bool:
    """Whether a character is removed: by the published code, or as punctuation outside ASCII, which that code misses.

    Symbols are kept, because they have a meaning: "\u22125", "\u20a95" and "5\u00b0" are not "5".
    """
    return letter in _PUNCTUATION or (letter > "\x7f" and unicodedata.category(letter).startswith("P"))


def _apostrophe(word: str) -> str:
    if match := _NOT.fullmatch(word):
        return f"{match[1]}n't"
    match = _SHORT.fullmatch(word)
    return "'".join(part for part in match.groups() if part) if match else word


def ocrbench(prediction: str, answers: str | Sequence[str], kind: OCRBenchKind = "text") -> bool:
    """Whether the model's answer contains a true answer (Liu et al. 2023, arXiv:2305.07895).

    This is the lenient rule of OCRBench: "2012" contains "12", and longer answers are right more often.

    Args:
        prediction: the model's answer.
        answers: the true answer, or all that count as right.
        kind: "text" ignores case, outer white space and line breaks; "handwritten_maths" (the HME100k part) keeps case
            and drops all spaces, for LaTeX.

    Returns:
        Whether it counts as right. A blank true answer, which every text contains, makes none right.

    Raises:
        DataError: there is no true answer.
        ValueError: unknown kind.
    """
    if kind not in get_args(OCRBenchKind):
        raise ValueError(f"Unknown kind {kind!r}. Use 'text' or 'handwritten_maths'.")

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.lower() if kind == "text" else text.replace(" ", "")

    text = plain(prediction)
    return any(answer in text for answer in map(plain, _accepted(answers)) if answer)
