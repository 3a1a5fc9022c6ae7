"""`sfa inspect`: builds any model without its weights, and lists what SFA would add.

    sfa inspect OpenGVLab/InternVL3_5-8B-HF
    sfa inspect vit_base_patch16_siglip_384

Only a configuration is read; the model is built on the meta device, so an 8B model takes seconds and no memory.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sfa_adapters import SFAConfig, describe
from sfa_adapters.class_names import qualified_name
from sfa_adapters.errors import SFAError
from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.heads.metadata import pruned_folder
from sfa_adapters.heads.prune import Target, slice_heads
from sfa_adapters.heads.pruned_files import PLAN_NAME, read_pruned
from sfa_adapters.heads.slicing import Edits
from sfa_adapters.inject import Description
from sfa_adapters.install import install_command
from sfa_adapters.tower_search import find_tower

if TYPE_CHECKING:
    from sfa_adapters.hosts.recipe import Recipe

__all__ = ["Inspection", "LayerRow", "ModelNotFoundError", "build_without_weights", "inspect_model"]

HUB_TIMEOUT = 10.0  # seconds


class ModelNotFoundError(SFAError, ValueError):
    """A model name leads to no configuration (missing folder, unknown name, no network, remote code not allowed)."""


@dataclass(frozen=True)
class LayerRow:
    """One attention layer of a tower.

    Attributes:
        index: Its number in the tower.
        path: Its path in the model.
        attention: Its class.
        parameters: Structural parameters it would get; 0 for a layer that the host does not read.
    """

    index: int
    path: str
    attention: str
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """Result of `sfa inspect`.

    Attributes:
        model: The given name.
        model_class: Class of the model that was built.
        model_parameters: Its parameters.
        sfa: What SFA would add.
        layers: The attention layers of its tower.
    """

    model: str
    model_class: str
    model_parameters: int
    sfa: Description
    layers: tuple[LayerRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


def inspect_model(name: str, trust_remote_code: bool = False) -> Inspection:
    """Builds a model without weights and counts what SFA would add.

    Args:
        name: A model id of the Hugging Face hub, a local folder with a `config.json` (also one of `save_pruned`), a
            timm model name, a recipe, or the folder of a run or of its checkpoint (of these two, the bias is that
            of the recipe).
        trust_remote_code: Run modelling code that comes with the model.

    Raises:
        ModelNotFoundError: No configuration was found under the name.
        RecipeError: The record of a run, or that of pruned heads, cannot be read.
        NoMatchingBackboneError: The model has no vision tower that a registered backbone fits.
    """
    recipe = _recipe_of(name)
    model = build_without_weights(name if recipe is None else recipe.model, trust_remote_code)
    if pruned_folder(name):
        _remove_heads(model, Path(name))
    config = None
    if recipe is not None:
        layers = None if recipe.sfa_layers is None else list(recipe.sfa_layers)
        config = SFAConfig(terms=list(recipe.sfa_terms), layers_to_transform=layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    located, sfa = find_tower(model), describe(model, config)
    layers = tuple(
        LayerRow(index, path, qualified_name(module), sfa.layer_parameters[index])
        for index, (path, module) in enumerate(located.attentions)
    )
    return Inspection(name, type(model).__name__, total, sfa, layers)


def _recipe_of(name: str) -> Recipe | None:
    """The recipe of that name, or of the run that a folder holds."""
    from sfa_adapters.evaluation.open_host import find_run
    from sfa_adapters.recipes.catalog import RECIPES
    from sfa_adapters.training.checkpoints import saved_recipe

    path = Path(name).expanduser()
    if path.is_dir():
        run = None if (path / "config.json").is_file() else find_run(path)
        return None if run is None else saved_recipe(run)
    return RECIPES.get(name)


def _remove_heads(model: nn.Module, folder: Path) -> None:
    """Prunes a model on the meta device by the head plan in a folder of `save_pruned`."""
    pruned, _ = read_pruned(folder)
    for path in (path for path, heads in pruned.plan.removed.items() if heads):
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise ModelNotFoundError(f"{folder}: the model has no {path}, which {PLAN_NAME} names.") from error
        module.to_empty(device="cpu")  # one layer at a time: slices need memory
        target, edits = Target(path, path, module, read_geometry(path, module)), Edits()
        slice_heads(edits, target, pruned.plan)
        if path in pruned.biases:
            weight = target.output.get_parameter("weight")
            edits.put(target.output, "bias", weight.new_zeros(len(weight)), weight)
        edits.commit()
        module.to("meta")


def build_without_weights(name: str, trust_remote_code: bool = False) -> nn.Module:
    """Builds a model on the meta device from its configuration alone.

    Args:
        name: As for `inspect_model`, but neither a recipe nor the folder of a run.
        trust_remote_code: Run modelling code that comes with the model.

    Raises:
        ModelNotFoundError: No configuration was found under the name.
    """
    path = Path(name).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{folder} has no config.json and no recipe.json; give the folder of a saved model or of a run."
            )
        return _from_config(str(folder), trust_remote_code)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"There is no folder {name}.")
    model = _from_catalog(name) or _from_timm(name)
    if model is not None:
        return model
    return _from_config(name, trust_remote_code)


def _from_catalog(name: str) -> nn.Module | None:
    """The full-size host of a recipe, whose configuration comes with this library: nothing is downloaded."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import meta_device_safe_creation_ops

    from sfa_adapters.recipes.catalog import RECIPES, architecture

    recipe = next((recipe for recipe in RECIPES.values() if recipe.model == name), None)
    if recipe is None:
        return None
    with torch.device("meta"), meta_device_safe_creation_ops():
        return AutoModelForImageTextToText.from_config(architecture(recipe))


def _near(name: str) -> str:
    """A hint where a recipe or a timm model has nearly this name."""
    from sfa_adapters.recipes.catalog import RECIPES

    known = [*RECIPES, *(recipe.model for recipe in RECIPES.values())]
    if "/" not in name and importlib.util.find_spec("timm") is not None:
        import timm

        known += timm.list_models()
    near = get_close_matches(name, known, 1, 0.8)
    return f" Did you mean {near[0]}?" if near else ""


def _from_timm(name: str) -> nn.Module | None:
    if importlib.util.find_spec("timm") is None:
        return None
    import timm

    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def _from_config(name: str, trust_remote_code: bool) -> nn.Module:
    import transformers
    from huggingface_hub import HfApi, try_to_load_from_cache
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
    from transformers.initialization import meta_device_safe_creation_ops

    # Deprecations inside a configuration file are none that the user can fix.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not Path(name).is_dir() and not isinstance(try_to_load_from_cache(name, "config.json"), str):
                # Fails at once, where the download would try for half a minute.
                HfApi().model_info(name, timeout=HUB_TIMEOUT)
            config: Any = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            # The class that the checkpoint was saved from; the automatic choice may leave out its language model.
            named = [getattr(transformers, key, None) for key in getattr(config, "architectures", None) or []]
            with torch.device("meta"), meta_device_safe_creation_ops():
                if named and named[0] is not None:
                    return named[0]._from_config(config)
                is_vlm = type(config) in AutoModelForImageTextToText._model_mapping
                auto = AutoModelForImageTextToText if is_vlm else AutoModel
                return auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # remote code and the client of the hub raise errors of any class
        raise ModelNotFoundError(_reason(name, error)) from error


def _reason(name: str, error: BaseException) -> str:
    """A message of one line for the reason that a configuration cannot be loaded."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(error).split())

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(entry, kinds) for entry in chain)

    needs_timm = "/" not in name and importlib.util.find_spec("timm") is None
    hint = _near(name) + (f" For timm names: {install_command('timm')}." if needs_timm else "")
    if "trust_remote_code" in text:
        return f"{name} brings its own modelling code; read it, then allow it with --trust-remote-code."
    if caused_by(errors.GatedRepoError):
        return f"{name} is a gated model; accept its terms on the hub and log in with: hf auth login"
    if caused_by(errors.RepositoryNotFoundError, errors.HFValidationError):
        return f"{name} is neither a folder nor a timm model nor a model of the Hugging Face hub.{hint}"
    if caused_by(errors.EntryNotFoundError) and not caused_by(errors.LocalEntryNotFoundError):
        return f"{name} has no config.json on the Hugging Face hub."
    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if caused_by(*offline) or any(isinstance(entry, OSError) and entry.errno for entry in chain):
        return (
            f"The Hugging Face hub could not be reached and {name} is not in the local cache. Check the network, or "
            f"give a local folder with a config.json.{hint}"
        )
    return f"{name}: {text}{hint}"
