"""Docstrings of this library are plain text; reStructuredText would read formulas in them as markup.

`e_i * e_j`, |w| and indented code are made safe before the sections of the Google style are read, so that nobody has to
know reStructuredText to write a docstring, and the site still builds with warnings as errors.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

__all__ = ["as_rst", "connect"]

_SECTION = re.compile(r"(Args|Attributes|Example|Examples|Keyword Args|Note|Raises|Returns|Warns|Yields):$")
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))", re.DOTALL)
_MARKUP = re.compile(r"(?<!^)(?<!\n)(?<!\n  )\*|\*(?! )|\||(?<=\w)_(?!\w)")  # not the star of a list


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _plain(text: str) -> str:
    """Prose: code in double backticks, and everything else without a meaning."""
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts.append(_MARKUP.sub(r"\\\g<0>", text[end : code.start()]))
        parts.append(f"``{code[1].strip()}``" + ("\\ " if code[2] else ""))
        end = code.end()
    return "".join([*parts, _MARKUP.sub(r"\\\g<0>", text[end:])])


def _table(rows: list[str], pad: str) -> list[str]:
    """A Markdown table as a directive."""
    lines = ["", f"{pad}.. list-table::", f"{pad}   :header-rows: 1", ""]
    for row in (row for row in rows if not set(row) <= set("|- :")):
        for number, cell in enumerate(row.strip().strip("|").split("|")):
            lines.append(f"{pad}   {'*' if number == 0 else ' '} - {_plain(cell.strip())}")
    return [*lines, ""]


def as_rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText, with its sections as they were.

    Args:
        lines: Its lines, without the indentation that they have in common.
    """
    result: list[str] = []
    prose: list[str] = []
    block: list[str] = []
    margin = 0  # indentation of the prose that is open

    def close_prose() -> None:
        if prose:
            result.extend(_plain("\n".join(prose)).split("\n"))
            prose.clear()

    def close_block() -> None:
        if block:
            while not block[-1].strip():
                block.pop()
            pad = " " * margin
            table = all(line.lstrip().startswith("|") for line in block)
            result.extend(_table(block, pad) if table else ["", f"{pad}::", "", *block, ""])
            block.clear()

    for line in lines:
        if block and (not line.strip() or _indent(line) > margin or line.lstrip().startswith("|")):
            block.append(line)
            continue
        close_block()
        last = prose[-1] if prose else next((text for text in reversed(result) if text.strip()), "")
        deeper = bool(line.strip()) and bool(last) and _indent(line) >= margin + 4
        listed = re.match(r"\s*(?:[-*]|\d+\.) ", last)
        in_section = _SECTION.match(last.strip()) or (prose and (margin > 0 or listed))
        if line.lstrip().startswith("| ") or (deeper and not in_section and not listed):
            close_prose()
            block.append(line)
            continue
        if not line.strip():
            close_prose()
            result.append("")
            continue
        if not prose or _SECTION.match(last.strip()):
            margin = _indent(line)
        prose.append(line)
    close_prose()
    close_block()
    return result


def _process(app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def connect(app: Sphinx) -> None:
    """Runs before the extension that reads the sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
