"""The metadata of a model card, which the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.sharing.run_metadata import RunMetadata

__all__ = ["card_metadata", "hub_id", "plain_name"]

METRIC_NAMES = {
    "relaxed": "relaxed_accuracy",
    "relaxed_strict": "relaxed_accuracy_strict",
    "vqa": "vqa_accuracy",
    "exact": "exact_match",
}


def hub_id(name: str | None) -> str | None:
    """The name if it can be that of a hub repository (`user/name`), None for a local folder or anything else."""
    if not name or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def card_metadata(recipe: Recipe, metadata: RunMetadata, licence: str | None) -> ModelCardData:
    """Metadata of a card: base model, data, tags, and the scores as a `model-index`.

    Args:
        recipe: Recipe of the run.
        metadata: Record of the run; its scores are used.
        licence: As the hub names it.
    """
    base, data = hub_id(recipe.model), hub_id(recipe.data)
    results = _eval_results(recipe, metadata)
    optional: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter" if base else None}
    optional |= {"datasets": [data] if data else None, "license": licence}
    if results:
        optional |= {"model_name": recipe.name, "eval_results": results}
    return ModelCardData(
        library_name="sfa-adapters",
        pipeline_tag="image-text-to-text",
        tags=["sfa", "structural-attention-bias", "document-understanding", recipe.family.replace("_", "-")],
        **{key: value for key, value in optional.items() if value is not None},
    )


def _eval_results(recipe: Recipe, metadata: RunMetadata) -> list[EvalResult]:
    results = []
    for table in metadata.scores:
        if table.get("host"):  # of another host, for comparison
            continue
        data = str(table.get("data") or recipe.data)
        for score in table.get("scores", ()):
            if score["mean"] is None or score["mean"] != score["mean"]:  # nothing was scored
                continue
            results.append(
                EvalResult(
                    task_type="visual-question-answering",
                    dataset_type=hub_id(data) or plain_name(data),
                    dataset_name=plain_name(data),
                    dataset_config=recipe.data_config,
                    dataset_split=str(table.get("split") or recipe.eval_split),
                    metric_type=METRIC_NAMES.get(str(table["metric"]), str(table["metric"])),
                    metric_name=f"{table['metric']} ({score['group']})",
                    metric_value=round(score["mean"], 4),
                    metric_args={
                        "questions": score["of"],
                        "interval_95": [round(score[x], 4) for x in ("low", "high")],
                    },
                )
            )
    return results


def plain_name(name: str) -> str:
    """A name without the folders of the machine, the last part of a path."""
    return Path(name).name or name
