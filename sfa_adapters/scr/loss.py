"""`SCRLoss`: records one forward of a model and computes the three loss terms of SCR for it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.answer_logits import answer_rows
from sfa_adapters.errors import ObservationError, SFAWarning
from sfa_adapters.scr.augment import change_pixels
from sfa_adapters.scr.config import SCRConfig, Term
from sfa_adapters.scr.evidence import Evidence, patch_density, required
from sfa_adapters.scr.losses import band_penalty, grounding_rows, jeffreys, row_entropies, sample_mean
from sfa_adapters.scr.targets import Box, answer_queries, choose_rows
from sfa_adapters.scr.watch import Seen, Watch

__all__ = ["SCRLoss"]

LEVELS: Mapping[Term, str] = {"entropy": "entropy_level", "grounding": "grounding_mass"}


@dataclass(frozen=True)
class _Result:
    """One term: its value, the quantity behind it, and sample counts; None where nothing could be measured."""

    value: Tensor | None
    level: Tensor | None
    used: int
    skipped: int
    rows: int


class SCRLoss:
    """The three loss terms of SCR, for any training loop.

        scr = SCRLoss(model, SCRConfig(entropy=0.02, grounding=0.3, stability=0.3))
        with scr.watch():
            outputs = model(**inputs)
        penalty, terms = scr(outputs, inputs, evidence_boxes=boxes)
        (outputs.loss + penalty).backward()

    The model may be inside `DistributedDataParallel` or PEFT, on `sdpa` or `eager` attention, with SFA or without, with
    non-reentrant gradient checkpointing. A compiled model cannot be watched.

    Args:
        model: A vision-language model of `transformers`: LLaVA, LLaVA-NeXT, LLaVA-OneVision, InternVL and their kind.
            Create the loss after the adapters are injected.
        config: Settings.

    Attributes:
        step: How often it was called; the step of the warm-up unless one is given.

    Raises:
        InjectionError: A chosen layer does not exist, or the model has no image token.
        NoMatchingBackboneError: The entropy term is on and the model has no known vision tower.
        ObservationError: The entropy term is on and the tower's patches have no fixed grid (Qwen-type).
    """

    def __init__(self, model: nn.Module, config: SCRConfig | None = None) -> None:
        self.model = model
        self.config = SCRConfig() if config is None else config
        self.step = 0
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self._watch = Watch(model, self.config)
        self._seen: Seen | None = None
        self._reported: set[Term] = set()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keeps references to q and k of the chosen layers, for one forward of the model. Close it before `backward`.

        Raises:
            ObservationError: The model ran more than once, or under reentrant checkpointing, which cuts off gradients;
                or as in `observe`.
        """
        self._seen = None
        with self._watch() as seen:
            yield
        self._seen = seen

    def __call__(
        self,
        outputs: Any,
        inputs: Mapping[str, Any],
        *,
        evidence_boxes: Sequence[Sequence[Box]] | Tensor | None = None,
        evidence_mask: Tensor | None = None,
        page_sizes: Sequence[Sequence[float]] | Tensor | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Computes the terms of the watched forward.

        Args:
            outputs: Output of the model; the stability term reads its `logits` `[B, L, V]`, or those in front of
                labels, `[1, N, V]`, as `logits_at_answers` gives them.
            inputs: Its inputs: `input_ids` and `labels` `[B, L]`, with -100 on everything but answers, and
                `pixel_values`.
            evidence_boxes: For each sample the boxes (left, top, right, bottom) that its answer is read from, or
                `[B, n, 4]` padded with NaN; a sample without boxes is skipped.
            evidence_mask: Instead, how much evidence lies under each image token, bool or from 0 up, `[B, T]`, or
                `[B, L, T]` with a row for each label. T is the number of image tokens of a sample, or of those with a
                place on the page. With neither boxes nor mask, evidence is where text is dense.
            page_sizes: Height and width of the pages in the pixels of the boxes, `[B, 2]`; by default `image_sizes` of
                the inputs, else the size of what the tower sees.
            step: Optimiser step of the warm-up; by default, how often this loss was called before.

        Returns:
            The weighted sum of the terms, a scalar; a 0 on which `backward` does nothing where every sample was
            skipped. And for each term that is on: `entropy`, `grounding`, `stability` (without weight), how many
            samples (images, for the entropy) count as `.._used` and `.._skipped`, and their `.._rows`; `entropy_level`
            is the mean H / log n, `grounding_mass` the mean attention on the evidence, both NaN where every sample was
            skipped.

        Raises:
            ObservationError: No forward was watched, it had other tokens than its inputs say, or logits are NaN.
            DataError: Inputs or evidence do not fit.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise ObservationError("No forward was watched: run `with scr.watch(): outputs = model(**inputs)` first.")
        warmth = self.config.warmth(self.step if step is None else step)
        self.step += 1
        loss_terms: dict[Term, _Result] = {}
        for term in self.config.active:
            if term == "entropy":
                loss_terms[term] = self._entropy(seen)
            elif term == "grounding":
                loss_terms[term] = self._grounding(seen, inputs, Evidence(evidence_boxes, evidence_mask, page_sizes))
            else:
                loss_terms[term] = self._stability(outputs, inputs)
        # A leaf, so that `backward` of a step in which everything was skipped does nothing instead of failing.
        device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
        total = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        terms: dict[str, float] = {}
        for term, result in loss_terms.items():
            if result.value is not None:
                self._check_gradient(term, result.value)
                total = total + warmth * self.config.weight(term) * result.value.to(total.device)
            terms[term] = 0.0 if result.value is None else result.value.item()
            if term in LEVELS:
                terms[LEVELS[term]] = float("nan") if result.level is None else result.level.item()
            terms |= {f"{term}_used": result.used, f"{term}_skipped": result.skipped, f"{term}_rows": result.rows}
        return total, terms

    def _check_gradient(self, term: Term, value: Tensor) -> None:
        if torch.is_grad_enabled() and not value.requires_grad and term not in self._reported:
            self._reported.add(term)
            warnings.warn(
                f"The {term} term has no gradient: every parameter before its layers is frozen. Train the vision "
                f"tower or adapters in it, or set {term}=0.",
                SFAWarning,
                stacklevel=3,
            )

    # -- the terms ----------------------------------------------------------------------------------------------------

    def _entropy(self, seen: Seen) -> _Result:
        images, grid = seen.tower
        prefix = self._watch.tower_prefix
        dense = patch_density(images, grid, self._watch).flatten(1) > self.config.dense_threshold
        rows, used = choose_rows(dense, self.config.max_rows, self.generator)
        values, levels = [], []
        for name in self._watch.vision if rows.shape[1] else ():
            call = seen.calls[name]
            expected = (len(images), prefix + grid[0] * grid[1])
            if (call.batch_size, call.num_queries) != expected:
                raise ObservationError(
                    f"{name} attends over {call.batch_size} x {call.num_queries} tokens, expected {expected[0]} x "
                    f"{expected[1]}: adaptive or merged tokens have no grid of patches. Set entropy=0."
                )
            entropies = row_entropies(call, rows + prefix, self.config.block_bytes)
            values.append(sample_mean(band_penalty(entropies, self.config.entropy_band).mean(1), used))
            levels.append(sample_mean(entropies.detach().mean(1), used))
        return _result(values, levels, used)

    def _grounding(self, seen: Seen, inputs: Mapping[str, Any], evidence: Evidence) -> _Result:
        ids, queries = required(inputs, "input_ids"), answer_queries(required(inputs, "labels"))
        tokens, target = evidence.target(self._watch, seen, inputs)
        target = target.masked_fill(~tokens.present if target.ndim == 2 else ~tokens.present[:, None], 0.0)
        # A row of evidence belongs to a label; here it belongs to the query before.
        target = target[:, None].expand(-1, ids.shape[1], -1) if target.ndim == 2 else target.roll(-1, dims=1)
        rows, used = choose_rows(queries & (target > 0).any(-1), self.config.max_rows, self.generator)
        row_target = target.take_along_dim(rows[..., None], dim=1)
        losses = []
        for name in self._watch.language if rows.shape[1] else ():
            call = seen.calls[name]
            if (call.batch_size, call.num_queries) != tuple(ids.shape):
                raise ObservationError(
                    f"{name} attends over {call.batch_size} x {call.num_queries} tokens, but input_ids is "
                    f"{tuple(ids.shape)}: places of image and answer tokens are not known."
                )
            places, config = tokens.places + call.past, self.config
            losses.append(
                grounding_rows(
                    call, rows, places, tokens.present, row_target, config.grounding_kind, config.block_bytes
                )
            )
            used = used & losses[-1][2]
        if not bool(used.any()):
            return _result((), (), used)
        values, masses, _ = zip(*losses, strict=True)
        return _result([sample_mean(v, used) for v in values], [sample_mean(m, used) for m in masses], used)

    def _stability(self, outputs: Any, inputs: Mapping[str, Any]) -> _Result:
        labels, logits = required(inputs, "labels"), getattr(outputs, "logits", None)
        queries = answer_queries(labels)
        # Where the logits of a query are in the flattened ones: all tokens have some, or those in front of a label.
        order = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        if isinstance(logits, Tensor) and logits.shape[:2] == (1, len(answer_rows(labels)[0])):
            order = queries.flatten().cumsum(0).view_as(labels) - 1
        elif not isinstance(logits, Tensor) or logits.shape[:2] != labels.shape:
            raise ObservationError(
                f"outputs.logits is {tuple(getattr(logits, 'shape', ())) or logits}; stability needs a row for "
                f"each of {tuple(labels.shape)} labels, or for each token before one."
            )
        rows, used = choose_rows(queries, self.config.max_rows, self.generator)
        if not rows.shape[1]:
            return _result((), (), used)
        pixels = required(inputs, "pixel_values")
        view = {name: value for name, value in inputs.items() if name != "labels"}
        view["pixel_values"] = change_pixels(pixels, self._watch.statistics, self.config, self.generator)
        places = rows
        if "logits_to_keep" in inspect.signature(type(self._watch.host).forward).parameters:
            # Answers are few and vocabularies large: logits of the other tokens are never made.
            view["logits_to_keep"] = rows[used].unique()
            places = torch.searchsorted(view["logits_to_keep"], rows)
        changed = self.model(**{"use_cache": False, **view}).logits
        sample = torch.arange(len(labels), device=labels.device)[:, None].expand_as(rows)[used]
        divergence = jeffreys(
            logits.flatten(0, 1)[order.gather(1, rows)[used]],
            changed[sample, places[used]],
            block_bytes=self.config.block_bytes,
        )
        values = divergence.new_zeros(rows.shape).masked_scatter(used, divergence)
        return _result([sample_mean(values, used)], (), used)


def _result(values: Sequence[Tensor], levels: Sequence[Tensor], used: Tensor) -> _Result:
    """Means over layers; a sample of which no row is used was skipped."""
    samples = int(used.any(1).sum())
    value = torch.stack(list(values)).mean() if values else None
    level = torch.stack(list(levels)).mean() if levels else None
    return _Result(value, level, samples, len(used) - samples, int(used.sum()))
