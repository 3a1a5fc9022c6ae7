"""`HostAnswers`: answers and log-likelihoods of a host for any prompts, each a text after any number of images."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sfa_adapters.data.chat_template import Prompt
from sfa_adapters.data.collator import IGNORE, PICTURES, Collator
from sfa_adapters.data.preprocess import Page, page_of
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.evaluation.answers import generate
from sfa_adapters.evaluation.asked import Asked, Batches
from sfa_adapters.images import as_image
from sfa_adapters.vlm.thinking import without_thinking

if TYPE_CHECKING:
    from torch import Tensor

    from sfa_adapters.hosts.load import Host

__all__ = ["HostAnswers", "Images", "ManyImages"]

Images = Sequence[Any] | Callable[[], Sequence[Any]]
QUESTION = "QUESTIONGOESHERE"
OPTIONS = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
_log = logging.getLogger(__name__)


class ManyImages(Collator):
    """A `Collator` for prompts with any number of images before the text; `image` of an example is a list."""

    def _sample(self, row: Row, image: Any) -> tuple[dict[str, Tensor], Page]:
        if len(image) == 1:
            return super()._sample(row, image[0])
        pages = [page_of(one, self.processor, self.spec, self.recipe) for one in image]
        first, rest = _prompt(self.prompt, self.processor, len(image)).pieces(row.question)
        options: dict[str, Any] = {"images_kwargs": self.options} if image else {}
        processor: Any = self.processor
        processed = processor(
            images=[Image.fromarray(page.image) for page in pages] or None,
            text=[first],
            return_tensors="pt",
            text_kwargs={"add_special_tokens": self.prompt.adds_special, "padding": False},
            **options,
        )
        tensors: dict[str, Any] = dict(processed)
        answer = [*self.prompt.ids(row.target), self.end_id] if self.train else []
        shape, length = tensors["input_ids"].shape, tensors["input_ids"].shape[1] + len(rest)
        tail = torch.tensor([[*rest, *answer]], dtype=torch.long)
        for name in [n for n, value in tensors.items() if n not in PICTURES and value.shape == shape]:
            fill = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}.get(name, torch.zeros_like(tail))
            tensors[name] = torch.cat((tensors[name], fill), dim=1)
        if self.train:
            tensors["labels"] = tensors["input_ids"].clone()
            tensors["labels"][:, :length] = IGNORE
        return tensors, pages[0] if pages else Page(np.zeros((1, 1, 3), np.uint8), (1, 1), (1, 1))


def _prompt(one: Prompt, processor: Any, images: int) -> Prompt:
    """A copy of the prompt with another number of images, from the host's chat template."""
    user = {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]}
    options = without_thinking(processor)
    text = str(processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False, **options))
    made = copy.copy(one)
    made.head, _, made.tail = text.partition(QUESTION)
    if made.head.count(one.image_token) != images:
        raise RecipeError(f"The chat template writes {made.head!r} for {images} images. It takes no such prompt.")
    return made


class HostAnswers:
    """Generates answers of a host to many prompts, and scores given answers.

    A prompt is a text with a sequence of images, each anything that `sfa_adapters.images.as_image` takes, or with a
    function that returns such a sequence, called only when it is needed.

    Args:
        host: The host.
        batch_size: Prompts per forward.

    Attributes:
        failed: Reasons of prompts that failed; their answer is empty, their log-likelihood -inf.

    Raises:
        RecipeError: The batch size is below 1.
    """

    def __init__(self, host: Host, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise RecipeError(f"batch_size={batch_size} must be at least 1.")
        self.host, self.batch_size, self.failed = host, batch_size, list[str]()

    def generate(
        self, prompts: Sequence[tuple[str, Images]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, str]]:
        """Generates answers, in batches of prompts with equal options.

        Args:
            prompts: N prompts.
            options: For each, options of `generate`, and `until`: texts that end an answer.

        Yields:
            Number of a prompt and its answer, in any order, every number once.
        """
        groups: dict[str, list[int]] = {}
        for number, each in enumerate(options):
            groups.setdefault(json.dumps(each, sort_keys=True, default=str), []).append(number)
        requests = [(text, images, "") for text, images in prompts]
        for numbers, batch in self._batches(requests, list(groups.values()), train=False):
            texts = [""] * len(numbers)
            if batch is not None:
                texts, _ = generate(self.host, batch, **_generation(options[numbers[0]]))
            for number, text in zip(numbers, texts, strict=True):
                yield number, _cut(text, options[number])

    def loglikelihood(self, prompts: Sequence[tuple[str, Images, str]]) -> Iterator[tuple[int, float, bool]]:
        """Computes the log-likelihood of given answers.

        Args:
            prompts: N prompts, each with its answer. White space at the start of an answer is dropped, because the
                template has ended the turn of the user.

        Yields:
            Number of a prompt, the sum of the log probabilities of the answer's tokens without an end token, and
            whether greedy generation would give this answer.
        """
        stripped = [(text, images, answer.lstrip()) for text, images, answer in prompts]
        for numbers, batch in self._batches(stripped, [list(range(len(prompts)))], train=True):
            if batch is None:
                yield from ((number, float("-inf"), False) for number in numbers)
                continue
            labels = batch.pop("labels")
            inputs = {k: v.to(self.host.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            with torch.no_grad(), self.host.autocast():
                logits = self.host.model(**inputs).logits
            for row, number in enumerate(numbers):
                # The last label is the end of the turn, which is no part of the answer.
                places = torch.nonzero(labels[row] != IGNORE)[:-1, 0]
                true = labels[row, places].to(logits.device)
                chances = logits[row, places.to(logits.device) - 1].float().log_softmax(-1)
                total = chances.gather(1, true[:, None]).sum()
                yield number, float(total), bool((chances.argmax(1) == true).all())

    def _batches(
        self, prompts: Sequence[tuple[str, Images, str]], groups: Sequence[list[int]], train: bool
    ) -> Iterator[tuple[list[int], dict[str, Any] | None]]:
        """Yields the numbers of prompts with their batch; None for prompts that failed."""
        recipe = self.host.recipe.replace(scr_grounding=0.0)
        size = self.batch_size
        chosen = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        loader = DataLoader(
            _Prompts(prompts),
            batch_sampler=chosen,
            num_workers=min(recipe.num_workers, len(chosen) - 1),
            collate_fn=_Mixed(ManyImages(self.host.processor, self.host.spec, recipe, train)),
        )
        for made in loader:
            for requests, batch in made:
                broken = [one for one in requests if one.failed]
                for one in broken:
                    self.failed.append(one.failed)
                    _log.warning("Answered with nothing: %s", one.failed)
                if broken:
                    yield [one.index for one in broken], None
                if batch is not None:
                    yield [one.index for one in requests if not one.failed], batch


class _Prompts(Dataset[Asked]):
    """Dataset of prompts with their images opened."""

    def __init__(self, prompts: Sequence[tuple[str, Images, str]]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int) -> Asked:
        text, images, answer = self.prompts[number]
        row = Row(f"request {number}", None, text, (answer,))
        try:
            opened = images() if callable(images) else images
            return Asked(number, row, [as_image(one, row.id) for one in opened], "")
        except DataError as error:
            return Asked(number, row, None, str(error))


class _Mixed:
    """Collates prompts with images and prompts without to separate batches."""

    def __init__(self, collator: ManyImages) -> None:
        self.batches = Batches(collator)

    def __call__(self, requests: Sequence[Asked]) -> list[tuple[list[Asked], dict[str, Any] | None]]:
        parts = [[one for one in requests if bool(one.image) is seen] for seen in (True, False)]
        return [self.batches(part) for part in parts if part]


def _generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate`; a temperature of 0 is greedy."""
    chosen = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    sampled = bool(chosen.get("temperature", 1.0)) and bool(chosen.get("do_sample", chosen.get("temperature")))
    if not sampled:
        chosen = {name: value for name, value in chosen.items() if name not in ("temperature", "top_p", "top_k")}
    return chosen | {"do_sample": sampled}


def _cut(text: str, options: Mapping[str, Any]) -> str:
    """Cuts an answer at the first of the texts in `until`.

    A blank line is ignored: it is the default of tasks, for models without chat turns.
    """
    until = options.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != "\n\n"]
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))].strip()
