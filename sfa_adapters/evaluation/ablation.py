"""`run_ablation`: trains and evaluates one recipe in several variants and seeds, and resumes after a restart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sfa_adapters.axial import AXES
from sfa_adapters.bias import TERMS
from sfa_adapters.choices import DEFAULT_TERMS
from sfa_adapters.errors import RecipeError, SFAError
from sfa_adapters.evaluation.predictions import Prediction, read_answers, write_atomically
from sfa_adapters.hosts.recipe import Recipe

__all__ = ["Ablation", "Outcome", "Run", "Variant", "part_variants", "run_ablation", "term_variants"]

MARK = "row.json"
ALL_TERMS, CONTROL = "all terms", "no bias (control)"


class Outcome(Protocol):
    """Result of a run; `RunResult` of the recipes is one."""

    @property
    def predictions(self) -> Path | None:
        """File of its answers to the evaluation questions."""
        ...


class Run(Protocol):
    """A function that trains and evaluates one recipe; `sfa_adapters.recipes.run.run` is one."""

    def __call__(
        self, recipe: Recipe, *, nano: bool = ..., resume: bool | str = ..., baseline: bool = ..., share: bool = ...
    ) -> Outcome:
        """Runs the recipe in its folder."""
        ...


@dataclass(frozen=True)
class Variant:
    """One row of an ablation table: a variant of the recipe.

    Attributes:
        name: Its name in the table.
        folder: Name of its folder.
        changes: Settings that differ from the recipe.
        trains: Whether it trains; otherwise the host is evaluated without training.
    """

    name: str
    folder: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms of its bias; empty if it has no bias."""
        return tuple(self.changes.get("sfa_terms", DEFAULT_TERMS)) if self.changes.get("sfa") else ()


def term_variants() -> tuple[Variant, ...]:
    """Rows of table 3: all terms, each one left out, each one alone, and none (the control)."""
    made = [Variant(ALL_TERMS, "all", {"sfa": True, "sfa_terms": TERMS})]
    for term in TERMS:
        others = tuple(t for t in TERMS if t != term)
        made.append(Variant(f"without {term}", f"no-{term}", {"sfa": True, "sfa_terms": others}))
    for term in TERMS:
        # The axial start needs the term for rows or for columns.
        start = {} if term in AXES else {"init": "normal", "init_warmup_steps": 0}
        made.append(Variant(f"only {term}", f"only-{term}", {"sfa": True, "sfa_terms": (term,), **start}))
    return (*made, Variant(CONTROL, "control", {"sfa": False}))


def part_variants(recipe: Recipe) -> tuple[Variant, ...]:
    """Rows of table 1: the host untrained, fine-tuned without a bias, with SFA, with SFA and ADAT, and with SCR too.

    Args:
        recipe: The last rows use its `adat` and its weights of SCR. If they are off, half of the tokens are kept, and
            grounding gets a weight of 0.03: it is the only one of the three terms that works with adaptive tokens under
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
    """Results of an ablation.

    Attributes:
        runs: For each row its answers, one list per finished seed.
        failed: Rows and seeds that ended in an error, with its text.
    """

    runs: Mapping[str, list[list[Prediction]]]
    failed: Mapping[str, str]

    def first_seed(self) -> dict[str, list[Prediction]]:
        """The answers of the first finished seed of each row."""
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
    """Trains and evaluates every row with every seed; finished ones are not run again.

    Args:
        recipe: The recipe of all rows.
        variants: The rows.
        run: Trains and evaluates one recipe.
        untrained: Evaluates a host without training: takes a recipe and `nano`, returns the file of its answers.
        out: Folder, with a subfolder for each row and seed.
        seeds: Seeds of weights, data order and dropout.
        nano: Whether to use nano hosts.
        report: Called with a line of text about every row.

    Returns:
        All answers, and the rows that failed; one failure does not stop the others.

    Raises:
        RecipeError: There are no seeds or one stands twice, or a folder holds a row with other settings; names these.
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
    """The folder of a row holds the results of other settings."""


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
