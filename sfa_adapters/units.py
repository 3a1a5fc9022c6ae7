"""Recognises the unit behind a number, and maps all its spellings to one name."""

import re

__all__ = ["COUNTERS", "LABELS", "YEAR", "unit_name"]

YEAR = "year"
_NAMES = {
    "%": "%, percent, pct, per cent, percentage point, percentage points, pp, %p, 퍼센트, 프로, 퍼센트포인트",
    "$": "$, us$, usd, dollar, dollars, 달러",
    "€": "€, eur, euro, euros, 유로",
    "£": "£, gbp, pound, pounds, 파운드",
    "₩": "₩, krw, won, 원",
    "¥": "¥, jpy, yen, 엔, 円",
    "元": "元, cny, rmb, yuan, 위안",
    "₹": "₹, inr, rupee, rupees, 루피",
    YEAR: "year, years, yr, yrs, 년, 년도, year old, years old",
    "month": "month, months, 개월, 달",
    "week": "week, weeks, wk, wks, 주, 주일",
    "day": "day, days, 일간",
    "hour": "hour, hours, hr, hrs, h, 시간",
    "minute": "minute, minutes, min, mins, 분",
    "second": "second, seconds, sec, secs, s, 초",
    "person": "person, persons, people, 명, 인, 사람",
    "time": "time, times, x, 번, 회, 배",
    "piece": "piece, pieces, 개",
    "kg": "kg, kgs, ㎏, kilogram, kilograms, 킬로그램",
    "km": "km, ㎞, kilometer, kilometers, kilometre, kilometres, 킬로미터",
    "m": "m, meter, meters, metre, metres, 미터",
    "cm": "cm, ㎝, centimeter, centimeters, 센티미터",
    "t": "t, ton, tons, tonne, tonnes, 톤",
    "°": "°, degree, degrees, 도",
    "°C": "°c, ℃",
    "°F": "°f, ℉",
    "ordinal": "st, nd, rd, th, 위, 등, 번째",
}
_NAME_OF = {written: name for name, line in _NAMES.items() for written in line.split(", ")}

# Units of numbers that name something instead of measuring it, so that a near number is wrong.
LABELS = frozenset(
    ("ordinal", "am", "pm", "월", "일", "시", "호", "호선", "층", "학년", "학년도", "분기", "회차", "차")
)
# Korean counters that a number in words may have ("다섯 명").
COUNTERS = "명|인|사람|개월|개국|개|원|년|살|세|번|회|건|배|달러|시간|분|초|곳|대|권|장|마리|가지|퍼센트"

# Units right behind the digits, without a space: only certain ones, so that room "101A" stays a text.
_MEASURE = re.compile(
    r"(?:kgs?|mg|g|km|cm|mm|m|mi|ft|lbs?|oz|s|h|hrs?|mins?|secs?|ms|yrs?|l|L|ml|mL|t|[kMGT]?Wh?|[kMG]?Hz|[kKMGT]B|°[CF]?"
    r"|[\u33a0-\u33ad㎏㎞㎝℃℉]|px|pt|pp|x|%p?|[$\u20a0-\u20cf£¥円元]|st|nd|rd|th)(?:/[a-z]+)?[²³]?"
)
_WORD = re.compile(r"[A-Za-z]+(?: (?:old|cent|points?))?")
_HANGUL = re.compile(r"[가-힣]{1,5}")
_ENDING = re.compile(r"(?:입니다|이에요|예요|이다)$")  # "12명입니다": "it is 12"
_SPACED = re.compile(r"[a-z]{2,}(?:/[a-z]+)?")
# Words that modify the number or continue the sentence, and months, with which it is a date.
_NO_UNITS = frozenset(
    re.findall(
        r"\w+",
        """the a an or and not to of in on at is are was were out per plus minus from than more less up down maybe but
        if as by vs half dozen january february march april may june july august september october november december
        jan feb mar apr jun jul aug sep sept oct nov dec
        이상 이하 미만 초과 정도 이전 이후 가량 쯤 여 여명 또는 그리고 에서 부터 까지""",
    )
)


def unit_name(rest: str) -> str | None:
    """The name of the unit that the text behind a number is.

    Args:
        rest: the text behind the number, with its space: "명", " years", "kg", "".

    Returns:
        One name for all spellings ("years", "yr" and "년" are "year"), "" for no text, None for a text that is not a
        unit: the number is then a part of a longer text.
    """
    if not rest.strip():
        return ""
    written, spaced = rest.strip(), rest[0].isspace()
    if _HANGUL.match(written):
        written = _ENDING.sub("", written)
        if not written:
            return ""
        return None if written in _NO_UNITS or not _HANGUL.fullmatch(written) else _NAME_OF.get(written, written)
    lower = written.lower()
    if lower in _NO_UNITS or re.fullmatch(r"[ap]m", lower):
        return lower if lower in ("am", "pm") else None
    if _MEASURE.fullmatch(written):
        return _NAME_OF.get(lower, written)
    if lower in _NAME_OF and (spaced or len(lower) > 2) and _WORD.fullmatch(written):
        return _NAME_OF[lower]
    if not spaced or not _SPACED.fullmatch(written):
        return None
    return f"{written[:-3]}y" if written.endswith("ies") else written.removesuffix("s")
