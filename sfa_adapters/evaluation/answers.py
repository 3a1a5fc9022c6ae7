"""`answer_rows`: generates the answers of a host to all rows, in batches, and writes each batch to disk at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sfa_adapters.data.collator import Collator
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.eval_mode import evaluating
from sfa_adapters.evaluation.asked import Asked, Batches, Images, row_at
from sfa_adapters.evaluation.predictions import Prediction, PredictionFile
from sfa_adapters.heads.metadata import pruned_metadata

if TYPE_CHECKING:
    from sfa_adapters.data.rows import Row
    from sfa_adapters.hosts.load import Host

__all__ = ["answer_rows", "fingerprint", "generate"]

SAMPLED = 64  # entries of a tensor that its fingerprint reads
# Settings of a recipe that determine an answer. Not the batch size: it changes answers by rounding only, and must be
# reducible when memory does not suffice.
SETTINGS = ("model", "revision", "plan", "dtype", "prompt", "max_tiles", "max_pixels", "max_new_tokens")
SETTINGS += ("data", "data_config", "eval_split", "adat", "sfa", "sfa_terms", "sfa_layers")


def answer_rows(
    host: Host, rows: Sequence[Row], out: Path | None = None, progress: bool = True, ocr: bool = False
) -> list[Prediction]:
    """Greedy answers to all rows. With torch.distributed every process answers its share, and all return all answers.

    Args:
        host: The model with its processor; it is in eval mode during the call.
        rows: The questions. A row whose image is broken gets an empty answer with the reason.
        out: File for the answers, ending in .jsonl. Rows with an answer in it are not repeated.
        progress: Whether to show a progress bar.
        ocr: Whether to read the texts on images by OCR where they are not known, for the hallucination report.

    Returns:
        One prediction per row, in their order.

    Raises:
        DataError: There are no rows.
        RecipeError: The file holds answers to other rows or by another model; it cannot be written; the model is
            sharded; or the memory of the device does not suffice.
    """
    if not len(rows):
        raise DataError("There are no rows to evaluate. Check the split and the limit.")
    if any(hasattr(p, "full_tensor") for p in host.model.parameters()):
        raise RecipeError("A model sharded by fsdp2 cannot answer: evaluate its checkpoint with plan=bf16 or plan=nf4.")
    rank, world = _place()
    file, done = None if out is None else PredictionFile(out, rank), dict[int, Prediction]()
    if file is not None:
        if rank == 0:
            file.start(_settings(host, rows, ocr))
        _wait()
        done = file.read()
        _wait()  # no process writes before all have read
    todo = [index for index in range(len(rows)) if index not in done][rank::world]
    with _bar(progress and rank == 0, len(todo)) as advance:
        for fresh in _answers(host, rows, todo, ocr, None if out is None else Path(out).parent):
            done |= {p.index: p for p in fresh}
            if file is not None:
                file.append(fresh)
            advance(len(fresh))
    _wait()
    if file is not None and rank == 0:
        file.merge()
    if world > 1:
        shares: list[Any] = [None] * world
        torch.distributed.all_gather_object(shares, done)
        done = {index: p for share in shares for index, p in share.items()}
    return [done[index] for index in range(len(rows))]


def generate(host: Host, batch: dict[str, Any], **options: Any) -> tuple[list[str], list[bool]]:
    """Greedy answers to one batch of `Collator(train=False)`.

    Args:
        host: The model with its processor.
        batch: Tensors, padded on the left.
        options: Options of `generate` that replace the defaults: greedy, `max_new_tokens` of the recipe.

    Returns:
        Texts, and for each whether it was cut at the largest length.
    """
    # All explicit: the generation config of a hub model (sampling, a penalty) would replace a missing option.
    fixed: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    fixed |= {"max_new_tokens": host.recipe.max_new_tokens}
    if not options.get("do_sample"):
        fixed |= {"temperature": None, "top_p": None, "top_k": None}
    inputs = {name: value.to(host.device) for name, value in batch.items() if isinstance(value, Tensor)}
    model: Any = host.model
    with evaluating(model), host.autocast():
        out = model.generate(**inputs, **{**fixed, **options})
    new = out[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(sorted(end_tokens(model)), device=new.device)
    tokenizer: Any = getattr(host.processor, "tokenizer", host.processor)
    texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts, (~torch.isin(new, ends).any(1)).tolist()


def end_tokens(model: nn.Module) -> set[int]:
    """Ids of the tokens that end an answer, from the generation config."""
    end = getattr(model, "generation_config").eos_token_id  # noqa: B009
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes and 64 entries of each parameter: cheap, and different after any step of training."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        chosen = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLED, flat.numel()), device=flat.device).long()
        values = flat[chosen].cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {values.tolist()}".encode())
    return digest.hexdigest()[:16]


def _answers(
    host: Host, rows: Sequence[Row], todo: Sequence[int], ocr: bool, folder: Path | None
) -> Iterator[list[Prediction]]:
    recipe = host.recipe
    loader = DataLoader(
        Images(rows, todo),
        batch_size=recipe.eval_batch,
        num_workers=min(recipe.num_workers, len(todo) // recipe.eval_batch),  # starting one takes seconds
        collate_fn=Batches(Collator(host.processor, host.spec, recipe, train=False)),
    )
    for questions, batch in loader:
        try:
            texts, cut = ([], []) if batch is None else generate(host, batch)
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"The device has no room for {len(questions)} questions at once. Answers so far are kept: run the same "
                f"command with a smaller --batch (eval_batch={recipe.eval_batch} now), or fewer max_tiles."
            ) from error
        answers = iter(zip(texts, cut, strict=True))
        yield [_prediction(one, *(("", False) if one.failed else next(answers)), ocr, folder) for one in questions]


def _prediction(one_row: Asked, text: str, cut: bool, ocr: bool, folder: Path | None) -> Prediction:
    row, printed, image = one_row.row, tuple(one_row.row.printed), None
    if ocr and not printed and not one_row.failed:
        from sfa_adapters.ocr import ocr_texts

        printed = ocr_texts(one_row.image)
    if isinstance(row.image, str | Path) and not printed and not one_row.failed and folder is not None:
        image = os.path.relpath(row.image, folder)
    return Prediction(
        one_row.index,
        row.id,
        row.question,
        tuple(row.answers),
        text,
        row.split,
        printed,
        truncated=cut,
        failed=one_row.failed,
        image=image,
    )


def _settings(host: Host, rows: Sequence[Row], ocr: bool) -> dict[str, Any]:
    questions = hashlib.sha256()
    for row in (row_at(rows, index) for index in range(len(rows))):
        questions.update(repr((row.id, row.question, row.answers)).encode())
    settings = {name: getattr(host.recipe, name) for name in SETTINGS}
    for name in ("model", "data"):  # a folder may have moved; weights and questions say what is in it
        settings[name] = Path(settings[name]).name if Path(settings[name]).exists() else settings[name]
    settings |= {"rows": len(rows), "questions": questions.hexdigest()[:16], "ocr": ocr}
    pruned = pruned_metadata(host.model)
    settings |= {} if pruned is None else {"pruned": pruned.to_dict()}
    return settings | {"weights": fingerprint(host.model)}


def _place() -> tuple[int, int]:
    """Rank of this process, and number of processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _wait() -> None:
    if _place()[1] > 1:
        torch.distributed.barrier()


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar; yields the function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True, disable=not shown or not total) as progress:
        task = progress.add_task("answering", total=total)
        yield lambda count: progress.advance(task, count)
