"""Relaxed accuracy: the reference mode must repeat the published code, bugs included; the strict mode must not."""

import pytest

from sfa_adapters.metrics import numbers_in, parse_number, relaxed_accuracy


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
