"""Numbers written as words: English ("two hundred and five") and Korean ("천이백", "다섯")."""

import re

__all__ = ["ENGLISH", "english_value", "korean_value"]

_ONES = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_TEENS = {"ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16}
_TEENS |= {"seventeen": 17, "eighteen": 18, "nineteen": 19}
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_LARGE = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 10**3}
_VALUES = {"zero": 0, "a": 1, "hundred": 100} | _ONES | _TEENS | _TENS | _LARGE


def _english_source() -> str:
    """Source of a regular expression that matches well-formed numbers only: "two three" is two numbers."""
    one, teen, ten = ("|".join(words) for words in (_ONES, _TEENS, _TENS))
    below_100 = rf"(?:(?:{ten})(?:[- ](?:{one}))?|{teen}|{one})"
    below_1000 = rf"(?:(?:a|{below_100}) hundred(?: (?:and )?{below_100})?|{below_100})"
    parts = [rf"(?:(?:a|{below_1000}) {large})" for large in _LARGE]
    # From each power of a thousand on, smaller ones may follow.
    chains = [part + "".join(rf"(?:,? {later})?" for later in parts[i + 1 :]) for i, part in enumerate(parts)]
    tail = rf"(?:,? (?:and )?{below_1000})?"
    return rf"(?:{'|'.join(chain + tail for chain in chains)}|{below_1000}|zero)"


ENGLISH = _english_source()  # lower case, single spaces


def english_value(words: str) -> int:
    """The value of a number in English words that `ENGLISH` matches; case does not count."""
    total = group = 0
    for word in re.findall(r"[a-z]+", words.lower()):
        if word == "and":
            continue
        value = _VALUES[word]
        if word in _LARGE:
            total, group = total + group * value, 0
        elif word == "hundred":
            group *= value
        else:
            group += value
    return total + group


_DIGITS = {"일": 1, "이": 2, "삼": 3, "사": 4, "오": 5, "육": 6, "륙": 6, "칠": 7, "팔": 8, "구": 9}
# Without 조 (10**12): too many plain words end with it ("구조", structure). With digits in front ("9조") it is read.
_SMALL, _BIG = {"천": 1000, "백": 100, "십": 10}, {"억": 10**8, "만": 10**4}
_DIGIT = f"[{''.join(_DIGITS)}]"
_BELOW_10000 = "".join(f"(?:{_DIGIT}?{small})?" for small in _SMALL) + f"{_DIGIT}?"
_SINO = re.compile("".join(rf"(?:{_BELOW_10000}{big} ?)?" for big in _BIG) + _BELOW_10000)
_NATIVE_TENS = {"열": 10, "스물": 20, "스무": 20, "서른": 30, "마흔": 40, "쉰": 50, "예순": 60, "일흔": 70}
_NATIVE_TENS |= {"여든": 80, "아흔": 90}
_NATIVE_ONES = {"하나": 1, "둘": 2, "셋": 3, "넷": 4, "다섯": 5, "여섯": 6, "일곱": 7, "여덟": 8, "아홉": 9}
_BEFORE_COUNTERS = {"한": 1, "두": 2, "세": 3, "네": 4}
_NATIVE = re.compile(rf"(?P<tens>{'|'.join(_NATIVE_TENS)})?(?P<ones>{'|'.join((*_NATIVE_ONES, *_BEFORE_COUNTERS))})?")


def korean_value(word: str, counted: bool = False) -> int | None:
    """The value of a Korean word that is a number as a whole; None where it is not.

    Args:
        word: such as "천이백", "오만 삼천" or "다섯". A Sino-Korean number has at least two letters, one of
            them 십, 백, 천, 만 or 억, because single letters are words of their own ("이": this).
        counted: whether a counter follows; only then "한", "두", "세" and "네" (which is "yes", too) are numbers.

    Returns:
        Its value, None if it is no number.
    """
    match = _NATIVE.fullmatch(word)
    if match and word:
        ones = match["ones"] or ""
        if counted or match["tens"] or ones not in _BEFORE_COUNTERS:
            return _NATIVE_TENS.get(match["tens"] or "", 0) + (_NATIVE_ONES | _BEFORE_COUNTERS).get(ones, 0)
    word = word.strip()
    if (len(word) < 2 and not counted) or not _SINO.fullmatch(word) or not set(word) & (set(_SMALL) | set(_BIG)):
        return None
    total = group = digit = 0
    for letter in word.replace(" ", ""):
        if letter in _DIGITS:
            digit = _DIGITS[letter]
        elif letter in _SMALL:
            group, digit = group + (digit or 1) * _SMALL[letter], 0
        else:
            total, group, digit = total + (group + digit or 1) * _BIG[letter], 0, 0
    return total + group + digit
