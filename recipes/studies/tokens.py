"""What adaptive tokens (ADAT) do to answers in a model that is trained with them, against down-sampling.

    sfa density pages --out real-pages
    sfa study tokens --workers 2        (numbers: docs/studies/tokens/)

The model is the nano LLaVA-OneVision, which reads charts; real pages are new to it. All of it trains, on the same
pictures of 192 px in every arm (`token_pictures`):

* `all`: every patch of 12 px, 256 tokens. It is the ceiling, at twice or four times the tokens;
* `adat`: as many tokens as the budget allows, patches of 12 px on text and of 48 px elsewhere;
* `down`: the picture made smaller, so that its patches of 12 px are as many;
* `adat-random`: adaptive tokens whose density map is noise, as a placebo.

Beside the answers, linear heads read the letters of every patch, as in the nano curriculum. The language model sees the
grid of the tower in every arm, so only the tower gets cheaper.

The tower does not start from random weights: with adaptive tokens from the first step it could not read yet after 2,000
steps, and the nano tower took 10,000. So it starts from one that was trained on uniform patches, and the size of its
letters is that of `all` and `adat`, not that of `down`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfa_adapters.adat import AdaptiveTokenizer, PatchPolicy, inject_adat
from sfa_adapters.errors import DataError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.recipes.analyze.attention_study import STATISTICS
from sfa_adapters.recipes.nano.encode import EOS, encode_packed
from sfa_adapters.recipes.nano.models import PATCH, WIDTH, NanoHost, build_nano, load_nano
from sfa_adapters.recipes.nano.packing import right_answers
from sfa_adapters.recipes.studies.results_file import Outcome
from sfa_adapters.recipes.studies.settings import Job
from sfa_adapters.recipes.studies.token_pictures import SIDE, CutOuts, Picture, chart_picture, scaled_records
from sfa_adapters.recipes.studies.training import Stepper
from sfa_adapters.recipes.synthetic.legible import ReadingHeads, reading_targets
from sfa_adapters.recipes.synthetic.real_tables import load_tables
from sfa_adapters.recipes.synthetic.rendering import augmented_table
from sfa_adapters.recipes.synthetic.tables import Split

__all__ = ["train"]

ARMS = ("all", "adat", "down", "adat-random")
TRAINING, VALIDATION, TEST = 50_000, 37, 38  # seeds of pictures; a run adds its own to the first
READING = 0.5  # weight of reading beside answers, as in the nano curriculum
Options = Mapping[str, Any]


def train(job: Job) -> Outcome:
    """Trains and evaluates one run.

    Args:
        job: Its options: `tokens` (budget of the tower), `kind` (one of `ARMS`), `pages` (folder of the real pages),
            `pictures` (of training), `charts` (their share), `steps`, `batch`, `lr`, `warmup`, `measurements`,
            `validation`, `test_pictures`.
    """
    began, options = time.process_time(), job.options
    host = build_arm(options, job.seed)
    torch.manual_seed(job.seed)
    heads = ReadingHeads(WIDTH)
    seen: list[Tensor] = []
    model: Any = host.model
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    pool = _training_pictures(options["pictures"], options["charts"], options["pages"], job.seed)
    model.train()

    curve: list[tuple[int, float]] = []
    losses: list[tuple[float, float]] = []
    validation = _test_set("words", "val", options["validation"], options["pages"])
    stepper = Stepper(_groups([model, heads], options["lr"]), options["steps"], options["warmup"])
    every = max(options["steps"] // options["measurements"], 1)
    for step, pictures in enumerate(_batches(options["steps"], options["batch"], pool, job.seed), 1):
        batch = encode_packed(host, _seen(host, pictures), [picture.questions for picture in pictures])
        answer = model(**batch, use_cache=False).loss
        reading = heads(seen.pop(), _targets(host, pictures))
        stepper.step(answer + READING * reading.sum())
        losses.append((answer.item(), reading[0].item()))
        if step % every == 0 or step == options["steps"]:
            curve.append((step, float(exact(host, validation).mean())))
            seen.clear()
    hook.remove()
    tests = {
        name: exact(host, _test_set(name, "test", count, options["pages"]))
        for name, count in options["test_pictures"].items()
    }
    answer, letters = np.mean(losses[-25:], axis=0)
    numbers = {"last_loss": round(float(answer), 4), "letters_loss": round(float(letters), 4)}
    return Outcome(curve, tests, {}, time.process_time() - began, numbers)


def build_arm(options: Options, seed: int) -> NanoHost:
    """The model of an arm: the nano host, its table of positions resized to the grid of the arm.

    Args:
        options: Options of a job.
        seed: Of the density map of the placebo.

    Raises:
        DataError: There is no such arm, or the budget is no square number of tokens.
    """
    kind, tokens = options["kind"], options["tokens"]
    if kind not in ARMS:
        raise DataError(f"kind={kind!r} is none of {', '.join(ARMS)}.")
    side = round(tokens**0.5)
    if side**2 != tokens:
        raise DataError(f"tokens={tokens} must be a square: down-sampling has as many rows as columns.")
    host = build_nano("llava_onevision", seed, side * PATCH if kind == "down" else SIDE)
    state = load_nano("llava_onevision").model.state_dict()
    shapes = host.model.state_dict()
    for name, values in state.items():
        if values.shape != shapes[name].shape:
            state[name] = _resized(values, len(shapes[name]))
    host.model.load_state_dict(state)
    if kind.startswith("adat"):
        noise = torch.Generator().manual_seed(seed)

        def random_density(images: Tensor) -> Tensor:
            return torch.rand(len(images), 1, SIDE // PATCH, SIDE // PATCH, generator=noise)

        policy = PatchPolicy(budget=tokens, scorer=random_density if kind == "adat-random" else "density")
        inject_adat(host.model, AdaptiveTokenizer(policy=policy, **STATISTICS))
    return host


def _resized(table: Tensor, count: int) -> Tensor:
    """A table of positions on a square grid of another size, `[count, width]`."""
    old, new = round(len(table) ** 0.5), round(count**0.5)
    grid = table.T.reshape(1, -1, old, old)
    return torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)[0].flatten(1).T


def exact(host: NanoHost, pictures: Sequence[Picture], batch_size: int = 16) -> np.ndarray:
    """Share of exactly right greedy answers about each picture, fp64 `[pictures]`."""
    scores = []
    with evaluating(host.model):
        for start in range(0, len(pictures), batch_size):
            some = pictures[start : start + batch_size]
            batch = encode_packed(host, _seen(host, some), [picture.questions for picture in some])
            labels = batch.pop("labels")
            guesses = host.model(**batch, use_cache=False).logits.argmax(-1)
            scores += [answers.mean() for answers in right_answers(guesses, labels, EOS)]
    return np.array(scores)


def _groups(modules: Sequence[torch.nn.Module], lr: float) -> list[dict[str, Any]]:
    weights = [p for module in modules for p in module.parameters()]
    return [
        {"params": [p for p in weights if p.ndim > 1], "lr": lr, "weight_decay": 0.05},
        {"params": [p for p in weights if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]


def _seen(host: NanoHost, pictures: Sequence[Picture]) -> list[np.ndarray]:
    """Images of the size that the tower takes, made smaller by the mean over the area of a pixel."""
    import cv2

    size = (host.pixels, host.pixels)
    if host.pixels == SIDE:
        return [picture.image for picture in pictures]
    return [cv2.resize(picture.image, size, interpolation=cv2.INTER_AREA) for picture in pictures]


def _targets(host: NanoHost, pictures: Sequence[Picture]) -> Tensor:
    records = [scaled_records(picture.records, host.pixels / SIDE) for picture in pictures]
    return reading_targets(records, [(0, 0)] * len(pictures), host.pixels // PATCH, PATCH)


def _batches(steps: int, size: int, pool: Sequence[Picture], seed: int) -> Iterator[list[Picture]]:
    """Batches of a pool of pictures, each as often as the steps need; the same for all arms of a seed."""
    rng, order = np.random.default_rng(seed), []
    for _ in range(steps):
        while len(order) < size:
            order += rng.permutation(len(pool)).tolist()
        yield [pool[order.pop()] for _ in range(size)]


@lru_cache(maxsize=1)
def _training_pictures(count: int, charts: float, folder: str, seed: int) -> tuple[Picture, ...]:
    """Pictures of training; arms run seed by seed, so those of one seed are kept."""
    rng, known, pages = np.random.default_rng(TRAINING + seed), _known(), CutOuts(Path(folder), "train")
    return tuple(
        chart_picture(augmented_table(rng, "full", known), rng) if rng.random() < charts else pages.picture(rng)
        for _ in range(count)
    )


@lru_cache(maxsize=1)
def _known() -> list[str]:
    return sorted({row for table in load_tables("train") for row in table.rows if not row.isdigit()})


@lru_cache(maxsize=8)
def _test_set(name: str, part: Split, count: int, folder: str) -> tuple[Picture, ...]:
    """Pictures of one test set, the same for all runs."""
    rng = np.random.default_rng(VALIDATION if part == "val" else TEST)
    if name == "charts":
        tables = load_tables(part)
        return tuple(chart_picture(tables[int(rng.integers(len(tables)))], rng) for _ in range(count))
    if name not in ("words", "rows"):
        raise DataError(f"No test set is called {name!r}. There are words, rows, charts.")
    pages = CutOuts(Path(folder), part)
    return tuple(pages.picture(rng, only=name[:-1]) for _ in range(count))
