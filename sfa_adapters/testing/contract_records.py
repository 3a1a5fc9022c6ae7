"""What a record (`VLMSpec`) says about its model: names, parts, images, memory, each held against the small model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sfa_adapters import inject_sfa
from sfa_adapters.data.collator import Collator
from sfa_adapters.data.preprocess import page_of
from sfa_adapters.errors import RecipeError, SFAError
from sfa_adapters.hosts.load import load_host
from sfa_adapters.hosts.prepare import Host, unread_prefixes
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.predict import predict_memory
from sfa_adapters.memory.shapes import lengths_of
from sfa_adapters.memory.weights import count_parameters
from sfa_adapters.testing.host_suite import PAGES, HostSuite, examples
from sfa_adapters.tower_search import find_tower
from sfa_adapters.vlm.parts import find_decoder, image_token_ids
from sfa_adapters.vlm.records import find_spec
from sfa_adapters.vlm.spec import VLMSpec

__all__ = ["RecordContract"]


class RecordContract(HostSuite):
    """The record fits the model that it is about."""

    def test_the_record_is_that_of_the_model(self, spec: VLMSpec, built: tuple[Any, Any]) -> None:
        """The small model, its core and its configuration are of the kind that the record says."""
        model, processor = built
        assert find_spec(model) is spec
        assert type(model).__name__ == spec.model_class
        assert model.config.model_type == spec.model_type
        tower = find_tower(model)
        core = model.get_submodule(tower.name.rpartition(".")[0])
        assert find_spec(core) is spec, "classes must name the core that joins tower and language model, too."
        assert find_decoder(model).layers
        assert image_token_ids(model)
        assert getattr(processor, "image_processor", None) is not None

    def test_every_parameter_is_in_one_part(self, spec: VLMSpec, plain: Any) -> None:
        """With adapters and without. Attention layers are in the tower; words and their layers in the rest."""
        places = spec.places(plain)
        located, decoder = find_tower(plain), find_decoder(plain)
        assert places.tower == located.name
        names = {module: name for name, module in plain.named_modules()}
        tower = [name for name, _ in located.attentions]
        layers = [names[layer] for layer in decoder.layers]
        words = [names[plain.get_input_embeddings()], names[plain.get_output_embeddings()]]
        assert {places.part_of(name) for name in tower} == {"vision"}
        assert {places.part_of(name) for name in (*layers, *words)} == {"llm"}
        for name in (*tower, *layers):
            assert set(places.layer_classes) & set(_classes_around(plain, name)), f"layer_classes lacks that of {name}."
        inject_sfa(plain)
        assert "sfa" in {places.part_of(name) for name, _ in plain.named_parameters()}
        assert spec.places(plain) == places

    def test_recipes_take_it_or_say_why_not(self, spec: VLMSpec) -> None:
        """A record that refuses to be trained is refused where a recipe names it, with its reason."""
        reason = spec.refusal("train")
        if reason is None:
            assert Recipe(name="contract", model="model", family=self.family).family == self.family
            return
        with pytest.raises(SFAError, match=re.escape(reason)):
            Recipe(name="contract", model="model", family=self.family)

    def test_what_the_host_never_reads_is_named(self, recipe: Recipe, inputs: dict[str, Any]) -> None:
        """`unread` has what no gradient of the loss reaches, and nothing else: it would not be trained."""
        host = load_host(recipe.replace(gradient_checkpointing=False), "cpu")
        inside = f"{host.places.tower}."
        trains = {name for name, p in host.model.named_parameters() if p.requires_grad or name.startswith(inside)}
        host.model.get_submodule(host.places.tower).requires_grad_(True)
        host.model(**inputs, use_cache=False).loss.backward()
        silent = {name for name, p in host.model.named_parameters() if name in trains and p.grad is None}
        unread = {name for name in trains if name.startswith(unread_prefixes(host.model, host.places))}
        assert not silent - unread, f"No gradient reaches {', '.join(sorted(silent - unread))}; name them in unread."
        assert not unread - silent, f"unread has {', '.join(sorted(unread - silent))}, which the host reads."

    # -- images -------------------------------------------------------------------------------------------------------

    def test_the_setting_of_a_recipe_limits_an_image(self, loaded: Host) -> None:
        """A large page has more image tokens under a higher limit; without a setting every page has as many."""
        rules, recipe = loaded.spec.images, loaded.recipe
        assert rules is not None
        page = examples(PAGES[2:])[0]
        if rules.setting is None:
            assert {_image_tokens(loaded, recipe, entry) for entry in examples()} == {
                _image_tokens(loaded, recipe, page)
            }
            return
        lower = 1 if rules.setting == "max_tiles" else recipe.image_limit // 2
        limited: Any = {rules.setting: lower}
        try:
            fewer, more = recipe.replace(**limited), recipe
            tokens = _image_tokens(loaded, fewer, page)
        except RecipeError:  # the limit is the lowest one already
            limited = {rules.setting: 8 * lower}
            tokens, more = _image_tokens(loaded, recipe, page), recipe.replace(**limited)
        assert tokens < _image_tokens(loaded, more, page)

    @pytest.mark.parametrize("size", PAGES, ids=str)
    def test_boxes_follow_the_page_that_the_processor_gets(self, loaded: Host, size: tuple[int, int]) -> None:
        """A white box on black is white where `Page.place` says, and black around it."""
        height, width = size
        box = (width // 4, height // 4, width // 2, height // 2)
        image = np.zeros((height, width, 3), np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = 255
        page = page_of(image, loaded.processor, loaded.spec, loaded.recipe)
        left, top, right, bottom = page.place(box)
        inside, outside = (
            [page.image[round(y), round(x)].max() for y in (top + d, bottom - d) for x in (left + d, right - d)]
            for d in (4, -4)
        )
        assert min(inside) > 200
        assert max(outside) < 55

    # -- memory -------------------------------------------------------------------------------------------------------

    def test_memory_is_predicted_from_the_configuration(self, spec: VLMSpec, loaded: Host) -> None:
        """Every weight is counted, the largest page is as long as predicted, and more tokens need more memory."""
        config, recipe = loaded.model.config, loaded.recipe
        reason = spec.refusal("memory")
        if reason is not None:
            with pytest.raises(SFAError, match=re.escape(reason)):
                predict_memory(recipe, config, gpus=1)
            return
        counts = count_parameters(recipe, config)
        weights = dict(loaded.model.named_parameters())
        names = [name for name in weights if loaded.places.part_of(name) != "sfa"]
        assert sum(counts.parts.values()) == sum(weights[name].numel() for name in names)
        pages = [*examples(), *examples(PAGES[2:])]
        most = max(_image_tokens(loaded, recipe, page) for page in pages)
        assert most <= lengths_of(recipe, config).image < 2 * most
        one, four = (predict_memory(recipe, config, gpus=1, batch=batch) for batch in (1, 4))
        assert four.devices[0].activations > one.devices[0].activations > 0


def _classes_around(model: nn.Module, name: str) -> Iterator[str]:
    """Class names of a module and of those that it lies in."""
    while name:
        yield type(model.get_submodule(name)).__name__
        name = name.rpartition(".")[0]


def _image_tokens(host: Host, recipe: Recipe, entry: dict[str, Any]) -> int:
    batch = Collator(host.processor, host.spec, recipe)([entry])
    return int(torch.isin(batch["input_ids"], torch.tensor(image_token_ids(host.model))).sum())
