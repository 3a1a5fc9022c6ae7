"""One page for each kind of whole vision-language model, from its record and its recipes, in docs/hosts/.

The record (`VLMSpec`) says what the model is and what does not work with it; the recipes are the commands. Git ignores
the folder.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

from sphinx.application import Sphinx

from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.catalog import RECIPES
from sfa_adapters.vlm.records import registered_vlms
from sfa_adapters.vlm.spec import VLMSpec
from sphinx_parts.links import DOCS
from sphinx_parts.project_pages import write_if_new

__all__ = ["connect", "page"]

_FEATURES = {
    "train": "recipes and training",
    "adat": "[adaptive tokens](../adat.md)",
    "dymu": "[merging of tokens, DyMU](../dymu.md)",
    "fastv": "[dropping of image tokens, FastV](../fastv.md)",
    "heads": "[pruning of attention heads](../heads.md)",
    "text_density": "[evidence by density of text, SCR](../scr.md)",
    "memory": "[prediction of memory](../device_plans.md)",
}


def _head(module: ModuleType) -> tuple[str, str]:
    """The first paragraph of a module's docstring in one line, and the rest as it stands."""
    first, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    return " ".join(first.split()), rest


def _recipe_module(recipe: Recipe) -> ModuleType:
    """The file of a recipe: its name begins with that of the file."""
    prefix = "sfa_adapters.recipes."
    names = [name for name in sys.modules if name.startswith(prefix) and "." not in name[len(prefix) :]]
    return sys.modules[max((n for n in names if recipe.name.startswith(n[len(prefix) :])), key=len)]


def _commands(recipes: list[Recipe]) -> list[str]:
    first = recipes[0].name
    lines = ["## Commands", "", "```sh"]
    lines += [f"sfa train {first} --nano        # the whole path on a CPU, small"]
    lines += [f"sfa plan {first} --gpus 1 --memory 24GB        # does it fit?"]
    lines += [f"sfa train {recipe.name}        # {recipe.model}" for recipe in recipes]
    return [
        *lines,
        "```",
        "",
        "`--nano` takes a small model of this class, and `sfa plan` downloads nothing. Settings, data and results are "
        "in [recipes](../recipes.md).",
        "",
    ]


def _in_python(spec: VLMSpec, model: str) -> list[str]:
    return [
        "## In Python",
        "",
        "```python",
        f"from transformers import {spec.model_class}",
        "",
        "from sfa_adapters import describe, inject_sfa",
        "",
        f'model = {spec.model_class}.from_pretrained("{model}")',
        "model = inject_sfa(model)     # in place; save_sfa and load_sfa for the adapter",
        "print(describe(model))",
        "```",
        "",
    ]


def _limits(spec: VLMSpec) -> list[str]:
    reasons = {name: spec.refusal(name) for name in _FEATURES}
    lines = ["## What works", "", "| feature | |", "|---|---|", "| [structural bias](../sfa.md) | works |"]
    for name, label in _FEATURES.items():
        reason = reasons[name]
        text = "works" if reason is None else reason.removeprefix(f"{spec.title}: ").replace("|", "/")
        lines.append(f"| {label} | {text} |")
    return [
        *lines,
        "",
        "What is refused raises an error with this reason. What works is tested on small models of this "
        "class ([contract suite](../adding_a_host.md#the-contract-suite)).",
        "",
    ]


def page(spec: VLMSpec) -> str:
    """The page of one kind of model.

    Args:
        spec: Its record.
    """
    recipes = [recipe for recipe in RECIPES.values() if recipe.family == spec.name]
    module = next(
        m
        for n, m in sys.modules.items()
        if n.startswith("sfa_adapters.recipes.vlms.") and getattr(m, "SPEC", None) is spec
    )
    first, _ = _head(module)
    lines = [f"# {spec.title}", "", first.partition(": ")[2][:1].upper() + first.partition(": ")[2][1:], ""]
    lines += [f"Class `{spec.model_class}` of transformers; `family={spec.name}` in recipes and in what is saved.", ""]
    if recipes:
        lines += _commands(recipes)
    lines += _in_python(spec, recipes[0].model if recipes else "FOLDER_OR_NAME")
    lines += _limits(spec)
    heads = {_recipe_module(recipe).__name__: _head(_recipe_module(recipe)) for recipe in recipes}
    if heads:
        lines += ["## What is known about the recipes", ""]
    for title, rest in heads.values():
        lines += [title, "", "```text", rest.rstrip(), "```", ""]
    return "\n".join(lines)


def _write(app: Sphinx) -> None:
    folder = DOCS / "hosts"
    specs = sorted(registered_vlms().values(), key=lambda spec: spec.title.lower())
    wanted = {folder / "index.md"} | {folder / f"{spec.name}.md" for spec in specs}
    for spec in specs:
        write_if_new(folder / f"{spec.name}.md", page(spec))
    rows = [
        f"| [{spec.title}]({spec.name}.md) | `{spec.model_class}` | "
        + (", ".join(f"`{r.name}`" for r in RECIPES.values() if r.family == spec.name) or "none")
        + " |"
        for spec in specs
    ]
    names = "\n".join(spec.name for spec in specs)
    text = (
        "# Hosts\n\nWhole vision-language models with a record of their own. Written from the records and recipes. SFA "
        "itself works on more: every tower of [Towers and hosts](../backbones.md), in any model.\n\n"
        "| host | class | recipes |\n|---|---|---|\n" + "\n".join(rows) + "\n\nAnother one: "
        "[Adding a vision-language model](../adding_a_host.md).\n\n"
        f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{names}\n```\n"
    )
    write_if_new(folder / "index.md", text)
    for old in set(folder.iterdir()) - wanted:
        old.unlink()


def connect(app: Sphinx) -> None:
    """Writes the pages before Sphinx looks for them."""
    app.connect("builder-inited", _write)
