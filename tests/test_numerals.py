"""Numbers as people write them: all spellings of a number are equal, and unprinted numbers match none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_adapters.metrics import numbers_in, parse_number, relaxed_accuracy, unprinted_numbers
from sfa_adapters.quantities import quantities_in

WHOLE = st.integers(0, 10**9) | st.integers(0, 3000)
DECIMAL = st.decimals(0, 10**6, allow_nan=False, places=2).map(str)
FULL_WIDTH = {0x21 + i: 0xFF01 + i for i in range(94)}
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
)
ONES += "eighteen nineteen"
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def english(n: int) -> str:
    """A slow speller, to be read back."""
    if n < 20:
        return ONES.split()[n]
    if n < 100:
        return TENS[n // 10] + (f"-{english(n % 10)}" if n % 10 else "")
    power, word = next(
        (p, w) for p, w in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")) if n >= p
    )
    return f"{english(n // power)} {word}" + (f" {english(n % power)}" if n % power else "")


def korean_words(n: int) -> str:
    if not n:
        return ""
    for power, letter in ((10**8, "억"), (10**4, "만"), (1000, "천"), (100, "백"), (10, "십")):
        if n >= power:
            many = "" if n // power == 1 and power < 10**8 else korean_words(n // power)
            return many + letter + korean_words(n % power)
    return "일이삼사오육칠팔구"[n - 1]


def korean_digits(n: int, space: str) -> str:
    parts = [(n // 10**8, "억"), (n // 10**4 % 10**4, "만"), (n % 10**4, "")]
    return space.join(f"{count}{letter}" for count, letter in parts if count) or "0"


@given(WHOLE)
def test_a_number_comes_back_from_all_its_written_forms(n):
    forms = [
        str(n),
        f"{n:,}",
        f"{n:,}".replace(",", " "),
        f"{n:,}".replace(",", "\u202f"),
        f"{n:,}".replace(",", "\xa0"),
    ]
    forms += [
        f"{n:,}원",
        f"₩{n:,}",
        f"{n:,} 원",
        f"US${n:,}",
        f"{n} years",
        f"{n:,}명",
        f"{n}.",
        f" {n} ",
        f"{n / 1000}K",
    ]
    forms += [f"{n / 10**6:.6f} million", f"{n / 10**6:.6f}M", english(n), english(n).capitalize()]
    forms += [korean_digits(n, ""), f"{korean_digits(n, '')}원", f"{n / 10**4:.4f}만"]
    if (n >= 10**4 and n % 10**4 == 0) or n % 10**4 >= 1000:
        forms.append(korean_digits(n, " "))
    if len(korean_words(n)) > 1:
        # A single letter is a number in front of a counter only: "천" alone is a word of its own, too.
        forms += [f"{korean_words(n)} 원"] + [korean_words(n)] * (len(korean_words(n)) > 1)
    for form in (*forms, *(form.translate(FULL_WIDTH) for form in forms)):
        assert parse_number(form) == n, form


@given(DECIMAL, st.sampled_from(["", "-", "\u2212", "\uff0d"]))
def test_decimals_signs_and_full_width(digits, sign):
    value = float(digits) * (-1 if sign else 1)
    forms = [
        digits,
        f"{digits}%",
        f"{digits} %",
        f"{digits} percent",
        f"{digits} 퍼센트",
        f"{digits}kg",
        f"{digits} km",
    ]
    for form in forms:
        for written in (sign + form, (sign + form).translate(FULL_WIDTH)):
            assert parse_number(written) == value, written
        if form[-1] not in "tgm트":
            assert numbers_in(f"about {sign}{form} more") == [value]


@given(
    st.integers(0, 10**9),
    st.sampled_from(["약", "총", "제", "는", "日", "は"]),
    st.sampled_from(["", "명", " 개", "분기", "年"]),
)
def test_a_letter_of_a_script_without_spaces_hides_no_number(n, before, behind):
    assert numbers_in(f"{before}{n}{behind}") == [n]
    assert unprinted_numbers(f"{before}{n}{behind}", [str(n)]) == []
    assert unprinted_numbers(str(n), [f"{before}{n}{behind}"]) == []
    assert numbers_in(f"COVID{n}") == []


@given(st.text(max_size=20))
def test_any_text_is_read(text):
    values = numbers_in(text)
    value = parse_number(text)
    assert all(isinstance(n, float) for n in values)
    assert value is None or isinstance(value, float)
    assert unprinted_numbers(text, [text]) == [n for n in values if n != n]
    assert relaxed_accuracy(text, text, "strict")


# -- what stands on a page --------------------------------------------------------------------------------------------

NUMBERS = st.integers(1, 10**7)


def writings(n: int) -> list[str]:
    grouped = f"{n:,}"
    forms = [str(n), grouped, grouped.replace(",", " "), f"{n / 1000}K", f"{n / 10**6:.6f} million", f"₩{grouped}"]
    return [*forms, f"약{n}명", korean_digits(n, ""), english(n).capitalize(), grouped.translate(FULL_WIDTH)]


@given(NUMBERS, st.data())
def test_a_printed_number_is_there_however_both_sides_write_it(n, data):
    answer, printed = data.draw(st.sampled_from(writings(n))), data.draw(st.sampled_from(writings(n)))
    assert unprinted_numbers(answer, ["Tea", printed, "Share"]) == []
    assert unprinted_numbers(f"It is {answer}", [f"Total: {printed}"]) == [] or "One" in (answer, printed)


def readings(text: str) -> set[float]:
    """Of a text with one number: with and without its scale, and its parts."""
    (quantity,) = quantities_in(text)
    return {n for q in (quantity, *quantity.parts) for n in (q.value, q.digits)}


@given(st.integers(2, 10**7), st.integers(2, 10**7), st.data())
def test_a_number_that_is_not_printed_stays_unprinted(n, other, data):
    answer, printed = data.draw(st.sampled_from(writings(n))), data.draw(st.sampled_from(writings(other)))
    # "12" where "12K" is printed stands there, read without its scale, and so does "1 510" where 1 and 510 are.
    if not readings(answer) & readings(printed):
        assert unprinted_numbers(answer, ["Tea", printed]) == [float(n)]
        assert unprinted_numbers(f"It is {answer}.", ["Tea", printed]) == [float(n)]
        assert unprinted_numbers(answer, [])


@given(st.integers(1, 9999), st.integers(1, 9999))
def test_a_percentage_is_its_fraction_and_nothing_else(n, other):
    percent, fraction = f"{n / 100:.2f}%", f"{n / 10000:.4f}"
    assert unprinted_numbers(fraction, [percent]) == []
    assert unprinted_numbers(percent, [fraction]) == []
    if other not in (n, n * 100) and other * 100 != n:
        assert unprinted_numbers(f"{other / 10000:.4f}", [percent]) == [other / 10000]
        assert unprinted_numbers(f"{other / 100:.2f}%", [fraction]) == [other / 100]
    assert unprinted_numbers(f"{n / 10000:.4f}%", [percent]) == [n / 10000]


@pytest.mark.parametrize(
    ("answer", "printed", "missing"),
    [
        ("약3.4", ["3.4"], []),
        ("3.4", ["약3.4"], []),
        ("총12명", ["12"], []),
        ("제1분기", ["1분기", "2분기"], []),
        ("총13명", ["총12명"], [13.0]),
        ("1 510", ["1,510"], []),
        ("1\u202f510", ["1510"], []),
        ("1 511", ["1510"], [1511.0]),
        ("25 300", ["25", "300"], []),  # two numbers, perhaps
        ("25 300", ["25", "301"], [25300.0]),
        ("100", ["0 100 200"], []),  # labels that OCR read as one line
        ("150", ["0 100 200"], [150.0]),
        ("0.249", ["24.9%"], []),
        ("0.25", ["24.9%"], [0.25]),
        ("0.249", ["24.9"], [0.249]),  # nothing says that 24.9 is a percentage
        ("1.51K", ["1,510"], []),
        ("1.51K", ["1.51"], []),  # read without the scale of its axis
        ("1.52K", ["1,510"], [1520.0]),
        ("One thousand", ["1,000"], []),
        ("1000", ["One thousand"], []),
        ("Two thousand", ["1,000"], [2000.0]),
        ("1억 2,000만", ["120,000,000"], []),
        ("1.2억", ["120,000,000"], []),
        ("1억 3,000만", ["120,000,000"], [130000000.0]),
        ("천이백 원", ["₩1,200"], []),
        ("Twelve", ["13"], [12.0]),
        ("no one", ["2"], []),
        ("One", ["2"], [1.0]),
        ("US$7", ["8"], [7.0]),
        ("5\u20137%", ["5", "7"], []),  # a range
        ("10%-20%", ["10%", "20%"], []),
    ],
)
def test_numbers_of_an_answer_that_are_not_printed(answer, printed, missing):
    assert unprinted_numbers(answer, printed) == missing


def test_lines_and_columns_are_no_thousands():
    assert numbers_in("1\n510") == numbers_in("1\t510") == [1.0, 510.0]


@pytest.mark.parametrize(
    "text",
    ["12 or 13", "about 12", "12 이상", "12월 3일", "20 january", "101A", "A320", "1,2345", "12 12", "한국", "일본",
     "구조", "네", "12 people 3", "$12€", "5% people", "((12))", "12 the", "01 234 5", "3만 3만", "1만 20000"],
)  # fmt: skip
def test_more_or_less_than_one_number_is_none(text):
    assert parse_number(text) is None


def test_a_long_text_takes_no_time():
    for text in ("1 234 " * 2000, "one hundred " * 2000, "3만 " * 2000, "a " * 5000, "이" * 5000 + "x"):
        assert parse_number(text) is None
        assert len(numbers_in(text)) <= len(text.split())
