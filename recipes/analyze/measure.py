"""`sfa analyze entropy | dominance | map | hallucination`: one measurement, written as JSON, CSV and figure.

By default it measures the pretrained nano host on charts of unseen tables. A model of the user needs images and, where
a language model takes part, the question about each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sfa_adapters.analysis import attention_entropy, hallucination_report, modality_dominance
from sfa_adapters.analysis.maps import attention_map, attention_rollout
from sfa_adapters.errors import DataError
from sfa_adapters.hosts.user_supplied import load_user_model, user_prompt
from sfa_adapters.images import as_image
from sfa_adapters.metrics import RelaxedMode
from sfa_adapters.recipes.analyze.predictions import read_predictions
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.models import NanoHost, load_nano
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, chart_samples

__all__ = ["run_dominance", "run_entropy", "run_hallucination", "run_map"]

STATISTICS: dict[str, Any] = {"image_mean": (1.0, 1.0, 1.0), "image_std": (0.5, 0.5, 0.5)}  # of the nano host


def run_entropy(
    out: Path, images: Sequence[Path] = (), model: str | None = None, charts: int = 100, threshold: float = 0.3
) -> None:
    """Entropy of a tower's attention in dense and sparse regions.

    Args:
        out: Folder for the results.
        images: Pages, needed with `model`.
        model: A model with a vision tower, an id or a folder; by default the nano host on charts.
        charts: Number of charts, without `model`.
        threshold: Text density above which a patch is dense.

    Raises:
        DataError: Images without a model or the other way round, or an image that cannot be read.
    """
    _positive("charts", charts)
    if (model is None) != (not images):
        raise DataError("Give images together with --model; without both, the nano host looks at charts.")
    if model is None:
        host, samples = _nano(charts)
        batches: list[Any] = [encode(host, [sample.image], [sample.question]) for sample in samples]
        tower, statistics = host.model, STATISTICS
    else:
        tower, batches, statistics = _tower(model, images)
    tracked = track(batches, description="entropy", transient=True)
    report = attention_entropy(tower, tracked, threshold=threshold, **statistics)
    rows = [row for row in report.table() if row.get("head") in (None, "all", "")]
    columns = ("layer", "dense_nats", "sparse_nats", "ratio", "ratio_low", "ratio_high")
    _leave(report, out, "entropy", rows, columns)


def run_dominance(
    out: Path,
    charts: int = 100,
    queries: str = "generated",
    layers: str = "2/2/2",
    images: Sequence[Path] = (),
    model: str | None = None,
    question: str | None = None,
) -> None:
    """Modality dominance index (MDI) and attention efficiency index (AEI) of a host.

    Args:
        out: Folder for the results.
        charts: Number of charts, without `model`.
        queries: As in `modality_dominance`.
        layers: As in `modality_dominance`.
        images: Pages, needed with `model`.
        model: A vision-language model, an id or a folder.
        question: The question about each image.

    Raises:
        DataError: Images and question without a model or the other way round, or something that cannot be loaded.
    """
    _positive("charts", charts)
    _together(model, images, question)
    tokenizer: Any = None
    if model is None:
        host, samples = _nano(charts)
        prompts_of_host, prompts = host.model, [encode(host, [sample.image], [sample.question]) for sample in samples]
    else:
        prompts_of_host, processor = load_user_model(model)
        tokenizer = processor.tokenizer
        prompts = [user_prompt(processor, as_image(path), question or "") for path in images]
    tracked = track(prompts, description="dominance", transient=True)
    report = modality_dominance(prompts_of_host, tracked, queries=queries, layers=layers, tokenizer=tokenizer)  # pyright: ignore[reportArgumentType]
    columns = ("stage", "average", "mdi", "mdi_low", "mdi_high", "aei_text")
    _leave(report, out, "dominance", report.table(), columns)


def run_map(
    out: Path,
    chart: int = 0,
    patch: str | None = None,
    token: int = 0,
    rollout: bool = False,
    image: Path | None = None,
    model: str | None = None,
    question: str | None = None,
) -> None:
    """Map of the attention to the page: of an answer token of a host, of a patch of its tower, or a rollout.

    Args:
        out: Folder for the results.
        chart: Number of the test chart.
        patch: "row,column" of a patch of the tower, instead of an answer token.
        token: Number of the answer token.
        rollout: Through all layers of the tower, instead of their mean.
        image: The page, needed with `model`; a test chart otherwise.
        model: A vision-language model, an id or a folder; the nano host by default.
        question: The question about the image.

    Raises:
        DataError: A number does not exist, or something cannot be loaded.
    """
    if chart < 0:
        raise DataError(f"--chart {chart} must be at least 0.")
    _together(model, () if image is None else (image,), question)
    if model is None or image is None:
        host, samples = _nano(chart + 1)
        host_model, page = host.model, samples[chart].image
        inputs, question_text = encode(host, [page], [samples[chart].question]), samples[chart].question
        question_text = f"{question_text!r}; true answer {samples[chart].answer!r}"
    else:
        host_model, processor = load_user_model(model)
        page, question_text = as_image(image), repr(question)
        inputs = user_prompt(processor, page, question or "")
    place = None
    if patch is not None:
        parts = patch.split(",")
        if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
            raise DataError(f"--patch {patch} must be a row and a column, such as 3,4.")
        place = (int(parts[0]), int(parts[1]))
    if rollout:
        heat_map = attention_rollout(host_model, inputs, patch=place)
    elif place is not None:
        heat_map = attention_map(host_model, inputs, patch=place)
    else:
        heat_map = attention_map(host_model, inputs, answer_token=token)
    best = sorted(heat_map.table(), key=lambda row: -row["attention"])[:5]
    Console().print(f"{question_text}; the five patches with most attention:")
    _leave(heat_map, out, "map", best, ("row", "column", "attention"), figure=heat_map.figure(np.asarray(page)))


def run_hallucination(file: Path, out: Path, mode: str = "reference") -> None:
    """Which wrong answers in a file are misread numbers and which are fabricated ones.

    Args:
        file: Answers, as `read_predictions` takes them.
        out: Folder for the results.
        mode: As in `hallucination_report`.

    Raises:
        DataError: The file cannot be used; names the line.
    """
    if mode not in get_args(RelaxedMode):
        raise DataError(f"--mode {mode} must be one of {', '.join(get_args(RelaxedMode))}.")
    given = read_predictions(file)
    known = any(given.printed)
    report = hallucination_report(
        given.predictions,
        given.answers,
        images=None if known and not any(given.images) else given.images,
        printed=given.printed if known else None,
        mode=mode,  # pyright: ignore[reportArgumentType]
    )
    _leave(report, out, "hallucination", report.table(), ("quantity", "count", "of", "share", "low", "high"))


def _nano(charts: int) -> tuple[NanoHost, list[ChartSample]]:
    return load_nano(), list(chart_samples("test", charts))


def _tower(model: str, images: Sequence[Path]) -> tuple[torch.nn.Module, list[Tensor], dict[str, Any]]:
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor: Any = AutoImageProcessor.from_pretrained(model)
        tower = AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise DataError(f"--model {model} cannot be loaded: {str(error).splitlines()[0]}") from error
    pages = [processor(images=as_image(path), return_tensors="pt")["pixel_values"] for path in images]
    return tower, pages, {"image_mean": processor.image_mean, "image_std": processor.image_std}


def _together(model: str | None, images: Sequence[Path], question: str | None) -> None:
    given = (model is not None, bool(images), question is not None)
    if any(given) and not all(given):
        raise DataError("Give --model, --question and an image together; without them, the nano host looks at charts.")


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise DataError(f"--{name} {value} is too small.")


def _leave(report: Any, out: Path, name: str, rows: Sequence[Any], columns: Sequence[str], figure: Any = None) -> None:
    """Writes JSON, CSV and figure of a report, and prints some columns of its table."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(report.to_json() + "\n")
    except OSError as error:
        raise DataError(f"--out {out}: the folder cannot be written ({error.strerror}).") from error
    report.to_csv(out / f"{name}.csv")
    (report.figure() if figure is None else figure).savefig(out / f"{name}.png")
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console = Console()
    console.print(table)
    skipped = getattr(report, "skipped", None)
    if skipped:
        reasons = report.skip_reasons if hasattr(report, "skip_reasons") else skipped.counts()
        console.print("skipped: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items()))
    console.print(f"{name}.json, .csv and .png are in {out}/")
