"""Makes the options of a command from a dataclass: its fields are the options, its docstring their help."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

__all__ = ["from_dataclass", "help_texts"]

# A field in an `Attributes:` section, whose further lines are indented deeper.
_ENTRY = re.compile(r"^    (\w+): (.+(?:\n {8,}.+)*)", re.MULTILINE)


def help_texts(kind: type) -> dict[str, str]:
    """Reads the description of each field from the `Attributes:` section of a Google docstring.

    Args:
        kind: A class.

    Returns:
        One line of text per field.
    """
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    return {name: " ".join(text.split()) for name, text in _ENTRY.findall(section)}


def from_dataclass(
    kind: type[Any],
    fields: Iterable[str] = (),
    arguments: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    given_only: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command whose first parameter is an instance of `kind`, with one option for each field.

    Defaults and help texts are those of the fields. A tuple becomes an option that may be repeated. A choice
    (`Literal`) is read as text, so that the dataclass itself refuses a wrong one. Further parameters of the command are
    further options.

    Args:
        kind: A dataclass with a line in its docstring for each field. Its module must be quick to import, because
            `sfa --help` waits for it.
        fields: The fields that a user may set, in the order of the help; all by default.
        arguments: Fields that are positional arguments.
        names: Names of options that differ from those of the fields, e.g. `{"rates": "--rate"}`.
        given_only: Pass the command a dictionary of the options that the user set instead of an instance. No default is
            shown, and tuples are comma-separated text, for `load_recipe`.

    Returns:
        The decorator.

    Raises:
        KeyError: A field does not exist or is not in the docstring.
    """
    hints, helps, renamed = get_type_hints(kind), help_texts(kind), names or {}
    known = {field.name: field for field in dataclasses.fields(kind)}
    parameters: list[inspect.Parameter] = []
    several: dict[str, bool] = {}
    for name in fields or known:
        plain, repeated = _simple(hints[name])
        several[name] = repeated and not given_only
        default = None if given_only or repeated else _default(known[name])
        read_as: Any = (str if given_only else list[plain]) if repeated else plain
        # A flag that is off by default needs no second name that turns it off.
        declared = [f"--{name.replace('_', '-')}"] if default is False else []
        declared = [renamed[name]] if name in renamed else declared
        text = helps[name] if sys.flags.optimize < 2 else None  # python -OO has no docstrings
        info = typer.Argument(help=text) if name in arguments else typer.Option(*declared, help=text)
        annotation: Any = Annotated[read_as | None if default is None else read_as, info]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *further = inspect.signature(command, eval_str=True).parameters.values()

        def run(**values: Any) -> None:
            given = {one.name: values.pop(one.name) for one in parameters}
            # Options that were not set get the defaults of the dataclass.
            given = {name: value for name, value in given.items() if value is not None and value != []}
            given = {name: tuple(value) if several[name] else value for name, value in given.items()}
            command(given if given_only else kind(**given), **values)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in further]
        vars(run)["__signature__"] = inspect.Signature([*parameters, *keywords])  # what typer reads
        return run

    return decorate


def _simple(hint: Any) -> tuple[Any, bool]:
    """The type of one value of a field, and whether there may be several."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Literal:
        return str, False
    if get_origin(hint) is tuple:
        return _simple(get_args(hint)[0])[0], True
    return hint, False


def _default(field: dataclasses.Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
