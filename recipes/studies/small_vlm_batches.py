"""Batches of tables and charts for the small VLM: pictures at the size of its tower, with packed questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from sfa_adapters.recipes.nano.packing import pack
from sfa_adapters.recipes.studies.pretrained_pictures import MEAN, STD
from sfa_adapters.recipes.synthetic.charts import Chart, draw, kinds_for
from sfa_adapters.recipes.synthetic.questions import Question
from sfa_adapters.recipes.synthetic.real_tables import load_tables
from sfa_adapters.recipes.synthetic.table_pictures import (
    TablePicture,
    TableSize,
    cut_tables,
    draw_table,
    value_questions,
)
from sfa_adapters.recipes.synthetic.tables import Table

__all__ = ["Examples", "Packer", "alignment_examples", "batches", "pixel_values", "table_examples"]

READ = "What is printed here?"
MOST_TEXTS = 24  # of a picture, in an answer to `READ`

Example = tuple[np.ndarray, list[tuple[str, str]]]  # picture, pairs of question and answer


class Examples(Dataset[Example]):
    """Pictures with questions, drawn when they are read; they depend on number and seed only.

    Args:
        tables: One for each picture.
        questions: Largest number about each picture; 0 for one question, what is printed.
        seed: Of colours, places and questions.
        charts: Whether every other picture is a chart of its table.
    """

    def __init__(self, tables: Sequence[Table], questions: int, seed: int, charts: bool = False) -> None:
        self.tables, self.questions, self.seed, self.charts = tables, questions, seed, charts

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, number: int) -> Example:
        picture = self._draw(number)
        if not self.questions:
            return picture.image, [(READ, " ".join(text.text for text in picture.texts[:MOST_TEXTS]))]
        rng = np.random.default_rng((self.seed, number))
        about: list[Question] = value_questions(picture.table, self.questions, rng)
        return picture.image, [(question.text, question.answer) for question in about]

    def _draw(self, number: int) -> TablePicture | Chart:
        table, seed = self.tables[number], self.seed * 100_003 + number
        if self.charts and number % 2:
            return draw(table, kinds_for(table)[0], seed)
        return draw_table(table, seed)


def table_examples(split: Any, count: int, seed: int, size: TableSize, questions: int) -> Examples:
    """Tables of one split; arguments as in `cut_tables`, and the largest number of questions about each."""
    return Examples(cut_tables(split, count, seed, size), questions, seed)


def alignment_examples(count: int, seed: int, size: TableSize) -> Examples:
    """Tables and charts of the training split in turn; each answer is all printed texts.

    Args:
        count: Number of pictures.
        seed: Of everything random.
        size: Size of the tables.
    """
    tables, charts = cut_tables("train", count, seed, size), load_tables("train")
    order = np.random.default_rng(seed).permutation(len(charts))
    mixed = [charts[order[n % len(charts)]] if n % 2 else table for n, table in enumerate(tables)]
    return Examples(mixed, 0, seed, charts=True)


def batches(examples: Examples, size: int, seed: int | None = None, workers: int = 0) -> Iterator[list[Example]]:
    """Batches, each picture once; the last one may be smaller.

    Args:
        examples: All pictures.
        size: Pictures of a batch.
        seed: Of their order; by default the given order.
        workers: Processes that draw.

    Yields:
        Lists of examples.
    """
    shuffled = seed is not None
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    context = "spawn" if workers else None  # CUDA does not survive a fork
    yield from DataLoader(
        examples, size, shuffled, num_workers=workers, collate_fn=list, generator=generator,
        multiprocessing_context=context,
    )  # fmt: skip


def pixel_values(images: Sequence[np.ndarray], size: int, device: torch.device) -> Tensor:
    """Pictures resized and normalised for DINOv2, `[batch, 3, size, size]`, fp32.

    Args:
        images: uint8 `[height, width, 3]`, all of one size.
        size: Pixels of a side.
        device: Device of the result.
    """
    pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-2:] != (size, size):
        pixels = functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


class Packer:
    """Turns examples into keyword arguments of the model.

    Args:
        processor: Processor of the model, an `InternVLProcessor`.
        size: Pixels of a side.
        device: Device of the model.
    """

    def __init__(self, processor: Any, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.tokenizer = processor.tokenizer
        self.end: int = self.tokenizer.eos_token_id
        image = "<IMG_CONTEXT>" * processor.image_seq_length
        self.prefix = self._ids(f"<|im_start|>user\n<img>{image}</img>\n")

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """`pixel_values`, and the tensors of `packing.pack`.

        Args:
            examples: Pictures with questions and answers.
        """
        pairs = [
            [
                (self._ids(f"{question}<|im_end|>\n<|im_start|>assistant\n"), [*self._ids(answer), self.end])
                for question, answer in about
            ]
            for _, about in examples
        ]
        batch = pack(self.prefix, pairs, self.tokenizer.pad_token_id)
        tensors = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return {"pixel_values": pixel_values([image for image, _ in examples], self.size, self.device), **tensors}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
