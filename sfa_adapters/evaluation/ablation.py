"""Many runs of one recipe with one command: every row is trained, evaluated and noted, and a restart goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sfa_adapters.axial import AXES
from sfa_adapters.bias import TERMS
from sfa_adapters.errors import RecipeError, SFAError
from sfa_adapters.evaluation.predictions import Prediction, read_answers, write_atomically
from sfa_adapters.hosts.recipe import Recipe

__all__ = ["Ablation", "Outcome", "Run", "Variant", "part_variants", "run_ablation", "term_variants"]

MARK = "row.json"
ALL_TERMS, CONTROL = "all terms", "no bias (control)"


class Outcome(Protocol):
    """What a run leaves; `RunResult` of the recipes is one."""

    @property
    def predictions(self) -> Path | None:
        """Its answers to the evaluation."""
        ...


class Run(Protocol):
    """Trains and evaluates one recipe; `sfa_adapters.recipes.run.run` is one."""

    def __call__(
        self, recipe: Recipe, *, nano: bool = ..., resume: bool | str = ..., baseline: bool = ..., share: bool = ...
    ) -> Outcome:
        """Runs it in its folder."""
        ...


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: How it is called in the table.
        folder: How its folder is called.
        changes: Settings that differ from the recipe.
        trains: Whether it trains; else the host is evaluated as it is.
    """

    name: str
    folder: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms of its bias; none where it has no bias."""
        return tuple(self.changes.get("sfa_terms", TERMS)) if self.changes.get("sfa") else ()


def term_variants() -> tuple[Variant, ...]:
    """Table 3: all terms, each one left out, each one alone, and none: the control."""
    made = [Variant(ALL_TERMS, "all", {"sfa": True, "sfa_terms": TERMS})]
    for term in TERMS:
        others = tuple(t for t in TERMS if t != term)
        made.append(Variant(f"without {term}", f"no-{term}", {"sfa": True, "sfa_terms": others}))
    for term in TERMS:
        # Without rows and columns there is nothing that the axial start could be.
        start = {} if term in AXES else {"init": "normal", "init_warmup_steps": 0}
        made.append(Variant(f"only {term}", f"only-{term}", {"sfa": True, "sfa_terms": (term,), **start}))
    return (*made, Variant(CONTROL, "control", {"sfa": False}))


def part_variants(recipe: Recipe) -> tuple[Variant, ...]:
    """Table 1: the host as it is, fine-tuned without a bias, with SFA, with SFA and ADAT, and with SCR besides.

    Args:
        recipe: Its `adat` and its weights of SCR are those of the last rows. Where they are off, half of the tokens are
            kept, and grounding gets a weight of 0.03: of the three terms it alone goes with adaptive tokens under
            activation checkpointing.

    Returns:
        Five rows.
    """
    terms = ("scr_entropy", "scr_grounding", "scr_stability")
    weights = {name: getattr(recipe, name) for name in terms}
    scr = weights if any(weights.values()) else weights | {"scr_grounding": 0.03}
    off = {"adat": None} | dict.fromkeys(terms, 0.0)
    adat = {"adat": 0.5 if recipe.adat is None else recipe.adat}
    return (
        Variant("host as it is", "host", {"sfa": False, **off}, trains=False),
        Variant("baseline", "baseline", {"sfa": False, **off}),
        Variant("+SFA", "sfa", {"sfa": True, **off}),
        Variant("+SFA+ADAT", "sfa-adat", {"sfa": True, **off, **adat}),
        Variant("full", "full", {"sfa": True, **adat, **scr}),
    )


@dataclass(frozen=True)
class Ablation:
    """All rows.

    Attributes:
        runs: For each row its answers, one set per seed that is there.
        failed: Rows and seeds that ended in an error, with its text.
    """

    runs: Mapping[str, list[list[Prediction]]]
    failed: Mapping[str, str]

    def first_seed(self) -> dict[str, list[Prediction]]:
        """The answers of one seed for each row."""
        return {name: sets[0] for name, sets in self.runs.items()}


def run_ablation(
    recipe: Recipe,
    variants: Sequence[Variant],
    run: Run,
    untrained: Callable[[Recipe, bool], Path],
    out: str | Path,
    seeds: Sequence[int] = (0,),
    nano: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Ablation:
    """Trains and evaluates every row with every seed. A row that is done is not run again.

    Args:
        recipe: What all rows share.
        variants: The rows.
        run: Trains and evaluates one recipe.
        untrained: Evaluates a host as it is: takes a recipe and `nano`, returns the file of its answers.
        out: Folder; each row and seed has one below it.
        seeds: Of weights, data order and dropout.
        nano: On nano hosts.
        report: Gets a line about every row.

    Returns:
        All answers, and the rows that failed; one failure does not stop the others.

    Raises:
        RecipeError: No seeds, or a folder holds a row with other settings; names them.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise RecipeError(f"seeds={list(seeds)} must be one or more, each once.")
    runs: dict[str, list[list[Prediction]]] = {}
    failed: dict[str, str] = {}
    plan = [(variant, seed) for variant in variants for seed in (seeds if variant.trains else seeds[:1])]
    for number, (variant, seed) in enumerate(plan, 1):
        name, place = f"{recipe.name}-{variant.folder}-{seed}", Path(out) / variant.folder / f"seed-{seed}"
        title = f"{number}/{len(plan)} {variant.name}, seed {seed}"
        try:
            row = recipe.replace(**variant.changes, name=name, seed=seed, output=str(place))
            done_folder = _done(row, nano, place)
            report(f"{title}: " + ("done before" if done_folder else "running"))
            if done_folder is None:
                done_folder = _run(row, variant, run, untrained, nano, place)
        except _OtherSettingsError as error:
            raise RecipeError(str(error)) from None
        except SFAError as error:
            failed[f"{variant.name}, seed {seed}"] = str(error)
            report(f"{title}: failed: {error}")
            continue
        runs.setdefault(variant.name, []).append(read_answers(done_folder))
    return Ablation(runs, failed)


class _OtherSettingsError(RecipeError):
    """A row that is done was another one."""


def _settings(row: Recipe, nano: bool) -> dict[str, Any]:
    settings = {k: v for k, v in dataclasses.asdict(row).items() if k != "output"}  # the folder may move
    return json.loads(json.dumps({**settings, "nano": nano}))


def _done(row: Recipe, nano: bool, place: Path) -> Path | None:
    mark = place / MARK
    if not mark.is_file():
        return None
    try:
        known = json.loads(mark.read_text(encoding="utf-8"))
        settings, predictions = known["settings"], place / known["predictions"]
    except (ValueError, KeyError, TypeError) as error:
        raise _OtherSettingsError(
            f"{mark} cannot be read ({error}). Delete the folder to run the row again."
        ) from error
    now = _settings(row, nano)
    names = sorted(n for n in settings.keys() | now.keys() if settings.get(n) != now.get(n))
    if names:
        differences = ", ".join(f"{n}: {settings.get(n)!r} there, {now.get(n)!r} now" for n in names)
        raise _OtherSettingsError(f"{place} holds a row with other settings ({differences}). Use another --out.")
    return predictions if predictions.is_file() else None


def _run(
    row: Recipe, variant: Variant, run: Run, untrained: Callable[[Recipe, bool], Path], nano: bool, place: Path
) -> Path:
    if variant.trains and not row.trains_nothing:
        predictions = run(row, nano=nano, resume="auto", baseline=False, share=False).predictions
    else:
        predictions = untrained(row, nano)
    if predictions is None:
        raise RecipeError(f"The run in {place} left no predictions.")
    import torch

    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        there = Path(predictions).resolve()
        here = place.resolve()
        name = str(there.relative_to(here)) if there.is_relative_to(here) else str(there)
        write_atomically(place / MARK, json.dumps({"settings": _settings(row, nano), "predictions": name}, indent=1))
    return Path(predictions)
