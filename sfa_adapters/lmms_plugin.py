r"""Plug-in for lmms-eval (0.7), found by the entry points `lmms_eval.models`: evaluates hosts with their adapters.

    lmms-eval --model sfa_internvl --model_args pretrained=OpenGVLab/InternVL3_5-8B-HF,adapter=runs/internvl3_5_8b \
        --tasks mmbench_en_dev --batch_size 8 --output_path results
    lmms-eval --model sfa_llava --tasks scienceqa_full --batch_size 8 --output_path results \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,head_plan=heads/head_plan.json,compensation=absorb

`pretrained` may also be a folder of `save_pruned`. Removed heads are recorded in the results, in
`config.model_backend`. Importing this module needs no lmms-eval; model classes are made when lmms-eval imports one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.evaluation.open_host import find_run, open_host, read_head_plan
from sfa_adapters.evaluation.prompts import HostAnswers, Images
from sfa_adapters.heads.metadata import PrunedMetadata, folder_metadata, plan_metadata, pruned_metadata
from sfa_adapters.hosts.spec import HOSTS
from sfa_adapters.moved import old_names
from sfa_adapters.training.checkpoints import saved_recipe

if TYPE_CHECKING:
    import torch

__all__ = ["manifests", "models"]


def models() -> Mapping[str, tuple[str, str]]:
    """For each model name in lmms-eval: the name of its class here, and the family of hosts that it takes."""
    heads = "ForConditionalGeneration"
    return {f"sfa_{name}": (f"SFA{spec.model_class.removesuffix(heads)}", name) for name, spec in HOSTS.items()}


def manifests() -> list[Any]:
    """The entry point of lmms-eval: one `ModelManifest` for each model of this plug-in."""
    manifest = importlib.import_module("lmms_eval.models.registry_v2").ModelManifest
    return [manifest(name, simple_class_path=f"{__name__}.{made}") for name, (made, _) in models().items()]


def __getattr__(name: str) -> Any:
    if name.startswith("SFA"):
        for made, family in models().values():
            if name == made:
                return _model_class(name, family)
    return old_names(__name__)(name)


def _metadata_of(pretrained: str, head_plan: str | None, compensation: str) -> PrunedMetadata | None:
    """The pruned heads of the host that is loaded next, from files alone."""
    if head_plan is not None:
        return plan_metadata(read_head_plan(head_plan, compensation), compensation)
    run = find_run(pretrained)
    return folder_metadata(pretrained if run is None else saved_recipe(run).model)


@functools.cache
def _model_class(name: str, family: str) -> type:
    """The class that lmms-eval makes its model from."""
    try:
        lmms: Any = importlib.import_module("lmms_eval.api.model").lmms
        result: Any = importlib.import_module("lmms_eval.api.instance").GenerationResult
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lmms_eval is not installed. Run: pip install lmms-eval 'filelock<3.20' "
            "(best in an environment of its own)",
            name=error.name,
        ) from error

    class Model(lmms):
        """A host of one family, with an adapter or without."""

        is_simple = True  # requests come as text and images; every task with images can make them

        def __new__(cls, pretrained: str, *args: Any, **settings: Any) -> Any:
            # The name of the class is all that lmms-eval takes from a model into its results.
            pruned = _metadata_of(pretrained, settings.get("head_plan"), settings.get("compensation", "none"))
            return super().__new__(cls if pruned is None else type(f"{name} with {pruned}", (cls,), {"pruned": pruned}))

        pruned: PrunedMetadata | None = None

        def __init__(
            self,
            pretrained: str,
            adapter: str | None = None,
            batch_size: int | str = 1,
            device: str | None = None,
            plan: str = "bf16",
            dtype: str = "bfloat16",
            max_new_tokens: int = 1024,
            head_plan: str | None = None,
            compensation: Any = "none",
            **settings: Any,
        ) -> None:
            super().__init__()
            changes = {"prompt": "{question}", "plan": plan, "dtype": dtype, "max_new_tokens": max_new_tokens}
            changes |= {"head_plan": head_plan, "compensation": compensation}
            host = open_host(pretrained, adapter, device, **changes, **settings)
            done = pruned_metadata(host.model)
            if str(done) != str(self.pruned):
                raise RecipeError(
                    f"{pretrained} was to have {self.pruned or 'all heads'}, and has {done or 'all heads'}."
                )
            if host.spec.family != family:
                raise RecipeError(f"{pretrained} is of the family {host.spec.family}, {name} needs {family}.")
            if not str(batch_size).isdigit():
                raise RecipeError(f"batch_size={batch_size} must be a number; it is not searched for.")
            self.answers = HostAnswers(host, int(batch_size))

        @property
        def device(self) -> torch.device:
            return self.answers.host.device

        @property
        def batch_size(self) -> int:
            return self.answers.batch_size

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            prompts = [(r.args[0], self._images(r.args[2:])) for r in requests]
            texts = [""] * len(requests)
            for number, text in self._shown(self.answers.generate(prompts, [r.args[1] for r in requests]), requests):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", tuple(requests[number].args[:2]), text)
            return texts

        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            prompts = [(r.args[0], self._images(r.args[2:]), self._target(r.args)) for r in requests]
            likelihoods = [(float("inf"), False)] * len(requests)
            for number, chance, greedy in self._shown(self.answers.loglikelihood(prompts), requests):
                # Negative: lmms-eval treats the smallest value as the likeliest answer, because its own models return
                # losses.
                likelihoods[number] = (-chance, greedy)
            # The evaluator of 0.7 would turn a bare pair into a text, on which every multiple-choice task fails.
            return [result(text=pair) for pair in likelihoods]

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise NotImplementedError(f"{name} answers in one turn; tasks of several rounds are not for it.")

        def _doc(self, place: Sequence[Any]) -> Any:
            doc_id, task, split = place
            return self.task_dict[task][split][doc_id]

        def _images(self, place: Sequence[Any]) -> Images:
            """The images of a request, opened when they are needed: a benchmark has more than fit into memory."""
            if not place or place[0] is None:
                return ()
            return lambda: place[0](self._doc(place[1:])) or ()

        def _target(self, args: Sequence[Any]) -> str:
            target: str | Callable[[Any], Any] = args[1]
            return str(target(self._doc(args[3:])) if callable(target) else target)

        def _shown(self, answers: Iterator[Any], requests: Sequence[Any]) -> Iterator[Any]:
            from tqdm import tqdm

            return iter(tqdm(answers, total=len(requests), desc="answering", disable=self.rank != 0))

    Model.__name__ = Model.__qualname__ = name
    return Model
