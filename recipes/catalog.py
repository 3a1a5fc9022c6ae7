"""The recipes of this library by name, and the full-size configuration of their hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType

from transformers import PretrainedConfig

from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.load import read_config
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes import (
    gemma3_4b,
    gemma4_e2b,
    glm_ocr,
    granite_docling_258m,
    internvl3_5_8b,
    lighton_ocr_1b,
    llava_1_5_7b,
    llava_onevision_7b,
    paddleocr_vl,
    qwen2_5_vl_7b,
    qwen3_5,
    qwen3_vl,
    smolvlm2_2_2b,
    smolvlm2_500m,
)
from sfa_adapters.recipes.nano.checkpoint import NANO
from sfa_adapters.recipes.nano.hosts import build_host

__all__ = ["RECIPES", "architecture", "find_recipe", "training_rows"]

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            internvl3_5_8b.recipe(),
            internvl3_5_8b.published(),
            llava_onevision_7b.recipe(),
            llava_1_5_7b.recipe(),
            qwen2_5_vl_7b.recipe(),
            *map(qwen3_vl.recipe, qwen3_vl.SIZES),
            *map(qwen3_5.recipe, qwen3_5.SIZES),
            glm_ocr.recipe(),
            paddleocr_vl.recipe(),
            smolvlm2_2_2b.recipe(),
            smolvlm2_500m.recipe(),
            granite_docling_258m.recipe(),
            gemma3_4b.recipe(),
            gemma4_e2b.recipe(),
            lighton_ocr_1b.recipe(),
        )
    }
)
# The hosts whose size is known without a download.
_ARCHITECTURES: Mapping[str, Callable[[], PretrainedConfig]] = {
    internvl3_5_8b.recipe().model: internvl3_5_8b.architecture,
    llava_onevision_7b.recipe().model: llava_onevision_7b.architecture,
    llava_1_5_7b.recipe().model: llava_1_5_7b.architecture,
    qwen2_5_vl_7b.recipe().model: qwen2_5_vl_7b.architecture,
    **{qwen3_vl.recipe(size).model: partial(qwen3_vl.architecture, size) for size in qwen3_vl.SIZES},
    **{qwen3_5.recipe(size).model: partial(qwen3_5.architecture, size) for size in qwen3_5.SIZES},
    glm_ocr.recipe().model: glm_ocr.architecture,
    paddleocr_vl.recipe().model: paddleocr_vl.architecture,
    smolvlm2_2_2b.recipe().model: smolvlm2_2_2b.architecture,
    smolvlm2_500m.recipe().model: smolvlm2_500m.architecture,
    granite_docling_258m.recipe().model: granite_docling_258m.architecture,
    gemma3_4b.recipe().model: gemma3_4b.architecture,
    gemma4_e2b.recipe().model: gemma4_e2b.architecture,
    lighton_ocr_1b.recipe().model: lighton_ocr_1b.architecture,
}

# Rows of hub datasets, from their cards, so that the steps of a run are known without a download.
_ROWS: Mapping[tuple[str, str | None, str], int] = {
    ("HuggingFaceM4/ChartQA", None, "train"): 28_299,
    ("HuggingFaceM4/ChartQA", None, "val"): 1_920,
    ("ahmed-masry/ChartQA", None, "train"): 28_299,
    ("lmms-lab/textvqa", None, "train"): 34_602,
    ("lmms-lab/DocVQA", "DocVQA", "validation"): 5_349,
    ("lmms-lab/DocVQA", "InfographicVQA", "validation"): 2_801,
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name; case does not matter, and dashes and dots count as underscores.

    Args:
        name: Name of the recipe.

    Raises:
        RecipeError: There is none; suggests the nearest name.
    """
    wanted = name.lower().replace("-", "_").replace(".", "_")
    if wanted in RECIPES:
        return RECIPES[wanted]
    near = get_close_matches(wanted, RECIPES, 1, 0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise RecipeError(f"No recipe {name!r}. {hint}There are: {', '.join(RECIPES)}.")


def architecture(recipe: Recipe) -> PretrainedConfig:
    """The configuration of a recipe's host, without a download for the hosts of the catalog.

    Args:
        recipe: Its `model` names the host: one of the catalog, `nano:` and a family, a folder, or another hub id.

    Returns:
        The configuration. Weights are not read.

    Raises:
        RecipeError: The host is none of the catalog's, and its configuration cannot be read or is of another family.
    """
    if recipe.model.startswith(NANO):
        return build_host(recipe.family)[0].config
    if recipe.model in _ARCHITECTURES:
        return _ARCHITECTURES[recipe.model]()
    return read_config(recipe)


def training_rows(recipe: Recipe) -> int | None:
    """Number of training questions of a recipe, if it is known without reading them; else None.

    Args:
        recipe: The recipe.
    """
    rows = _ROWS.get((recipe.data, recipe.data_config, recipe.train_split))
    if rows is None and recipe.data in ("charts", "pages"):
        rows = recipe.limit
    return rows if rows is None or recipe.limit is None else min(rows, recipe.limit)
