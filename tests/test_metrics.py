"""Answer metrics; the reference mode of relaxed accuracy must repeat the published code, bugs included."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_adapters.errors import DataError
from sfa_adapters.metrics import (
    anls,
    exact_match,
    numbers_in,
    ocrbench,
    parse_number,
    relaxed_accuracy,
    unprinted_numbers,
    vqa_accuracy,
)

TEXT = st.text("ab .,'\n1", max_size=8)


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("2008", "2010", True),  # a year may be 5% off
        ("25%", "25", False),
        ("25", "25%", False),
        ("0.25", "25%", True),
        ("0", "0", True),
        ("0.0", "0", False),  # a zero target is compared as text
        ("1,234", "1234", False),
        ("$12", "12", False),
        ("12.", "12", True),
        ("Yes.", "Yes", False),
        ("yes", "Yes", True),
        ("95", "100", True),
        ("105", "100", True),
        ("94.9", "100", False),
        ("1_000", "1000", True),
        ("1e3", "1000", True),
        ("45 %", "45%", True),
        ("nan", "3", False),
        ("inf", "3", False),
        (" 12", "12", True),
        (" yes", "yes", False),
        ("-3", "3", False),
    ],
)
def test_reference_mode_repeats_the_published_code(prediction, target, right):
    assert relaxed_accuracy(prediction, target) is right


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("2008", "2010", False),
        ("2010", "2010", True),
        ("2,010", "2,010", True),
        ("25%", "25", True),
        ("25", "25%", True),
        ("0.25", "25%", False),
        ("0.0", "0", True),
        ("0.001", "0", False),
        ("1,234", "1234", True),
        ("$12", "12", True),
        ("$-12", "-12", True),
        ("12.", "12", True),
        (" Yes. ", "yes", True),
        ("95", "100", True),
        ("94.9", "100", False),
        ("-100", "100", False),
        ("12,34", "1234", False),  # not how thousands are written
        ("about 12", "12", False),
        ("no", "12", False),
        ("", "12", False),
        ("1" * 400, "12", False),  # overflows to infinity
        ("1" * 400, "1" * 401, False),
        # A final dot is no part of a year.
        ("2008", "2010.", False),
        ("2008.", "2010.", False),
        ("2010.", "2010", True),
        ("2008", "2010년", False),
        ("2010년", "2010", True),
        ("2,000", "2,010", True),  # a number with a separator is no year
        # Money, full width and percent.
        ("₩12,000", "12,000원", True),
        ("12000", "₩12,000", True),
        ("\uff11\uff12\uff0c\uff10\uff10\uff10원", "12000", True),
        ("₩13,000", "₩12,000", False),
        ("5\uff05", "5%", True),
        ("5 percent", "5", True),
        ("$12", "€12", False),
        ("$12", "12%", False),
        ("USD 12", "$12", True),
        # Scales.
        ("1.5 million", "1,500,000", True),
        ("$1.5M", "1.5 million dollars", True),
        ("12K", "12000", True),
        ("12K", "12", False),
        ("3만 5천원", "35,000", True),
        ("One thousand", "1000", True),
        # Brackets, spaces, units.
        ("(12)", "12", True),
        ("(12)", "-12", True),
        ("($1,234)", "-$1,234", True),
        ("-12", "12", False),
        ("(13)", "-12", False),
        ("(2010)", "2010", True),
        ("(2008)", "2010", False),
        ("1 234", "1234", True),
        ("1\u202f234", "1,234", True),
        ("1 2", "12", False),
        ("12 years", "12", True),
        ("12", "12 years", True),
        ("12 years", "12년", True),
        ("12 years", "12 days", False),
        ("5m", "5 million", False),  # metres
        ("12명", "12 people", True),
        ("12명입니다", "12", True),
        ("20th", "21st", False),  # a rank has no tolerance
        ("21", "20위", False),
        ("21일", "20일", False),
        ("100", "104 countries", True),
        ("20 may", "21 may", False),  # a date is a text
        ("STRASSE", "straße", True),
        ("\uff39\uff25\uff33", "yes.", True),
    ],
)
def test_strict_mode_reads_numbers_as_people_write_them(prediction, target, right):
    assert relaxed_accuracy(prediction, target, "strict") is right


@pytest.mark.parametrize("mode", ["reference", "strict"])
def test_an_answer_is_right_for_itself(mode):
    for text in ("12", "0", "-4.5", "25%", "KEN", "two words", "2010"):
        assert relaxed_accuracy(text, text, mode)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="lenient"):
        relaxed_accuracy("1", "1", "lenient")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "value"),
    [("$1,234.5", 1234.5), ("45 %", 45.0), ("-3", -3.0), ("\u22123", -3.0), (".5", 0.5), ("1e3", 1000.0), ("7.", 7.0)],
)
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["", "KEN", "1 2", "12a", "1,23", "--1", "%"])
def test_parse_number_refuses_what_is_not_one_number(text):
    assert parse_number(text) is None


def test_numbers_in_a_sentence():
    assert numbers_in("from 1,200 to 3.5% in COVID19 times, -2") == [1200.0, 3.5, -2.0]
    assert numbers_in("none") == []
    assert numbers_in("1952-1957") == [1952.0, 1957.0]  # a dash between numbers is no sign


@pytest.mark.parametrize(
    ("answer", "printed", "missing"),
    [
        ("1,234 and 25", ["1234", "25%"], []),
        ("0.10", ["$.1"], []),
        ("24.9", ["25"], [24.9]),
        ("3", ["-3"], []),
        ("\u22123", ["3"], []),
        ("-4", ["3"], [-4.0]),
        ("2010-01-05", ["05/01/2010"], []),
        ("7 of 8", ["7"], [8.0]),
        ("none", [], []),
        ("5", [], [5.0]),
    ],
)
def test_unprinted_numbers(answer, printed, missing):
    assert unprinted_numbers(answer, printed) == missing


def test_signs_count_where_they_are_asked_for():
    assert unprinted_numbers("3", ["-3"], signed=True) == [3.0]
    assert unprinted_numbers("-3", ["-3"], signed=True) == []


# -- exact match ------------------------------------------------------------------------------------------------------


def test_exact_match():
    assert exact_match(" New\n YORK", ["Boston", "new york"])
    assert exact_match("a", "A")
    assert not exact_match("newyork", "new york")
    assert not exact_match("ken.", "ken")


@pytest.mark.parametrize("metric", [exact_match, anls, vqa_accuracy, ocrbench])
@pytest.mark.parametrize("answers", [[], (), [None], ["yes", 3]])
def test_missing_answers_are_refused(metric, answers):
    with pytest.raises(DataError, match="at least one text"):
        metric("yes", answers)


# -- ANLS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("john smith", "John Smith", 1.0),
        ("jon smith", "John Smith", 0.9),
        ("smith john", "john smith", 0.0),  # 10 of 10 letters to change
        ("kitten", "sitting", 4 / 7),
        ("abcd", "abxy", 0.5),  # exactly half is kept
        ("abc", "abxyz", 0.0),  # 0.4
        ("ab", "abcd", 0.5),  # the length alone costs half
        ("a", "abcd", 0.0),
        ("cat", "dog" + 16 * " ", 0.0),  # spaces are no likeness
        ("new  york\n", "new york", 1.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("c", "ß", 0.0),
        ("STRASSE", "straße", 1.0),  # case does not count, where it changes the length neither
        ("C", "ß", 0.0),
        ("s", "ß", 0.5),  # one of two letters, as for "SS"
        ("s", "SS", 0.5),
        ("한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8", 1.0),  # composed and decomposed
        ("cafe\u0301", "CAFÉ", 1.0),
    ],
)
def test_anls(prediction, answer, score):
    assert anls(prediction, answer) == score
    assert anls(answer, prediction) == score
    assert anls(prediction, ["zzzzzzzzzzzzzzzzz", answer]) == score


def test_anls_threshold():
    assert anls("abc", "abxyz", threshold=0) == 0.4
    assert anls("a" + "b" * 9, "a" + "c" * 9, threshold=0.1) == 0.1  # on the threshold, not rounded below it
    assert anls("jon smith", "John Smith", threshold=0.95) == 0
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            anls("a", "a", threshold)


def _distance(a: str, b: str) -> int:
    """By its definition, in exponential time."""
    if not a or not b:
        return len(a) + len(b)
    return min(_distance(a[1:], b) + 1, _distance(a, b[1:]) + 1, _distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_anls_is_one_minus_the_normalized_distance(a, b):
    longest = max(len(a), len(b), 1)
    assert anls(a, b, threshold=0) == (longest - _distance(a, b)) / longest


@given(st.text("csßSẞéÉ\u0301한K", max_size=5), st.text("csßSẞéÉ\u0301한K", max_size=5), st.sampled_from([0.0, 0.5]))
def test_case_and_composition_do_not_count_in_anls(a, b, threshold):
    score = anls(a, b, threshold)
    assert 0 <= score <= 1
    assert score == anls(b, a, threshold)
    for change in (str.upper, str.lower, str.swapcase, lambda text: unicodedata.normalize("NFD", text)):
        assert anls(change(a), b, threshold) == anls(a, change(b), threshold) == score
        assert exact_match(change(a), b) == (anls(a, b, 1.0) == 1)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=4))
def test_anls_is_bounded_and_grows_with_the_answers(prediction, answers):
    score = anls(prediction, answers)
    assert score == 0 or 0.5 <= score <= 1
    assert (score == 1) == exact_match(prediction, answers)
    assert anls(prediction, answers[:1]) <= score == anls(prediction, answers[::-1])


# -- VQA accuracy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_person_out(matches, score):
    assert vqa_accuracy("yes", ["yes"] * matches + ["no"] * (10 - matches)) == score


@given(st.lists(st.sampled_from(["yes", "no", "maybe"]), min_size=4, max_size=12))
def test_vqa_accuracy_is_the_mean_over_all_ways_to_leave_one_out(answers):
    ways = [min(1, (answers[:i] + answers[i + 1 :]).count("yes") / 3) for i in range(len(answers))]
    assert vqa_accuracy("yes", answers) == pytest.approx(sum(ways) / len(ways))


@pytest.mark.parametrize(
    ("prediction", "true"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("the  Stop\tsign.", "stop sign"),
        ("1,234", "1234"),
        ("dont know", "don't know"),
        ("they\u2019re", "theyre"),
        ("couldve", "could've"),
        ("hip-hop!", "hip hop"),
        ("u.s.", "US"),
        ('"coca_cola"', "coca cola"),
        ("a", "A."),
        ("-5", "5"),  # as the published code has it: the ASCII hyphen is punctuation
        ("\u201cstop\u201d", "stop"),
        ("hip\u2013hop", "hip hop"),
        ("네\uff01", "네"),
        ("\u22125", "\u20135"),  # two ways to write a minus sign
    ],
)
def test_vqa_texts_that_are_the_same(prediction, true):
    assert vqa_accuracy(prediction, [true] * 4) == 1


@pytest.mark.parametrize(
    ("prediction", "true"),
    [("3.5", "35"), ("a", "the"), ("were", "we're"), ("10:30", "1030"), ("$5", "5"), ("5%", "5"), ("cat", "cats"),
     ("5", "\u22125"), ("\u22125", "5"), ("5", "\u20135"), ("5", "₩5"), ("5", "5°"), ("5", "≥5"), ("5", "\u2212.5")],
)  # fmt: skip
def test_vqa_texts_that_differ(prediction, true):
    assert vqa_accuracy(prediction, [true] * 4) == 0


def test_vqa_accuracy_needs_people():
    for few in ("yes", ["yes"] * 3):
        with pytest.raises(DataError, match="at least 4 people"):
            vqa_accuracy("yes", few)


# -- OCRBench ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "true", "kind", "right"),
    [
        ("The sign says Stop\nhere ", " STOP HERE\n", "text", True),
        ("in 2012", "12", "text", True),
        ("stop  here", "stop here", "text", False),  # inner spaces count
        ("sto p", "stop", "text", False),
        ("\\frac { A }\n{ b }", r"\frac{A}{b}", "handwritten_maths", True),
        (r"x = \frac{A}{b}", r" \frac {A} {b} ", "handwritten_maths", True),
        (r"\frac{a}{b}", r"\frac{A}{b}", "handwritten_maths", False),  # case counts
    ],
)
def test_ocrbench(prediction, true, kind, right):
    assert ocrbench(prediction, true, kind) is right
    assert ocrbench(prediction, ["no such text", true], kind) is right


def test_a_blank_answer_of_ocrbench_makes_nothing_right():
    for kind in ("text", "handwritten_maths"):
        assert not ocrbench("yes", " \n", kind)
        assert not ocrbench("", "", kind)
        assert not ocrbench("", "stop", kind)
        assert not ocrbench("yes", ["no", " \n"], kind)
        assert ocrbench("yes", ["", "yes"], kind)


def test_an_unknown_kind_of_ocrbench_is_refused():
    with pytest.raises(ValueError, match="formula"):
        ocrbench("x", "x", "formula")  # pyright: ignore[reportArgumentType]
