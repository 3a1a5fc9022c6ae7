"""What the loss terms are computed on: answer tokens, image tokens of the page, and the evidence under them.

Evidence is given as boxes on the page, and becomes the share of each image token that boxes cover. Positions follow one
convention: the query that *predicts* a token is one place before it, so a label at i belongs to the query i - 1.

Shape letters: B samples, L tokens of a sequence, R chosen rows, T image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sfa_adapters.errors import DataError
from sfa_adapters.numerals import numbers_in

__all__ = [
    "Box",
    "ImageTokens",
    "answer_boxes",
    "answer_queries",
    "boxes_to_tokens",
    "choose_rows",
    "image_tokens",
    "packed_evidence",
]

# (left, top, right, bottom) in pixels from the top left corner of the page.
Box: TypeAlias = Sequence[float]
IGNORE = -100  # the label that transformers leaves out of the loss


def boxes_to_tokens(boxes: Sequence[Box] | Tensor, page: tuple[float, float], grid: tuple[int, int]) -> Tensor:
    """Share of each image token's area that boxes cover.

    Args:
        boxes: (left, top, right, bottom) in page pixels, `[n, 4]`; rows of NaN are padding. Parts outside the page are
            cut off. Boxes that overlap add up, to 1 at most.
        page: Height and width of the page in the same pixels. The tower sees the whole page, stretched to its own size.
        grid: Rows and columns of image tokens.

    Returns:
        From 0 to 1, row after row, fp32 `[rows * columns]`; all 0 without a box.

    Raises:
        DataError: A box is not four numbers in order, or the page has no area; names it.
    """
    height, width = page
    if not (height > 0 and width > 0 and math.isfinite(height) and math.isfinite(width)):
        raise DataError(f"page={page} must be height and width in pixels, above 0.")
    corners = torch.as_tensor(boxes, dtype=torch.float32).cpu()
    corners = corners.reshape(0, 4) if corners.numel() == 0 else corners
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise DataError(f"boxes {tuple(corners.shape)} must be [n, 4]: left, top, right, bottom.")
    corners = corners[~corners.isnan().all(1)]
    ordered = corners.isfinite().all(1) & (corners[:, 0] <= corners[:, 2]) & (corners[:, 1] <= corners[:, 3])
    if not bool(ordered.all()):
        number = int((~ordered).nonzero()[0])
        raise DataError(
            f"boxes[{number}]={corners[number].tolist()} must be left <= right and top <= bottom, in pixels."
        )
    # In units of tokens; the area of an overlap is the product of its height and its width.
    down = _overlap(corners[:, 1] * grid[0] / height, corners[:, 3] * grid[0] / height, grid[0])
    across = _overlap(corners[:, 0] * grid[1] / width, corners[:, 2] * grid[1] / width, grid[1])
    return torch.einsum("nr,nc->rc", down, across).clamp(max=1).flatten()


def _overlap(begin: Tensor, end: Tensor, count: int) -> Tensor:
    """Length of [begin, end] that lies in each of the cells 0..count, `[n, count]`."""
    edge = torch.arange(count)
    return (torch.minimum(end[:, None], edge + 1) - torch.maximum(begin[:, None], edge)).clamp(min=0)


def answer_boxes(answer: str, texts: Sequence[str], boxes: Sequence[Box]) -> list[Box]:
    """Boxes of the printed texts that contain a number of the answer, or that are the answer.

    Args:
        answer: The true answer. One that is printed nowhere (a difference, a sum) has no box.
        texts: The texts that are printed on the page.
        boxes: One box for each text.

    Returns:
        The boxes of these texts, in order.
    """
    wanted = {abs(number) for number in numbers_in(answer)}
    plain = answer.strip().casefold()
    return [
        box
        for text, box in zip(texts, boxes, strict=True)
        if text.strip().casefold() == plain or wanted & {abs(number) for number in numbers_in(text)}
    ]


def packed_evidence(
    labels: Tensor, boxes: Sequence[Sequence[Sequence[Box]]], page: tuple[float, float], grid: tuple[int, int]
) -> Tensor:
    """Evidence of each answer token where one sequence holds several questions about its picture.

    Args:
        labels: `[B, L]`; each run of labels that are not -100 is the answer to the next question.
        boxes: For each sample, for each of its questions in order, its boxes; an empty list is no evidence.
        page: Height and width in pixels of the pages.
        grid: Rows and columns of image tokens.

    Returns:
        `evidence_mask` for `SCRLoss`: row i belongs to the label at i, fp32 `[B, L, rows * columns]`.

    Raises:
        DataError: A sample does not have one list of boxes for each answer, or a box cannot be used.
    """
    evidence = torch.zeros(*labels.shape, grid[0] * grid[1])
    real = labels.cpu() != IGNORE
    # A run begins where the label before is ignored; its number is how many have begun so far.
    before = torch.cat((torch.zeros_like(real[:, :1]), real[:, :-1]), 1)
    number = (real & ~before).cumsum(1)
    if len(boxes) != len(labels):
        raise DataError(f"There are boxes for {len(boxes)} samples, and {len(labels)} samples.")
    for sample, questions in enumerate(boxes):
        if len(questions) != int(number[sample, -1]):
            raise DataError(
                f"Sample {sample} has {int(number[sample, -1])} answers, but boxes for {len(questions)} questions. "
                "Questions that share an answer's run of labels, or that have none, cannot be told apart."
            )
        for question, sample_question in enumerate(questions, start=1):
            evidence[sample, real[sample] & (number[sample] == question)] = boxes_to_tokens(sample_question, page, grid)
    return evidence


def answer_queries(labels: Tensor) -> Tensor:
    """Queries that predict a token of an answer, bool `[B, L]`.

    Args:
        labels: `[B, L]`, -100 on everything but answers.
    """
    queries = torch.zeros_like(labels, dtype=torch.bool)
    queries[:, :-1] = labels[:, 1:] != IGNORE
    return queries


def choose_rows(candidates: Tensor, most: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Up to `most` candidates of each sample, a random choice where there are more.

    Args:
        candidates: bool `[B, N]`.
        most: Most rows of a sample.
        generator: On the CPU; only used where there is a choice.

    Returns:
        Places in order, int64 `[B, R]`, and which of them are candidates, bool `[B, R]`; the others are padding.
    """
    count = int(candidates.sum(1).max()) if candidates.numel() else 0
    rank = candidates.float()
    if count > most:
        rank = rank * (1 + torch.rand(candidates.shape, generator=generator)).to(rank.device)
    # A stable order, not topk: of equal ranks, of candidates as of padding, the first ones are taken.
    chosen = rank.argsort(dim=1, descending=True, stable=True)[:, : min(count, most)].sort(1).values
    return chosen, candidates.gather(1, chosen)


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The image tokens of a batch.

    Attributes:
        places: Their places in the sequence, int64 `[B, T]`.
        present: False for entries that are padding, bool `[B, T]`.
    """

    places: Tensor
    present: Tensor

    @property
    def counts(self) -> Tensor:
        """How many each sample has, int64 `[B]`."""
        return self.present.sum(1)

    def of_page(self, tokens: int, prefix: int, base_first: bool, apart: bool = False) -> ImageTokens:
        """The image tokens that cover the whole page once, row after row.

        A page that was cut into tiles is also there as a whole: before its tiles in LLaVA-OneVision and LLaVA-NeXT
        and Gemma 3 (`base_first`), behind them in InternVL and SmolVLM. Newline tokens have no place on it.

        Args:
            tokens: How many tokens a page or tile has.
            prefix: Tokens before each tile that are no patches (a CLS token that the host keeps).
            base_first: Whether the whole page is before its tiles.
            apart: Whether text stands between the tiles of one page.

        Returns:
            `tokens` places for each sample; a sample without an image has none of them present.

        Raises:
            DataError: The image tokens of a sample are not whole tiles, or not in one piece; says what to give instead.
        """
        starts = []
        for places, count in zip(self.places, self.counts.tolist(), strict=True):
            together = apart or count == 0 or int(places[count - 1] - places[0]) == count - 1
            fits = count == 0 or (count >= tokens if base_first else count % (tokens + prefix) == 0)
            if not (together and fits):
                raise DataError(
                    f"A sample has {count} image tokens{'' if together else ' in pieces'}; a page has {tokens}. "
                    "Several images, or tiles with tokens in between, cannot be matched with places on one page: give "
                    "evidence_mask [B, image tokens]."
                )
            starts.append(prefix if base_first else count - tokens)
        index = torch.tensor(starts, device=self.places.device)[:, None]
        index = index + torch.arange(tokens, device=self.places.device)
        there = (self.counts > 0)[:, None].expand_as(index)
        if not self.places.shape[1]:
            return ImageTokens(index.clamp(0, 0), there)
        return ImageTokens(self.places.gather(1, index.clamp(0, self.places.shape[1] - 1)), there)


def image_tokens(input_ids: Tensor, image_token: int) -> ImageTokens:
    """Finds the image tokens of a batch; samples may have different numbers of them.

    Args:
        input_ids: `[B, L]`.
        image_token: Placeholder id of an image token.
    """
    is_image = input_ids == image_token
    most = int(is_image.sum(1).max())
    # A stable sort brings a sample's image tokens to the front of its row, in order.
    places = (~is_image).long().argsort(dim=1, stable=True)[:, :most]
    return ImageTokens(places, is_image.gather(1, places))
