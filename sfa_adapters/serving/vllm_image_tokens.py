"""Models of vLLM whose language model gets fewer image tokens: `SFA_IMAGE_TOKENS=0.5 vllm serve MODEL`.

vLLM computes the number of tokens of an image in the model's processor, so the choice is made there and travels with
the pixels of the request. The model then drops the other tokens behind its tower, and positions are those of the whole
page. Each class here is vLLM's own with these three places changed; it is registered under vLLM's name for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]
from vllm.multimodal.inputs import MultiModalFieldConfig  # pyright: ignore[reportMissingImports]

from sfa_adapters.errors import ServingError
from sfa_adapters.serving.image_tokens import KEPT, TOKENS, chooser, kept_features, kept_positions, share_of_tokens
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
            share = share_of_tokens()
            if grids is None or share is None or not len(grids):
                return fields
            if hf_inputs.get("pixel_values") is None:
                raise ServingError(
                    f"{TOKENS} reads the pixels of images; features that were computed before have none."
                )
            model = self.info.ctx.model_config
            images = self.info.get_image_processor(**hf_processor_mm_kwargs)
            statistics = tuple(images.image_mean), tuple(images.image_std)
            kept = chooser(share, model.model, model.revision).kept(hf_inputs["pixel_values"], grids, statistics)
            hf_inputs[KEPT] = torch.cat(kept)
            sizes = torch.tensor([len(one) for one in kept])
            return {**fields, KEPT: MultiModalFieldConfig.flat_from_sizes("image", sizes)}

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

    class Model(base):
        _sfa_checked = False  # set at the first image

        def embed_multimodal(self, **kwargs: Any) -> Any:
            kept = kwargs.pop(KEPT, None)
            features = super().embed_multimodal(**kwargs)
            if kept is None:
                if kwargs.get("pixel_values") is not None:
                    raise ServingError(f"{TOKENS}: images came without the choice of their tokens.")
                return features
            chosen = kept_features(features, kept)
            if not self._sfa_checked:
                _check_first(sum(map(len, chosen)), sum(map(len, features)))
                self._sfa_checked = True
            return chosen

        def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> Any:
            return kept_positions(super().get_mrope_input_positions, input_tokens, mm_features)

    for made_class, name in ((Processor, made.processor.__name__), (Model, base.__name__)):
        made_class.__name__ = made_class.__qualname__ = name
    Model.__module__ = __name__
    return MULTIMODAL_REGISTRY.register_processor(Processor, info=made.info, dummy_inputs=made.dummy_inputs)(Model)


def _check_first(stay: int, of: int) -> None:
    """Says what happens to the first image.

    Raises:
        ServingError: Nothing is left out.
    """
    if stay >= of and of * (1 - (share_of_tokens() or 1)) >= 1:  # a share near 1 leaves small images whole
        raise ServingError(f"{TOKENS}: all {of} tokens of the first image stay, so nothing is left out.")
    logger.info("SFA: the language model gets %d of %d tokens of the first image (%s)", stay, of, TOKENS)
