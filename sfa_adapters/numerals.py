"""Numbers in texts, as a person would read them, and their values."""

from collections.abc import Iterable, Iterator

from sfa_adapters.quantities import Quantity, quantities_in, quantity_of

__all__ = ["numbers_in", "parse_number", "unprinted_numbers"]


def parse_number(text: str) -> float | None:
    """The value of a text that is a number as a whole; None where it is not.

    Understands common notations: thousands separators (a comma or a space), currency signs and names, full-width
    forms, percent (dropped: "25%" is 25), scales ("12K", "1.5 million", "3만 5천"), one unit behind it ("12 years",
    "12명"), brackets, number words ("One thousand", "천이백") and a final dot.

    Args:
        text: an answer such as "$1,234.5", "45 %" or "-3".

    Returns:
        Its value, None if it is not one number.
    """
    quantity = quantity_of(text)
    return None if quantity is None else quantity.value


def _quantities(text: str) -> list[Quantity]:
    """The quantities in a running text, else the one that the whole text is ("One", "천이백 원")."""
    return list(quantities_in(text)) or [q for q in (quantity_of(text),) if q is not None]


def numbers_in(text: str) -> list[float]:
    """All numbers in a text, from left to right; digits inside a Latin word ("COVID19") do not count.

    A dash between two numbers ("1952-1957") is no sign. Scales count ("12K" is 12,000), and so do number words, except
    "one" in a sentence.
    """
    return [quantity.value for quantity in _quantities(text)]


def unprinted_numbers(answer: str, printed: Iterable[str], signed: bool = False) -> list[float]:
    """Numbers of an answer that appear nowhere in the printed texts, in no notation.

    "1,234", "1 234" and "1.234K" are on a page that prints "1234"; "25" is on one that prints "25%", and so is "0.25";
    "12" and "12K" are on one that prints "12K" or "12": a number without its scale is misread, not fabricated.
    24.9 is not on a page that prints "25".

    Args:
        answer: the model's answer.
        printed: the texts on the image.
        signed: whether 3 differs from a printed -3. By default it does not: the digits are there.

    Returns:
        These numbers, from left to right, as the answer gives them.
    """
    plain: set[float] = set()
    fractions: set[float] = set()  # printed percentages as fractions
    no_percent: set[float] = set()  # printed numbers that may be such a fraction
    for quantity in _with_parts(q for text in printed for q in _quantities(text)):
        value, digits, hundredth = _unsigned(quantity, signed)
        plain |= {value, digits}
        if quantity.unit == "%":
            fractions.add(hundredth)
        else:
            no_percent.add(value)

    def stands(quantity: Quantity) -> bool:
        value, digits, hundredth = _unsigned(quantity, signed)
        if value in plain or digits in plain:
            return True
        if hundredth in no_percent if quantity.unit == "%" else value in fractions:
            return True
        return bool(quantity.parts) and all(stands(part) for part in quantity.parts)

    return [quantity.value for quantity in _quantities(answer) if not stands(quantity)]


def _with_parts(quantities: Iterable[Quantity]) -> Iterator[Quantity]:
    for quantity in quantities:
        yield quantity
        yield from quantity.parts


def _unsigned(quantity: Quantity, signed: bool) -> tuple[float, float, float]:
    values = (quantity.value, quantity.digits, quantity.hundredth)
    return values if signed else (abs(values[0]), abs(values[1]), abs(values[2]))
