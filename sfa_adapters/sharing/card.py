"""The model card of a trained adapter, only from what the run recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.moved import old_keywords
from sfa_adapters.sharing.metadata import card_metadata, hub_id, plain_name
from sfa_adapters.sharing.run_metadata import RunMetadata, read_run_metadata
from sfa_adapters.training.checkpoints import RECORD, saved_recipe

__all__ = ["MARK", "model_card"]

# A card without it was written by hand, and is left alone.
MARK = "<!-- written by sfa-adapters; remove this line to keep your changes -->"
UNKNOWN = "not recorded"
FILES = {
    "adapter_model.safetensors": "SFA",
    "tuned.safetensors": "tuned base",
    "lora/adapter_model.safetensors": "LoRA",
}


@old_keywords(facts="metadata")
def model_card(
    folder: str | Path, *, metadata: RunMetadata | None = None, licence: str | None = None, repo_id: str | None = None
) -> ModelCard:
    """The model card of what `save_trained` wrote.

    Args:
        folder: The trained adapter: `recipe.json`, `adapter_config.json` and weights.
        metadata: Command, hardware, scores; by default those of `run.json` in the folder.
        licence: As the hub names it.
        repo_id: Name of its repository, for the lines that load it.

    Returns:
        Metadata and text.

    Raises:
        RecipeError: The folder has no recipe, or a file cannot be read.
    """
    folder = Path(folder)
    recipe, record = saved_recipe(folder), _json(folder / RECORD)
    metadata = read_run_metadata(folder) if metadata is None else metadata
    sizes = {
        label: sum(prod(shape[1:]) for shape in record["tensors"][file].values())
        for file, label in FILES.items()
        if file in record["tensors"]
    }
    sfa = _json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    data = card_metadata(recipe, metadata, licence)
    parts = [
        _opening(recipe, sfa),
        _loading(recipe, sizes, repo_id),
        _adapter(recipe, sfa, sizes),
        _training(recipe, metadata, record["versions"]),
        _results(recipe, metadata),
        _limits(recipe),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n" + "\n\n".join(parts) + "\n")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from error


# -- text -------------------------------------------------------------------------------------------------------------


def _opening(recipe: Recipe, sfa: Mapping[str, Any] | None) -> str:
    base = hub_id(recipe.model)
    linked = f"[{base}](https://huggingface.co/{base})" if base else f"`{plain_name(recipe.model)}` (a local folder)"
    what = "A structural attention bias for the vision tower of" if sfa else "Fine-tuned parts of"
    return f"# {recipe.name}\n\n{what} {linked}, trained with `sfa-adapters` on {_data(recipe)}."


def _data(recipe: Recipe) -> str:
    if recipe.data in ("charts", "pages"):
        return f"rendered {recipe.data}"
    dataset = hub_id(recipe.data)
    name = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else f"`{plain_name(recipe.data)}`"
    return name + (f" ({recipe.data_config})" if recipe.data_config else "")


def _loading(recipe: Recipe, sizes: Mapping[str, int], repo_id: str | None) -> str:
    where = repo_id or "user/name"
    text = (
        "## Load it\n\n```python\nfrom sfa_adapters.sharing import fetch\n"
        "from sfa_adapters.training.checkpoints import load_trained, saved_recipe\n"
        "from sfa_adapters.hosts.load import load_host\n\n"
        f'folder = fetch("{where}")\nhost = load_host(saved_recipe(folder), train=False)  # the base model and its '
        "processor\nload_trained(host, folder)  # host.model, host.processor\n```"
    )
    if set(sizes) == {"SFA"}:
        text += "\n\nOr with PEFT: `from sfa_adapters import SFAConfig`, then "
        text += f'`PeftModel.from_pretrained(base_model, "{where}")`.'
    elif "SFA" in sizes:
        text += (
            "\n\n`PeftModel.from_pretrained` reads the bias alone, without the "
            f"{' and the '.join(label for label in sizes if label != 'SFA')}: that is another model than the one "
            "measured below."
        )
    return text


def _adapter(recipe: Recipe, sfa: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> str:
    rows = [("base model", plain_name(recipe.model) if not hub_id(recipe.model) else recipe.model)]
    rows.append(("revision", recipe.revision or "not pinned"))
    if sfa is not None:
        tower = sfa.get("tower") or {}
        layers = len(sfa.get("target_modules") or ())
        grid = "x".join(map(str, tower["grid"])) if tower.get("grid") else "any size"
        rows += [
            ("layers with a bias", f"{layers} of {tower.get('num_layers', UNKNOWN)}"),
            ("heads per layer", str(tower.get("num_heads", UNKNOWN))),
            ("terms", ", ".join(sfa.get("terms", ()))),
            ("start", _start(recipe)),
            ("grid", f"{grid} patches, {tower.get('prefix_tokens', 0)} prefix tokens"),
        ]
    rows += [(f"parameters: {label}", f"{count:,}") for label, count in sizes.items()]
    if recipe.lora_llm:
        rows.append(("LoRA on the language model", f"rank {recipe.lora_llm}"))
    if recipe.adat is not None:
        rows.append(("adaptive tokens", f"{recipe.adat:g} of the tower's tokens are kept"))
    return "## What it is\n\n" + _table(rows)


def _training(recipe: Recipe, metadata: RunMetadata, versions: Mapping[str, str]) -> str:
    length = f"{recipe.max_steps} steps" if recipe.max_steps else f"{recipe.epochs:g} epochs"
    trained_on = f"{recipe.train_split} split" + (f", at most {recipe.limit:,} questions" if recipe.limit else "")
    rates = {
        "all": recipe.lr,
        "tower": recipe.vision_lr,
        "projector": recipe.projector_lr,
        "language model": recipe.llm_lr,
    }
    rates |= {"SFA": recipe.sfa_lr if recipe.sfa else None}
    trained = [
        ("tower", recipe.freeze_vision),
        ("projector", recipe.freeze_projector),
        ("language model", recipe.freeze_llm),
    ]
    losses = {"entropy": recipe.scr_entropy, "grounding": recipe.scr_grounding, "stability": recipe.scr_stability}
    rows = [
        ("data", f"{_data(recipe)}, {trained_on}"),
        ("questions trained on", UNKNOWN if metadata.examples is None else f"{metadata.examples:,}"),
        ("left out (broken images, ...)", UNKNOWN if metadata.skipped is None else f"{metadata.skipped:,}"),
        ("tuned parts of the base", ", ".join(name for name, frozen in trained if not frozen) or "none"),
        ("length", length + (f"; {metadata.steps:,} steps were made" if metadata.steps is not None else "")),
        ("questions per step", str(recipe.batch_size)),
        ("learning rates", ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate is not None)),
        ("SCR terms", ", ".join(f"{name} {weight:g}" for name, weight in losses.items() if weight) or "none"),
        ("precision and plan", f"{recipe.dtype}, {recipe.plan}"),
        ("seed", str(recipe.seed)),
        ("hardware", metadata.hardware or UNKNOWN),
        ("processes", str(metadata.processes or UNKNOWN)),
        ("training time", UNKNOWN if metadata.seconds is None else _duration(metadata.seconds)),
        ("largest SFA scalars at the end", _scalars(recipe, metadata)),
        ("training loss at the end", UNKNOWN if metadata.loss is None else f"{metadata.loss:.4g}"),
        ("command", f"`{metadata.command}`" if metadata.command else UNKNOWN),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return "## How it was trained\n\n" + _table(rows) + f"\n\nAll settings: `{RECORD}`."


def _scalars(recipe: Recipe, metadata: RunMetadata) -> str:
    """The largest scalars, in words: below about 1 logit a bias hardly acts, which explains its scores."""
    if not recipe.sfa:
        return "no SFA"
    if not metadata.scalars:
        return UNKNOWN
    return ", ".join(f"{term} {size:.2g}" for term, size in metadata.scalars.items()) + " logits"


def _start(recipe: Recipe) -> str:
    if recipe.init == "normal":
        return "normal"
    ramp = f", from 0 over {recipe.init_warmup_steps:,} steps" if recipe.init_warmup_steps else ""
    return f"{recipe.init}, {recipe.init_strength:g} logits{ramp}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _results(recipe: Recipe, metadata: RunMetadata) -> str:
    if not metadata.scores:
        return "## Results\n\nIt was not evaluated."
    blocks = ["## Results"]
    for table in metadata.scores:
        data = plain_name(str(table.get("data") or recipe.data))
        host = f" ({table['host']})" if table.get("host") else ""
        lines = [f"{data}, {table.get('split') or recipe.eval_split} split, metric `{table['metric']}`{host}:", ""]
        lines += ["| | questions | % | 95% interval |", "| --- | --- | --- | --- |"]
        for score in table.get("scores", ()):
            lines.append(f"| {score['group']} | {score['of']:,} | {_percent(score)} |")
        counts = {name: table.get(name) for name in ("failed", "truncated", "unscored")}
        listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        lines += ["", f"Of {table.get('rows', '?')} questions: {listed}."] if listed else []
        blocks.append("\n".join(lines))
    blocks.append(
        "Intervals are percentile bootstraps over the questions; they say nothing about other seeds or other data. "
        "Failed questions (broken images) count as wrong."
    )
    return "\n\n".join(blocks)


def _percent(score: Mapping[str, Any]) -> str:
    if score["mean"] is None or score["mean"] != score["mean"]:
        return "- | -"
    return f"{100 * score['mean']:.1f} | {100 * score['low']:.1f} to {100 * score['high']:.1f}"


def _limits(recipe: Recipe) -> str:
    lines = [
        "It needs the base model above and `sfa-adapters`. The bias adds to attention scores, so it cannot be merged "
        "into weights, and servers that bring their own attention (vLLM, SGLang) do not apply it.",
        "It was trained on the data named above; nothing is known about other pages, languages and questions.",
        "Answers can be wrong or made up. Check numbers against the page.",
        "The licences of the base model and of the data still apply.",
    ]
    if recipe.plan == "nf4":
        lines.append(
            "The language model was in 4 bits while it was trained; with one in 16 bits the answers differ somewhat."
        )
    if recipe.revision is None:
        lines.append("The revision of the base model was not pinned; a later one may differ.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = [f"| {name} | {' '.join(text.split()).replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(["| | |", "| --- | --- |", *cells])
