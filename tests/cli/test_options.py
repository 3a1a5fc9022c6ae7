"""Options of a command are the fields of a dataclass, and their help is its docstring."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from sfa_adapters.cli import main as main_module
from sfa_adapters.cli.options import from_dataclass, help_texts
from sfa_adapters.hosts.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Soup:
    """What is cooked.

    Attributes:
        pages: Read in advance.
        base: Water or milk, which is
            richer.
        salt: In grams.
        herbs: Any
        heat: Between 0 and 1.
        lid: Closed.
        times: Minutes.
        stirred_well: Slowly.

    Raises:
        heat: No field.
    """

    pages: tuple[Path, ...] = ()
    base: Literal["water", "milk"] = "water"
    salt: int | None = None
    herbs: tuple[str, ...] = ("dill",)
    heat: float = 0.5
    lid: bool = False
    times: tuple[int, ...] | None = None
    stirred_well: bool = False

    def __post_init__(self) -> None:
        if self.base not in ("water", "milk"):
            raise ValueError(f"--base {self.base}")


def cooked(*arguments: str, further: bool = False, **options: Any) -> tuple[Any, str]:
    """What the command was given, and what the terminal showed."""
    got: list[Any] = []
    app = typer.Typer()

    def plain(soup: Soup) -> None:
        """Cooks."""
        got.append(soup)

    def with_more(soup: Soup, spoon: Annotated[str, typer.Option(help="Which.")] = "big") -> None:
        got.append((soup, spoon))

    command: Callable[..., None] = with_more if further else plain
    app.command()(from_dataclass(Soup, **options)(command))
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1"})
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return (got[0] if got else None), result.output


def test_nothing_given_is_the_dataclass_as_it_is() -> None:
    assert cooked()[0] == Soup()


def test_every_kind_of_field_is_read() -> None:
    arguments = "--base milk --salt 3 --herbs a --herbs b --heat 0.25 --lid --times 1 --times 2 --pages x --pages y"
    wanted = Soup(
        pages=(Path("x"), Path("y")), base="milk", salt=3, herbs=("a", "b"), heat=0.25, lid=True, times=(1, 2)
    )
    assert cooked(*arguments.split())[0] == wanted
    assert cooked("--stirred-well")[0] == Soup(stirred_well=True)


def test_names_arguments_and_further_options() -> None:
    changed: dict[str, Any] = {"arguments": ("pages",), "names": {"herbs": "--herb"}, "further": True}
    soup = Soup(pages=(Path("p"), Path("q")), herbs=("mint",))
    assert cooked("p", "q", "--herb", "mint", **changed)[0] == (soup, "big")
    assert cooked("--spoon", "small", **changed)[0] == (Soup(), "small")


def test_help_is_the_docstring_with_the_defaults() -> None:
    shown = " ".join(cooked("--help")[1].replace("│", " ").split())
    assert "Cooks." in shown
    assert "Water or milk, which is richer. [default: water]" in shown
    assert "Between 0 and 1. [default: 0.5]" in shown
    assert "--no-lid" not in shown
    assert help_texts(Soup) == {
        "pages": "Read in advance.",
        "base": "Water or milk, which is richer.",
        "salt": "In grams.",
        "herbs": "Any",
        "heat": "Between 0 and 1.",
        "lid": "Closed.",
        "times": "Minutes.",
        "stirred_well": "Slowly.",
    }


def test_only_some_fields_can_be_given() -> None:
    assert "--lid" not in cooked("--help", fields=("salt",))[1]
    assert cooked("--salt", "2", fields=("salt",))[0] == Soup(salt=2)
    assert cooked("--lid", fields=("salt",))[0] is None


def test_a_field_without_a_default_must_be_given() -> None:
    @dataclass
    class Plate:
        """What is eaten from.

        Attributes:
            size: In centimetres.
        """

        size: int

    plates: list[Plate] = []
    app = typer.Typer()
    app.command()(from_dataclass(Plate)(plates.append))
    result = CliRunner().invoke(app, [], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 2
    assert "Missing option '--size'" in result.output
    assert CliRunner().invoke(app, ["--size", "20"]).exit_code == 0
    assert plates == [Plate(20)]


def test_without_docstrings_the_options_stay() -> None:
    code = (
        "from sfa_adapters.cli.options import from_dataclass\n"
        "from sfa_adapters.recipes.bench.options import BenchConfig\n"
        "import inspect\n"
        "command = from_dataclass(BenchConfig, fields=('out', 'rounds'))(lambda config: None)\n"
        "print(*inspect.signature(command).parameters)\n"
    )
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == ["out", "rounds"], done.stderr


def test_a_choice_is_refused_by_the_dataclass() -> None:
    with pytest.raises(ValueError, match="--base wine"):
        cooked("--base", "wine")


def test_what_is_given_alone_has_no_defaults() -> None:
    changed: dict[str, Any] = {"given_only": True, "names": {"lid": "--lid/--open"}}
    assert cooked(**changed)[0] == {}
    assert cooked("--herbs", "a,b", "--open", "--heat", "0", **changed)[0] == {
        "herbs": "a,b",
        "lid": False,
        "heat": 0.0,
    }
    assert "default" not in cooked("--help", **changed)[1]


def test_a_field_that_is_not_there_or_not_documented_is_an_error() -> None:
    @dataclass
    class Silent:
        """Says nothing.

        Attributes:
            one: Something.
        """

        one: int = 1
        two: int = 2

    with pytest.raises(KeyError, match="two"):
        from_dataclass(Silent)
    with pytest.raises(KeyError, match="three"):
        from_dataclass(Soup, fields=("three",))


def test_the_documentation_of_a_recipe_names_every_setting() -> None:
    assert list(help_texts(Recipe)) == [field.name for field in dataclasses.fields(Recipe)]


def test_help_of_a_command_is_that_of_its_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_module.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--train-llm" in shown
    for name in ("lora_llm", "sfa_terms", "seed"):
        assert help_texts(Recipe)[name].split()[0] in shown
        assert f"--{name.replace('_', '-')}" in shown
