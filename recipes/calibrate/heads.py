"""`sfa calibrate heads`: scores of the attention heads of a language model, and a head plan.

    sfa calibrate heads pages/*.png --model llava-hf/llava-1.5-7b-hf --question "What is shown?" --out llava-heads
    sfa calibrate heads --scores llava-heads/head_scores.json --rate 0.2 --kind adaptive --out adaptive

Time: one forward for each picture ("gate": and a backward). Expect one row of scores per layer, and with `--rate` the
number of pruned heads of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads.calibrate import calibrate_heads, check_method
from sfa_adapters.heads.plan import HeadPlan, checked_rate, plan_heads
from sfa_adapters.heads.scores import HeadScores
from sfa_adapters.images import as_image

__all__ = ["PLAN_NAME", "SCORES_NAME", "run_calibrate_heads"]

SCORES_NAME, PLAN_NAME = "head_scores.json", "head_plan.json"


def run_calibrate_heads(
    out: Path,
    images: Sequence[Path] = (),
    model: str | None = None,
    question: str | None = None,
    method: str = "s4",
    gamma: float = 0.4,
    charts: int = 100,
    rate: float | None = None,
    kind: str = "uniform",
    seed: int = 0,
    scored: Path | None = None,
) -> HeadScores:
    """Scores heads, saves and prints the scores, and makes a head plan.

    Args:
        out: Folder for `head_scores.json`, and with a plan `head_plan.json`.
        images: Pages, needed with `model`.
        model: A vision-language model, an id or a folder; by default the nano host on charts.
        question: The question about each image.
        method: As in `calibrate_heads`.
        gamma: As in `calibrate_heads`.
        charts: Number of charts, without `model`.
        rate: Share of the heads to prune; without it there is no plan, unless `kind` is "early_skip".
        kind: As in `plan_heads`.
        seed: Of "random".
        scored: Saved scores, to make another plan without a calibration.

    Returns:
        The saved scores.

    Raises:
        DataError: Images and question without a model or the other way round, or something that cannot be loaded.
        RecipeError: An option cannot be used, or the folder cannot be written.
    """
    if charts < 1:
        raise DataError(f"--charts {charts} must be at least 1.")
    planned = rate is not None or kind != "uniform"
    check_method(method, gamma)  # options are checked before a model is loaded and run
    if planned:
        checked_rate(rate, kind)
    _check_folder(out)
    given = (model is not None, bool(images), question is not None)
    if any(given) and not all(given):
        raise DataError("Give --model, --question and images together; without them, the nano host looks at charts.")
    if scored is not None:
        if any(given):
            raise DataError("--scores replaces the calibration: leave out --model, --question and images.")
        if not planned:
            raise RecipeError("--scores needs --rate, such as 0.2, or --kind early_skip: a plan is made of them.")
        return _planned(HeadScores.load(scored), out, rate, kind)
    if model is None or question is None:
        host, batches, about = _charts(charts, labelled=method == "gate")
    else:
        host, batches = _pages(model, images, question)
        about = f"{len(images)} images, asked {question!r}"
    options: dict[str, Any] = {"method": method, "gamma": gamma}
    scores = calibrate_heads(host, batches, **options, seed=seed, data=about)
    if planned:
        return _planned(scores, out, rate, kind)
    _print_scores(scores, None, scores.save(out / SCORES_NAME))
    return scores


def _planned(scores: HeadScores, out: Path, rate: float | None, kind: str) -> HeadScores:
    """Saves scores, then the plan, so that a plan that fails needs no second calibration."""
    path = scores.save(out / SCORES_NAME)
    try:
        plan = plan_heads(scores, rate, kind)  # pyright: ignore[reportArgumentType]
    except RecipeError as error:
        raise RecipeError(f"{error} The scores are kept: --scores {path} plans again.") from error
    try:
        (out / PLAN_NAME).write_text(plan.to_json(), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{out / PLAN_NAME} cannot be written ({error.strerror}).") from error
    _print_scores(scores, plan, path)
    return scores


def _charts(charts: int, labelled: bool) -> tuple[nn.Module, list[Any], str]:
    from sfa_adapters.recipes.bench.heads_quality import chart_batches
    from sfa_adapters.recipes.nano.models import load_nano

    host = load_nano()
    return host.model, chart_batches(host, charts, labelled), f"{charts} training charts"


def _pages(model: str, images: Sequence[Path], question: str) -> tuple[nn.Module, Sequence[Any]]:
    from sfa_adapters.hosts.user_supplied import load_user_model, user_prompt

    for path in images:  # a bad one is an error before a model is loaded
        as_image(path)
    host, processor = load_user_model(model)
    return host, _Prompts(images, lambda path: user_prompt(processor, as_image(path), question))


class _Prompts(Sequence[Any]):
    """Prompts that are encoded when they are needed, because many large pages may not fit into memory."""

    def __init__(self, images: Sequence[Path], prompt: Callable[[Path], Any]) -> None:
        self.images, self.prompt = images, prompt

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Any) -> Any:
        return self.prompt(self.images[place])


def _check_folder(out: Path) -> None:
    there = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise RecipeError(f"--out {out} must be a folder, but {there} is a file.")
    plan = out / PLAN_NAME
    if plan.exists():
        try:
            HeadPlan.from_json(plan.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            raise RecipeError(f"{plan} is no head plan of this command; that of a pruned model, say. Name another "
                              "folder with --out.") from error  # fmt: skip


def _print_scores(scores: HeadScores, plan: HeadPlan | None, path: Path) -> None:
    console = Console()
    counts = "heads" if plan is None else "removed"
    table = Table("layer", "lowest", "highest", counts, *(() if plan is None else ("which",)), box=box.SIMPLE_HEAD)
    for number, (name, head_scores) in enumerate(scores.values.items()):
        row = [str(number), f"{min(head_scores):.4g}", f"{max(head_scores):.4g}", str(len(head_scores))]
        if plan is not None:
            gone = plan.removed[name]
            row[-1:] = [f"{len(gone)} of {len(head_scores)}", " ".join(map(str, gone)) or "-"]
        table.add_row(*row)
    console.print(table)
    skipped = scores.data.get("skipped") or {}
    if skipped:
        console.print("skipped: " + ", ".join(f"{count} {reason}" for reason, count in skipped.items()))
    if plan is None and (path.parent / PLAN_NAME).exists():
        console.print(f"{path.parent / PLAN_NAME} was made before, from other scores")
    if plan is not None:
        console.print(
            f"{plan.count} of {plan.total} heads go ({plan.rate:.1%}); the plan is in {path.parent / PLAN_NAME}"
        )
    console.print(f"{scores.method} scores of {scores.data['samples']} samples are in {path}")
