"""Evaluates a host on charts: relaxed accuracy, fabricated numbers, time, with bootstrap intervals.

An answer is *fabricated* when it holds a number that is printed nowhere on the chart. This is a measure of this
library, for questions whose answer can be read off the chart: the true answer of a difference is not printed either, so
differences are left out.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sfa_adapters.eval_mode import evaluating
from sfa_adapters.metrics import RelaxedMode, numbers_in, relaxed_accuracy, unprinted_numbers
from sfa_adapters.recipes.nano.encode import Picture, encode
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample
from sfa_adapters.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from sfa_adapters.recipes.nano.models import NanoHost

__all__ = ["Evaluation", "Interval", "bootstrap", "evaluate", "fabricated", "generate_answers", "paired_difference"]


@dataclass(frozen=True)
class Evaluation:
    """Answers to N samples, and their judgements.

    Attributes:
        samples: the samples.
        answers: the answers of the host.
        correct: bool [N], by relaxed accuracy.
        readable: bool [N], questions whose answer can be read off the chart, answered with at least one number.
        fabricated: bool [N], those of them with a number that is printed nowhere on the chart.
        ms_per_image: wall-clock milliseconds for encoding and answering one question.
    """

    samples: tuple[ChartSample, ...]
    answers: tuple[str, ...]
    correct: np.ndarray
    readable: np.ndarray
    fabricated: np.ndarray
    ms_per_image: float

    @property
    def accuracy(self) -> Interval:
        """Relaxed accuracy."""
        return bootstrap(self.correct)

    @property
    def fabricated_share(self) -> Interval:
        """Share of the readable numeric answers that are not on the chart."""
        return bootstrap(self.fabricated[self.readable])

    def by_type(self) -> dict[str, Interval]:
        """Relaxed accuracy for each question type."""
        types = np.array([s.type for s in self.samples])
        return {str(t): bootstrap(self.correct[types == t]) for t in dict.fromkeys(types.tolist())}

    def by_kind(self) -> dict[str, Interval]:
        """Relaxed accuracy for each kind of chart."""
        kinds = np.array([s.kind for s in self.samples])
        return {str(k): bootstrap(self.correct[kinds == k]) for k in dict.fromkeys(kinds.tolist())}


def fabricated(answer: str, sample: ChartSample) -> bool:
    """Whether the answer holds a number that equals no number printed on the chart."""
    return bool(unprinted_numbers(answer, [t.text for t in sample.texts], signed=True))


@torch.inference_mode()
def generate_answers(
    host: "NanoHost", images: Sequence[Picture], questions: Sequence[str], batch_size: int = 64, max_new_tokens: int = 8
) -> tuple[list[str], float]:
    """Greedy answers to one question per picture.

    Args:
        host: the model that answers; it is in eval mode for the time of the call.
        images: N pictures.
        questions: N questions.
        batch_size: questions per forward.
        max_new_tokens: longest answer in tokens (characters for a nano host).

    Returns:
        N answers, and the milliseconds per picture that encoding and generation took.
    """
    model = host.model
    answers: list[str] = []
    began = time.perf_counter()
    with evaluating(model):
        for i in range(0, len(questions), batch_size):
            batch = encode(host, images[i : i + batch_size], questions[i : i + batch_size])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)  # pyright: ignore[reportCallIssue]
            new = out[:, batch["input_ids"].shape[1] :]
            answers += host.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [a.strip() for a in answers], 1000 * (time.perf_counter() - began) / max(1, len(questions))


def evaluate(
    host: "NanoHost", samples: Sequence[ChartSample], batch_size: int = 64, mode: RelaxedMode = "reference"
) -> Evaluation:
    """Lets a host answer every sample once, and judges the answers.

    Args:
        host: the model that answers.
        samples: the samples.
        batch_size: questions per forward.
        mode: of `relaxed_accuracy`.

    Returns:
        Answers and judgements; an answer is right when it matches any of the sample's answers.
    """
    answers, ms = generate_answers(host, [s.image for s in samples], [s.question for s in samples], batch_size)
    pairs = list(zip(answers, samples, strict=True))
    return Evaluation(
        samples=tuple(samples),
        answers=tuple(answers),
        correct=np.array([any(relaxed_accuracy(a, true, mode) for true in s.answers) for a, s in pairs], dtype=bool),
        readable=np.array([bool(s.texts and s.type != "difference" and numbers_in(a)) for a, s in pairs], dtype=bool),
        fabricated=np.array([bool(s.texts) and fabricated(a, s) for a, s in pairs], dtype=bool),
        ms_per_image=ms,
    )


def paired_difference(first: Evaluation, second: Evaluation, seed: int = 0) -> Interval:
    """Accuracy of `second` minus accuracy of `first` on the same samples, with a paired bootstrap interval.

    Raises:
        ValueError: the two runs did not answer the same samples.
    """
    if [s.id for s in first.samples] != [s.id for s in second.samples] or [s.question for s in first.samples] != [
        s.question for s in second.samples
    ]:
        raise ValueError("A paired difference needs two runs over the same samples in the same order.")
    return bootstrap(second.correct.astype(np.float64) - first.correct, seed)
