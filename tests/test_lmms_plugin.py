"""The plug-in for lmms-eval: prompts and likelihoods against a slow reference, and lmms-eval itself if it is there."""

from __future__ import annotations

import importlib
import json
import math
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfa_adapters import lmms_plugin
from sfa_adapters.data.preprocess import page_of, processor_options
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import RecipeError
from sfa_adapters.evaluation.answers import answer_rows
from sfa_adapters.evaluation.open_host import open_host
from sfa_adapters.evaluation.prompts import HostAnswers
from sfa_adapters.hosts.load import Host
from sfa_adapters.hosts.spec import families
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, chart_samples
from sfa_adapters.vlm.thinking import without_thinking
from tests.support.nightly_hosts import families_of

FAMILIES: tuple[str, ...] = families()
SETTINGS: dict[str, Any] = {
    "plan": "bf16", "dtype": "float32", "max_tiles": 2, "max_pixels": 140 * 140, "num_workers": 0,
    "max_new_tokens": 6, "prompt": "{question}",
}  # fmt: skip


@pytest.fixture(scope="module", params=families_of(FAMILIES, core=True))
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    return open_host(nano_checkpoint(request.param, tmp_path_factory.mktemp("hosts") / request.param), **SETTINGS)


@pytest.fixture(scope="module")
def charts() -> list[ChartSample]:
    return chart_samples("test", 4)


def encoded(host: Host, text: str, images: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """One prompt, as the host's own processor makes it."""
    processor: Any = host.processor
    turn = {"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, **without_thinking(processor))
    options = {"crop_to_patches": True, "max_patches": 2} if host.spec.family == "internvl" else {}
    if host.spec.family != "internvl":
        options = processor_options(processor, host.spec, host.recipe)
    pages = [page_of(image, processor, host.spec, host.recipe) for image in images]
    pictures: dict[str, Any] = {"images": [Image.fromarray(p.image) for p in pages], "images_kwargs": options}
    return dict(processor(text=[prompt], return_tensors="pt", **(pictures if images else {})))


def test_any_number_of_images(host: Host, charts: list[ChartSample]) -> None:
    answers = HostAnswers(host, 3)
    pictures = [charts[0].image, charts[1].image[:90], charts[2].image]
    prompts = [("Is it?", pictures[:count]) for count in (0, 1, 2, 1, 0)]
    texts = dict(answers.generate(prompts, [{"max_new_tokens": 5}] * 5))
    assert sorted(texts) == [0, 1, 2, 3, 4]
    model: Any = host.model
    for number, (text, images) in enumerate(prompts[:3]):
        inputs = encoded(host, text, images)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        processor: Any = host.processor
        assert texts[number] == processor.tokenizer.decode(out, skip_special_tokens=True).strip()
    assert (texts[3], texts[4]) == (texts[1], texts[0])


def test_likelihoods(host: Host, charts: list[ChartSample]) -> None:
    prompts = [(charts[i].question, [charts[i].image], answer) for i, answer in ((0, " 12"), (0, "Yes"), (1, "12"))]
    prompts.append(("Say something", [], "7"))
    likelihoods = {n: (chance, greedy) for n, chance, greedy in HostAnswers(host, 4).loglikelihood(prompts)}
    processor: Any = host.processor
    for number, (text, images, answer) in enumerate(prompts):
        inputs = encoded(host, text, images)
        total, is_greedy = 0.0, True
        for token in processor.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                chances = host.model(**inputs).logits[0, -1].log_softmax(-1)
            total, is_greedy = total + float(chances[token]), is_greedy and int(chances.argmax()) == token
            for name in [n for n, v in inputs.items() if v.shape == inputs["input_ids"].shape and n != "input_ids"]:
                fill = torch.full((1, 1), int(name == "attention_mask"))
                inputs[name] = torch.cat((inputs[name], fill), 1)
            inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([[token]])), 1)
        assert likelihoods[number][0] == pytest.approx(total, abs=2e-4)
        assert likelihoods[number][1] == is_greedy
    assert all(math.isfinite(chance) and chance < 0 for chance, _ in likelihoods.values())


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The nano host that can read charts."""
    return open_host(nano_checkpoint("llava_onevision", tmp_path_factory.mktemp("hosts") / "reader"), **SETTINGS)


def test_what_it_says_is_likeliest(reader: Host, charts: list[ChartSample]) -> None:
    answers = HostAnswers(reader, 4)
    prompts = [(c.question, [c.image]) for c in charts]
    texts = dict(answers.generate(prompts, [{}] * 4))
    for number, chance, greedy in answers.loglikelihood([(*prompts[n], texts[n]) for n in range(4)]):
        assert greedy
        assert all(
            other < chance for _, other, _ in answers.loglikelihood([(*prompts[number], wrong) for wrong in ("q", "{")])
        )


def test_options_of_a_task(reader: Host, charts: list[ChartSample]) -> None:
    answers, prompt = HostAnswers(reader, 2), (charts[0].question, [charts[0].image])
    options = [
        {"max_new_tokens": 1},
        {},
        {"until": ["\n\n"], "temperature": 0, "do_sample": False, "top_p": None},
        {"until": dict(answers.generate([prompt], [{}]))[0][1:2]},
        {"temperature": 0.0, "top_k": 3},
    ]
    texts = dict(answers.generate([prompt] * 5, options))
    whole = texts[1]
    assert len(whole) > 1
    assert (texts[0], texts[2], texts[3], texts[4]) == (whole[:1], whole, whole[:1], whole)
    torch.manual_seed(0)
    hot = dict(answers.generate([prompt] * 6, [{"temperature": 30.0, "do_sample": True}] * 6))
    assert len(set(hot.values())) > 1


def test_a_control_token_in_a_text_is_letters(reader: Host, charts: list[ChartSample]) -> None:
    prompts = [("<image> <image> what?", [charts[0].image]), ("<image><eos>", [charts[0].image, charts[1].image])]
    assert sorted(dict(HostAnswers(reader, 2).generate(prompts, [{}] * 2))) == [0, 1]


def test_broken_images_get_an_empty_answer(reader: Host, charts: list[ChartSample], tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    answers = HostAnswers(reader, 3)
    good = (charts[0].question, lambda: [charts[0].image])
    broken = ("q", [tmp_path / "torn.png"])
    texts = dict(answers.generate([good, broken, good], [{}] * 3))
    assert texts[1] == ""
    assert texts[0] == texts[2] != ""
    assert len(answers.failed) == 1
    assert "torn.png" in answers.failed[0] or "request 1" in answers.failed[0]
    likely = {n: chance for n, chance, _ in answers.loglikelihood([(*good, "1"), (*broken, "1")])}
    assert likely[1] == -math.inf
    assert math.isfinite(likely[0])
    with pytest.raises(RecipeError, match="at least 1"):
        HostAnswers(reader, 0)


def test_the_module_needs_no_lmms_eval_until_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    for name in ("lmms_eval.api.model", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    lmms_plugin._model_class.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install lmms-eval"):
        lmms_plugin.SFAInternVL  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lmms_plugin.Nothing  # noqa: B018
    assert {family for _, family in lmms_plugin.models().values()} == set(FAMILIES)


# -- lmms-eval itself -------------------------------------------------------------------------------------------------

GENERATED = """
task: sfa_generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function task_functions.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
process_results: !function task_functions.judge
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
CHOSEN = """
task: sfa_chosen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function task_functions.visual
doc_to_text: "{{{{question}}}}"
doc_to_choice: !function task_functions.choices
doc_to_target: 1
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def choices(doc):
    return ["q{", doc["said"], "{{"]

def judge(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


@pytest.mark.filterwarnings("ignore")
def test_lmms_eval_runs_local_tasks(reader: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (it wants an environment of its own)")
    evaluator: Any = importlib.import_module("lmms_eval.evaluator")
    get_model = importlib.import_module("lmms_eval.models").get_model
    manager = importlib.import_module("lmms_eval.tasks").TaskManager
    assert any(e.value == "sfa_adapters.lmms_plugin:manifests" for e in entry_points(group="lmms_eval.models"))
    lmms_plugin._model_class.cache_clear()
    for name, (made, _) in lmms_plugin.models().items():
        assert get_model(name).__name__ == made
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    samples = chart_samples("test", 6)
    rows = [Row(s.id, s.image, s.question, s.answers) for s in samples]
    answers = [p.prediction for p in answer_rows(reader, rows, progress=False)]
    lines = []
    for i, sample in enumerate(samples):
        Image.fromarray(sample.image).save(tmp_path / f"{i}.png")
        row = {
            "question": sample.question,
            "answer": sample.answer,
            "said": answers[i],
            "image": str(tmp_path / f"{i}.png"),
        }
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    for name, text in (("generated", GENERATED), ("chosen", CHOSEN)):
        (tmp_path / f"{name}.yaml").write_text(text.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "task_functions.py").write_text(FUNCTIONS)
    results: Any = evaluator.simple_evaluate(
        model="sfa_llava_onevision",
        model_args=f"pretrained={reader.recipe.model},dtype=float32,max_tiles=2,num_workers=0",
        tasks=["sfa_generated", "sfa_chosen"],
        task_manager=manager(include_path=str(tmp_path)),
        batch_size=3,
        log_samples=True,
    )
    right = float(np.mean([text == s.answer for text, s in zip(answers, samples, strict=True)]))
    assert results["results"]["sfa_generated"]["right,none"] == pytest.approx(right)
    assert results["results"]["sfa_chosen"]["acc,none"] == 1.0  # the likeliest choice is what it says
    logged = sorted(results["samples"]["sfa_generated"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in logged] == answers
    with pytest.raises(RecipeError, match="needs llava"):
        get_model("sfa_llava")(reader.recipe.model, dtype="float32")
