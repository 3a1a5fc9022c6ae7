"""`sfa calibrate heads`: scores of the attention heads of a language model, and a plan which of them go.

    sfa calibrate heads pages/*.png --model llava-hf/llava-1.5-7b-hf --question "What is shown?" --out llava-heads

Time: one forward for each picture ("gate": and a backward). Expect one row of scores per layer, and with `--rate` how
many heads of each layer go.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.heads.calibrate import calibrate_heads
from sfa_adapters.heads.plan import HeadPlan, plan_heads
from sfa_adapters.heads.scores import HeadScores
from sfa_adapters.images import as_image

__all__ = ["PLAN_NAME", "SCORES_NAME", "run_calibrate_heads"]

SCORES_NAME, PLAN_NAME = "head_scores.json", "head_plan.json"
_TOGETHER = 10  # charts in one forward of the nano host


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
) -> HeadScores:
    """Calibrates, saves and prints.

    Args:
        out: Folder for `head_scores.json`, and with a plan `head_plan.json`.
        images: Pages, needed with `model`.
        model: A vision-language model, an id or a folder; by default the nano host on charts.
        question: What it is asked about each image.
        method: As in `calibrate_heads`.
        gamma: As in `calibrate_heads`.
        charts: How many charts, without `model`.
        rate: Share of the heads that should go; without it there is no plan, unless `kind` is "early_skip".
        kind: As in `plan_heads`.
        seed: Of "random".

    Returns:
        What was saved.

    Raises:
        DataError: Images and question without a model or the other way round, or something that cannot be loaded.
        RecipeError: An option cannot be used, or the folder cannot be written.
    """
    if charts < 1:
        raise DataError(f"--charts {charts} must be at least 1.")
    given = (model is not None, bool(images), question is not None)
    if any(given) and not all(given):
        raise DataError("Give --model, --question and images together; without them, the nano host looks at charts.")
    if model is None or question is None:
        host, batches, about = _charts(charts, labelled=method == "gate")
    else:
        host, batches = _pages(model, images, question)
        about = f"{len(images)} images, asked {question!r}"
    options: dict[str, Any] = {"method": method, "gamma": gamma}
    scores = calibrate_heads(host, batches, **options, seed=seed, data=about)
    plan = None
    if rate is not None or kind == "early_skip":
        plan = plan_heads(scores, rate, kind)  # pyright: ignore[reportArgumentType]
    path = scores.save(out / SCORES_NAME)
    if plan is not None:
        try:
            (out / PLAN_NAME).write_text(plan.to_json(), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{out / PLAN_NAME} cannot be written ({error.strerror}).") from error
    _tell(scores, plan, path)
    return scores


def _charts(charts: int, labelled: bool) -> tuple[nn.Module, list[Any], str]:
    from sfa_adapters.recipes.data import chart_samples
    from sfa_adapters.recipes.encode import encode
    from sfa_adapters.recipes.nano import load_nano

    host = load_nano()
    samples = list(chart_samples("train", charts))
    batches = []
    for start in range(0, len(samples), _TOGETHER):
        part = samples[start : start + _TOGETHER]
        answers = [sample.answer for sample in part] if labelled else None
        batches.append(encode(host, [s.image for s in part], [s.question for s in part], answers))
    return host.model, batches, f"{len(samples)} training charts"


def _pages(model: str, images: Sequence[Path], question: str) -> tuple[nn.Module, list[Any]]:
    from sfa_adapters.recipes.own_host import load_own, own_prompt

    pages = [as_image(path) for path in images]  # a bad one is told before a model is loaded
    host, processor = load_own(model)
    return host, [own_prompt(processor, page, question) for page in pages]


def _tell(scores: HeadScores, plan: HeadPlan | None, path: Path) -> None:
    console = Console()
    table = Table("layer", "heads", "lowest", "mean", "highest", *(() if plan is None else ("removed",)))
    for number, (name, own) in enumerate(scores.values.items()):
        row = [str(number), str(len(own)), *(f"{v:.4g}" for v in (min(own), sum(own) / len(own), max(own)))]
        if plan is not None:
            row.append(" ".join(map(str, plan.removed[name])) or "-")
        table.add_row(*row)
    console.print(table)
    skipped = scores.data.get("skipped") or {}
    if skipped:
        console.print("skipped: " + ", ".join(f"{count} {reason}" for reason, count in skipped.items()))
    if plan is not None:
        console.print(
            f"{plan.count} of {plan.total} heads go ({plan.rate:.1%}); the plan is in {path.parent / PLAN_NAME}"
        )
    console.print(f"{scores.method} scores of {scores.data['samples']} samples are in {path}")
