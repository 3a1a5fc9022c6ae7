"""`HostSuite`: what the tests of a whole model share: its small model with adapters and without, and prompts for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfa_adapters import inject_sfa
from sfa_adapters.data.collator import NOT_FOR_MODEL, Collator
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import SFAError
from sfa_adapters.hosts.load import load_host
from sfa_adapters.hosts.prepare import Host
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint, nano_settings
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.vlm.records import vlm_spec
from sfa_adapters.vlm.spec import Feature, VLMSpec

__all__ = ["PAGES", "HostSuite", "example", "examples", "logits_of", "tensors_of"]

# Height and width in pixels: one tall; one of fewer tiles; one that is wide, and large enough to be limited.
PAGES = ((150, 90), (70, 74), (256, 512))
QUESTIONS = ("How many?", "What stands in the second row of the table?")


def example(image: np.ndarray, number: int = 0) -> dict[str, Any]:
    """A question about an image, as the collator takes it.

    Args:
        image: uint8 `[H, W, 3]`.
        number: Of the question.
    """
    return {"row": Row(f"r{number}", None, QUESTIONS[number], (str(number + 1),)), "image": image, "skipped": ()}


def examples(sizes: Sequence[tuple[int, int]] = PAGES[:2]) -> list[dict[str, Any]]:
    """A question for each of some pages of noise.

    Args:
        sizes: Height and width of each page; at most two.
    """
    random = np.random.default_rng(0)
    pages = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [example(page, number) for number, page in enumerate(pages)]


def tensors_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model takes of a batch."""
    return {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}


def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits of a forward without gradients."""
    with torch.no_grad():
        return model(**inputs).logits


def _prompts(processor: Any) -> dict[str, Any]:
    """The same questions straight from the processor, for a model that recipes refuse."""
    asked = examples()
    content = [[{"type": "image"}, {"type": "text", "text": entry["row"].question}] for entry in asked]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": part}], add_generation_prompt=True)
        for part in content
    ]
    pages = [Image.fromarray(entry["image"]) for entry in asked]
    return dict(processor(images=pages, text=texts, padding=True, return_tensors="pt"))


class HostSuite:
    """Derived classes name the record; what they need else comes from there.

    Attributes:
        family: Name of the record. It must have `nano`, which builds the small model.
    """

    family: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> VLMSpec:
        """The record."""
        return vlm_spec(cls.family)

    @pytest.fixture(scope="class")
    @classmethod
    def built(cls, spec: VLMSpec) -> tuple[Any, Any]:
        """The small model as the record builds it, and its processor; copy the model before you change it."""
        assert spec.nano is not None, f"{cls.family}: the suite needs a small model; write the record's nano."
        return build_host(cls.family)

    @pytest.fixture(scope="class")
    @classmethod
    def recipe(cls, spec: VLMSpec, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
        """Two steps on a CPU, with the small model as a checkpoint."""
        refused = spec.refusal("train")
        if refused is not None:
            pytest.skip(refused)
        folder = nano_checkpoint(cls.family, tmp_path_factory.mktemp(cls.family) / "model")
        made = nano_settings(Recipe(name="contract", model="model", family=cls.family))
        return made.replace(
            model=str(folder), max_steps=2, warmup_steps=1, batch_size=2, micro_batch=2, save_steps=1, max_new_tokens=4
        )

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, recipe: Recipe) -> Host:
        """The model with SFA, ready to answer; tests take their copies, `host`."""
        return load_host(recipe, "cpu", train=False)

    @pytest.fixture
    def host(self, loaded: Host) -> Host:
        """The model with SFA, ready to answer."""
        return replace(loaded, model=copy.deepcopy(loaded.model))

    @pytest.fixture
    def plain(self, built: tuple[Any, Any]) -> Any:
        """The model that never had an adapter."""
        return copy.deepcopy(built[0])

    @pytest.fixture
    def model(self, spec: VLMSpec, request: pytest.FixtureRequest) -> Any:
        """The model with SFA: that of `host`; where recipes refuse it, what adapters are injected into by hand."""
        if spec.refusal("train") is None:
            return request.getfixturevalue("host").model
        return inject_sfa(copy.deepcopy(request.getfixturevalue("built")[0]))

    @pytest.fixture
    def inputs(self, spec: VLMSpec, request: pytest.FixtureRequest) -> dict[str, Any]:
        """Two prompts with pages of two sizes, and their answers as labels where recipes take the model."""
        if spec.refusal("train") is not None:
            return _prompts(request.getfixturevalue("built")[1])
        host: Host = request.getfixturevalue("loaded")
        return tensors_of(Collator(host.processor, host.spec, host.recipe)(examples()))

    def allowed(self, spec: VLMSpec, feature: Feature, use: Callable[[], Any]) -> bool:
        """Whether the record allows something; where it does not, using it must say why."""
        reason = spec.refuses.get(feature)
        if reason is None:
            return True
        with pytest.raises(SFAError, match=re.escape(reason)):
            use()
        return False
