"""`Collator`: makes the input tensors of a host from examples, with the host's own processor.

A prompt is the host's chat template with the image and the question. The processor cuts the image into tiles and
inserts the image tokens. In training the answer and the token that ends a turn follow; all other labels are -100.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from sfa_adapters.data.chat_template import Prompt
from sfa_adapters.data.evidence import evidence_of
from sfa_adapters.data.preprocess import Page, page_of, processor_options
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from sfa_adapters.hosts.recipe import Recipe
    from sfa_adapters.vlm.spec import VLMSpec

__all__ = ["IGNORE", "NOT_FOR_MODEL", "Collator"]

IGNORE = -100  # the label that transformers leaves out of the loss
# Entries of a batch that are no arguments of a model.
NOT_FOR_MODEL = ("row_ids", "skipped", "evidence_boxes", "evidence_mask", "page_sizes")
# Outputs of a processor that belong to images; the others belong to tokens.
PICTURES = (
    "pixel_values",
    "pixel_attention_mask",
    "image_sizes",
    "image_grid_thw",
    "image_position_ids",
    "batch_num_images",
)


class Collator:
    """Makes a batch from examples; can be pickled for worker processes.

    Args:
        processor: The host's own processor.
        spec: The record of the host; its rules for images are used.
        recipe: The recipe; `prompt`, `max_tiles`, `max_pixels`, `scr_grounding` and `data` are used.
        train: Whether answers and labels are added and rows padded on the right; otherwise there are prompts only,
            padded on the left for `generate`.

    Attributes:
        end_id: Id of the token that ends a turn: the last label of every answer, at which `generate` must stop.

    Raises:
        RecipeError: The processor cannot do what the recipe says: no tokenizer, no chat template with an image in it,
            no tiling within `max_tiles`, or no evidence for the grounding term.
    """

    def __init__(self, processor: ProcessorMixin, spec: VLMSpec, recipe: Recipe, train: bool = True) -> None:
        self.processor, self.recipe, self.train = processor, recipe, train
        self.spec = spec
        self.prompt = Prompt(processor, recipe.prompt)
        self.options = processor_options(processor, spec, recipe)
        self.grounding = train and recipe.scr_grounding > 0
        on_hub = "/" in recipe.data and not Path(recipe.data).expanduser().exists()
        reason = spec.refuses.get("text_density")
        if self.grounding and on_hub and reason is not None:
            raise RecipeError(
                f"scr_grounding={recipe.scr_grounding} needs to know where answers are printed. {recipe.data} does not "
                f"say, and {reason} Set scr_grounding=0, use data=charts, or give local data with a column boxes."
            )

    @property
    def end_id(self) -> int:
        """Id of the token that ends a turn."""
        return self.prompt.end_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            examples: Examples of `Questions`: `row`, `image` uint8 `[H, W, 3]`, and `skipped`.

        Returns:
            `input_ids` and `attention_mask` `[B, L]`, `pixel_values` and the other outputs of the processor; `labels`
            `[B, L]` in training. Not for the model (`NOT_FOR_MODEL`): `row_ids`, a list of B; `skipped`, a list of all
            skipped rows; and for the grounding term `evidence_boxes` and `page_sizes`, or `evidence_mask`.

        Raises:
            DataError: A row has no answer to train on, or the processor cannot take an image; names the row.
        """
        samples = [self._sample(example["row"], example["image"]) for example in examples]
        batch: dict[str, Any] = self._text([tensors for tensors, _ in samples])
        batch |= _images([tensors for tensors, _ in samples])
        batch["row_ids"] = [example["row"].id for example in examples]
        batch["skipped"] = [skipped for example in examples for skipped in example.get("skipped", ())]
        if self.grounding:
            rows, pages = [example["row"] for example in examples], [page for _, page in samples]
            batch |= evidence_of(rows, pages, batch, self.prompt.image_id, self._token_grids(batch))
        return batch

    def _token_grids(self, batch: dict[str, Any]) -> list[tuple[int, int]] | None:
        """Rows and columns of image tokens of each page; None for a host with a fixed grid."""
        rules = self.spec.images
        if rules is not None and rules.token_grids is not None:
            return rules.token_grids(batch, self.processor)
        if "image_grid_thw" not in batch:
            return None
        merge = getattr(self.processor.image_processor, "merge_size", 1)  # pyright: ignore[reportAttributeAccessIssue]
        return [(int(rows), int(columns)) for rows, columns in batch["image_grid_thw"][:, 1:] // merge]

    def _sample(self, row: Row, image: np.ndarray) -> tuple[dict[str, Tensor], Page]:
        page = page_of(image, self.processor, self.spec, self.recipe)
        first, rest = self.prompt.pieces(row.question)
        processor: Any = self.processor
        try:
            processed = processor(
                images=[Image.fromarray(page.image)],
                text=[first],
                return_tensors="pt",
                text_kwargs={"add_special_tokens": self.prompt.adds_special, "padding": False},
                images_kwargs=self.options,
            )
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            height, width = page.image.shape[:2]
            raise DataError(f"{row.id}: the processor cannot take the image, {width} x {height} ({error}).") from error
        tensors = dict(processed)
        answer = [*self.prompt.ids(row.target), self.end_id] if self.train else []
        length = tensors["input_ids"].shape[1] + len(rest)
        tail = torch.tensor([[*rest, *answer]], dtype=torch.long)
        for name in [
            n for n, value in tensors.items() if n not in PICTURES and value.shape == processed["input_ids"].shape
        ]:
            fill = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}.get(name, torch.zeros_like(tail))
            tensors[name] = torch.cat((tensors[name], fill), dim=1)
        if self.train:
            labels = tensors["input_ids"].clone()
            labels[:, :length] = IGNORE
            tensors["labels"] = labels
        return tensors, page

    def _text(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        side = "right" if self.train else "left"
        blank = {"input_ids": self.prompt.pad_id, "labels": IGNORE}
        return {
            name: pad_sequence(
                [sample[name][0] for sample in samples],
                batch_first=True,
                padding_value=blank.get(name, 0),
                padding_side=side,
            )
            for name in samples[0]
            if name not in PICTURES
        }


def _images(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenates the images of all samples; tiles of a page, and pages of any size, are padded with zeros."""
    images = {}
    if "pixel_values" not in samples[0]:  # questions about no image
        return images
    # How many tiles a page has says its mask, or tiles of zeros; how much of a canvas a page fills says its size.
    padded = samples[0]["pixel_values"].ndim == 5 or "image_sizes" in samples[0]
    for name in PICTURES:
        if name not in samples[0]:
            continue
        parts = [sample[name] for sample in samples]
        if padded and name.startswith("pixel_"):
            largest = [max(lengths) for lengths in zip(*(part.shape[1:] for part in parts), strict=True)]
            parts = [_padded(part, largest) for part in parts]
        images[name] = torch.cat(parts)
    return images


def _padded(part: Tensor, lengths: Sequence[int]) -> Tensor:
    """Zeros behind every dimension but the first, up to the given lengths."""
    missing = [length - had for had, length in zip(part.shape[1:], lengths, strict=True)]
    return pad(part, [side for length in reversed(missing) for side in (0, length)]) if any(missing) else part
