"""Models of vLLM whose language model gets fewer image tokens: `SFA_IMAGE_TOKENS=0.5 vllm serve MODEL`.

vLLM computes the number of tokens of an image in the model's processor, so the choice is made there and travels with
the pixels of the request. The model then drops the other tokens behind its tower, or gets their patches no more
(`blank`, `duplicates`), and positions are those of the whole page. Each class here is vLLM's own with these places
changed; it is registered under vLLM's name for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]
from vllm.multimodal.inputs import MultiModalFieldConfig  # pyright: ignore[reportMissingImports]

from sfa_adapters.errors import ServingError
from sfa_adapters.serving.image_tokens import (
    KEPT,
    TOKENS,
    before_tower,
    chooser,
    kept_features,
    kept_positions,
    token_rule,
)
from sfa_adapters.serving.kept_groups import metadata_of_kept, written_page
from sfa_adapters.serving.vllm_options import REDUCED, logger

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    """A class of vLLM by its name, with fewer image tokens; vLLM imports it from here when it builds the model."""
    if name not in REDUCED:
        raise AttributeError(name)
    return _reduced(getattr(import_module(f"vllm.model_executor.models.{REDUCED[name]}"), name))


@cache
def _reduced(base: Any) -> Any:
    made = base._processor_factory

    class Processor(made.processor):
        def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
            fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
            grids = hf_inputs.get("image_grid_thw")
            rule = token_rule()
            if grids is None or rule is None or not len(grids):
                return fields
            if hf_inputs.get("pixel_values") is None:
                raise ServingError(
                    f"{TOKENS} reads the pixels of images; features that were computed before have none."
                )
            model = self.info.ctx.model_config
            images = self.info.get_image_processor(**hf_processor_mm_kwargs)
            statistics = tuple(images.image_mean), tuple(images.image_std)
            patches = hf_inputs["pixel_values"]
            kept = chooser(rule, model.model, model.revision).kept(patches, grids, statistics)
            hf_inputs[KEPT] = torch.cat(kept)
            sizes = torch.tensor([len(one) for one in kept])
            fields = {**fields, KEPT: MultiModalFieldConfig.flat_from_sizes("image", sizes)}
            if before_tower():
                unit = len(patches) // int(sizes.sum())
                hf_inputs["pixel_values"] = patches[hf_inputs[KEPT].repeat_interleave(unit)]
                counts = torch.stack([one.sum() for one in kept]) * unit
                fields["pixel_values"] = MultiModalFieldConfig.flat_from_sizes("image", counts)
            return fields

        def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
            updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

            def shortened(full: Any) -> Any:
                def replacement(item: int) -> Any:
                    content, image = full(item), out_mm_kwargs["image"][item]
                    if KEPT not in image:
                        return content
                    kept = image[KEPT].data
                    if len(content) != len(kept):
                        raise ServingError(f"{TOKENS}: {len(content)} tokens of an image, {len(kept)} chosen from.")
                    return content[: int(kept.sum())]

                return replacement

            return [
                replace(update, replacement=shortened(update.replacement)) if update.modality == "image" else update
                for update in updates
            ]

    class Dummies(made.dummy_inputs):
        def _get_dummy_images(self, **kwargs: Any) -> Any:
            """White pages, with which vLLM measures memory, would lose all of their patches."""
            images = super()._get_dummy_images(**kwargs)
            return [written_page(*images[0].size)] * len(images) if images and before_tower() else images

    class Model(base):
        _sfa_checked = False  # set at the first image
        _sfa_kept: Tensor | None = None  # of the images that are encoded now

        def embed_multimodal(self, **kwargs: Any) -> Any:
            kept = kwargs.pop(KEPT, None)
            if kept is None:
                if kwargs.get("pixel_values") is not None:
                    raise ServingError(f"{TOKENS}: images came without the choice of their tokens.")
                return super().embed_multimodal(**kwargs)
            parts = list(kept) if isinstance(kept, list | tuple) else [kept]
            self._sfa_kept = torch.cat(parts).bool()
            features = super().embed_multimodal(**kwargs)
            chosen = features if before_tower() else kept_features(features, self._sfa_kept)
            if not self._sfa_checked:
                _check_first(sum(map(len, chosen)), len(self._sfa_kept))
                self._sfa_checked = True
            return chosen

        def _process_image_input(self, image_input: Any) -> Any:
            if not before_tower():
                return super()._process_image_input(image_input)
            grids, kept, merge = image_input["image_grid_thw"].tolist(), self._sfa_kept, self.visual.spatial_merge_size
            assert kept is not None
            prepared = self.visual.prepare_encoder_metadata(grids)
            metadata = {**metadata_of_kept(prepared, kept, merge**2), KEPT: kept}
            features = self.visual(image_input["pixel_values"], grid_thw=grids, encoder_metadata=metadata)
            counts = [frames * rows * columns // merge**2 for frames, rows, columns in grids]
            return features.split([int(part.sum()) for part in kept.split(counts)])

        def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> Any:
            return kept_positions(super().get_mrope_input_positions, input_tokens, mm_features)

    for made_class, name in ((Processor, made.processor.__name__), (Model, base.__name__)):
        made_class.__name__ = made_class.__qualname__ = name
    Model.__module__ = __name__
    return MULTIMODAL_REGISTRY.register_processor(Processor, info=made.info, dummy_inputs=Dummies)(Model)


def _check_first(stay: int, of: int) -> None:
    """Says what happens to the first image.

    Raises:
        ServingError: Nothing is left out where a share must be.
    """
    rule = token_rule()
    if isinstance(rule, float) and stay >= of and of * (1 - rule) >= 1:  # a share near 1 leaves small images whole
        raise ServingError(f"{TOKENS}: all {of} tokens of the first image stay, so nothing is left out.")
    logger.info("SFA: the language model gets %d of %d tokens of the first image (%s)", stay, of, TOKENS)
