"""Hosts with pruned heads: evaluated as they are in memory, loaded from their folders, named in all records."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sfa_adapters import inject_sfa, lmms_plugin, save_sfa
from sfa_adapters.choices import TERMS
from sfa_adapters.cli.main import main
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import AdapterMismatchError, DataError, InjectionError, RecipeError
from sfa_adapters.evaluation import open_host as module
from sfa_adapters.evaluation.answers import answer_rows, fingerprint
from sfa_adapters.evaluation.open_host import open_host, read_head_plan
from sfa_adapters.evaluation.predictions import metadata_of_answers
from sfa_adapters.heads import HeadPlan, prune_heads, save_pruned
from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.heads.metadata import PrunedMetadata, folder_metadata, plan_metadata, pruned_folder, pruned_metadata
from sfa_adapters.hosts.load import Host
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.observe import attention_modules
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint, nano_settings
from sfa_adapters.recipes.run import run
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples
from sfa_adapters.sharing.run_metadata import read_run_metadata
from sfa_adapters.training.checkpoints import save_trained
from tests.support.compare import strong_config

SETTINGS: dict[str, Any] = {
    "sfa_terms": TERMS,
    "plan": "bf16", "dtype": "float32", "max_tiles": 2, "max_pixels": 140 * 140, "num_workers": 0,
    "max_new_tokens": 6, "prompt": "{question}",
}  # fmt: skip
HOW = {"kind": "uniform", "method": "s4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano host that reads charts."""
    return nano_checkpoint("llava_onevision", tmp_path_factory.mktemp("hosts") / "base")


def plan_for(host: Host) -> HeadPlan:
    """One head of every second layer of the language model, two of the first of the tower."""
    language, vision = (list(attention_modules(host.model, part)) for part in ("language", "vision"))
    gone: dict[str, tuple[int, ...]] = {path: (2,) if i % 2 else () for i, path in enumerate(language)}
    gone[vision[0]] = (0, 3)
    geometries = {path: read_geometry(path, host.model.get_submodule(path)) for path in gone}
    groups = {path: g.num_kv_heads for path, g in geometries.items()}
    assert {path: g.num_heads for path, g in geometries.items()} == groups
    return HeadPlan(gone, groups, groups, HOW)


@pytest.fixture(scope="module")
def plan(base: Path) -> HeadPlan:
    return plan_for(open_host(base, **SETTINGS))


@pytest.fixture(scope="module")
def plan_file(plan: HeadPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("heads") / "head_plan.json"
    file.write_text(plan.to_json())
    return file


@pytest.fixture(scope="module")
def pruned(base: Path, plan: HeadPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user saves it: `save_pruned`, and the processor beside it."""
    host = open_host(base, **SETTINGS)
    folder = save_pruned(prune_heads(host.model, plan, "absorb"), tmp_path_factory.mktemp("pruned") / "pruned")
    host.processor.save_pretrained(folder)
    return folder


def rows(count: int) -> list[Row]:
    return [Row(s.id, s.image, s.question, s.answers) for s in chart_samples("test", count)]


def same(first: Host, second: Host) -> None:
    """Bit for bit the same model, buffers and all."""
    for pairs in zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True):
        (name, one), (other, two) = pairs
        assert name == other
        assert one.dtype == two.dtype
        if name.endswith("_extra_state"):  # also says how the scalars were drawn, which a loaded host need not know
            continue
        assert torch.equal(one, two), name
    for (name, one), (_, two) in zip(first.model.named_buffers(), second.model.named_buffers(), strict=True):
        assert torch.equal(one, two), name


# -- in memory --------------------------------------------------------------------------------------------------------


def test_the_object_that_is_asked_is_the_one_pruned_by_hand(
    base: Path, plan: HeadPlan, plan_file: Path, tmp_path: Path
) -> None:
    questions = rows(4)
    whole = open_host(base, **SETTINGS)
    before = [p.prediction for p in answer_rows(whole, questions, tmp_path / "whole.jsonl", progress=False)]
    prune_heads(whole.model, plan, "absorb")
    wanted = [p.prediction for p in answer_rows(whole, questions, progress=False)]
    assert wanted != before
    for given in (plan, plan_file, str(plan_file), plan_file.parent):
        host = open_host(base, head_plan=given, compensation="absorb", **SETTINGS)
        same(host, whole)
        assert not any(p.requires_grad for p in host.model.parameters())
        assert not host.model.training
    host = open_host(base, head_plan=plan, compensation="absorb", **SETTINGS)
    assert [p.prediction for p in answer_rows(host, questions, tmp_path / "cut.jsonl", progress=False)] == wanted
    settings = json.loads((tmp_path / "cut.settings.json").read_text())["pruned"]
    heads = sum(plan.num_heads.values())
    assert settings == {
        "kind": "uniform", "method": "s4", "compensation": "absorb", "removed": plan.count, "heads": heads,
        "rate": plan.count / heads, "plan": plan_metadata(plan, "absorb").plan,
    }  # fmt: skip
    assert "pruned" not in json.loads((tmp_path / "whole.settings.json").read_text())
    for file in ("whole", "cut"):  # neither goes on with answers of the other, nor of other heads
        other = open_host(base, head_plan=plan, **SETTINGS)
        with pytest.raises(RecipeError, match="pruned: "):
            answer_rows(other, questions, tmp_path / f"{file}.jsonl", progress=False)


def test_adapters_are_cut_with_the_host(base: Path, plan: HeadPlan, tmp_path: Path) -> None:
    host = open_host(base, **SETTINGS)
    host.recipe = Recipe(name="r", model=str(base), family="llava_onevision", **SETTINGS)
    torch.manual_seed(0)
    inject_sfa(host.model, strong_config())
    host.model.requires_grad_(False)
    save_trained(host, tmp_path / "run" / "final")
    save_sfa(host.model, tmp_path / "sfa")
    prune_heads(host.model, plan)
    for loaded in (
        open_host(tmp_path / "run", head_plan=plan, **SETTINGS),
        open_host(base, tmp_path / "run", head_plan=plan, **SETTINGS),
        open_host(base, tmp_path / "sfa", head_plan=plan, **SETTINGS),
    ):
        same(loaded, host)
    metadata = pruned_metadata(loaded.model)
    assert metadata is not None
    assert metadata == plan_metadata(plan, "none")


def test_a_plan_that_did_nothing_is_loud(base: Path, plan: HeadPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prune_heads", lambda model, plan, compensation: model)
    with pytest.raises(InjectionError, match="lost no heads"):
        open_host(base, head_plan=plan, **SETTINGS)

    def half(model: Any, plan: HeadPlan, compensation: Any) -> Any:
        """Prunes, and leaves two projections with the wrong number of features."""
        prune_heads(model, plan, compensation)
        path = next(path for path, heads in plan.removed.items() if heads)
        attention = model.get_submodule(path)
        for projection in (attention.q_proj, attention.o_proj):
            projection.in_features = projection.out_features = 64

    monkeypatch.setattr(module, "prune_heads", half)
    with pytest.raises(InjectionError, match=r"has 2 heads after pruning, not 3.*was not carried out"):
        open_host(base, head_plan=plan, **SETTINGS)


def test_what_cannot_be_pruned_is_told(base: Path, plan: HeadPlan, pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"compensation=bias.*save_pruned, and evaluate that folder"):
        read_head_plan(tmp_path, "bias")
    with pytest.raises(RecipeError, match="needs batches"):
        open_host(base, head_plan=plan, compensation="bias", **SETTINGS)
    with pytest.raises(RecipeError, match="give their head_plan"):
        open_host(base, compensation="absorb", **SETTINGS)
    with pytest.raises(RecipeError, match="must be one of"):
        open_host(base, head_plan=plan, compensation="scale", **SETTINGS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match=r"no head plan .*nothing\.json"):
        open_host(base, head_plan=tmp_path / "nothing.json", **SETTINGS)
    with pytest.raises(RecipeError, match="evaluate its folder"):
        open_host(base, head_plan=pruned, **SETTINGS)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RecipeError, match=r"broken\.json: This is no head plan"):
        open_host(base, head_plan=tmp_path / "broken.json", **SETTINGS)
    path = next(iter(plan.removed))
    with pytest.raises(InjectionError, match="made for another model"):
        open_host(base, head_plan=HeadPlan({path: (1,)}, {path: 8}, {path: 8}), **SETTINGS)
    with pytest.raises(RecipeError, match="removes no head"):
        open_host(base, head_plan=HeadPlan({path: ()}, {path: 4}, {path: 4}), **SETTINGS)
    with pytest.raises(InjectionError, match="lost heads before"):
        open_host(pruned, head_plan=plan, **SETTINGS)


def test_4_bit_weights_are_refused(base: Path, plan: HeadPlan, pruned: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(InjectionError, match=r"quantised.*Prune the model in bf16"):
        open_host(base, head_plan=plan, **{**SETTINGS, "plan": "nf4"})
    with pytest.raises(RecipeError, match="plan=nf4 cannot load"):
        open_host(pruned, **{**SETTINGS, "plan": "nf4"})
    unsaid = {name: value for name, value in SETTINGS.items() if name != "plan"}  # 4 bits otherwise
    assert open_host(pruned, **unsaid).recipe.plan == open_host(base, head_plan=plan, **unsaid).recipe.plan == "bf16"


# -- folders of save_pruned -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_of_a_pruned_model_is_loaded_as_what_it_is(
    dtype: str, base: Path, plan: HeadPlan, pruned: Path
) -> None:
    settings = {**SETTINGS, "dtype": dtype}
    whole = open_host(base, **settings)
    host = open_host(pruned, **settings)
    if dtype == "float32":  # heads of the folder were scaled in float32 and rounded after
        prune_heads(whole.model, plan, "absorb")
        same(host, whole)
        questions = rows(3)
        wanted = [p.prediction for p in answer_rows(whole, questions, progress=False)]
        assert [p.prediction for p in answer_rows(host, questions, progress=False)] == wanted
    assert {p.dtype for p in host.model.parameters()} == {getattr(torch, dtype)}
    assert host.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert pruned_metadata(host.model) == folder_metadata(pruned) == plan_metadata(plan, "absorb")
    parts: list[Any] = [part for part in host.model.modules() if hasattr(part, "config")]
    assert {part.config._attn_implementation for part in parts} == {"sdpa"}
    assert not any(p.requires_grad for p in host.model.parameters())


def test_the_random_state_is_left_alone(pruned: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    open_host(pruned, **SETTINGS)
    assert torch.equal(torch.rand(3), expected)


def test_adapters_of_pruned_hosts(base: Path, pruned: Path, tmp_path: Path) -> None:
    host = open_host(pruned, **SETTINGS)
    torch.manual_seed(2)
    inject_sfa(host.model, strong_config())
    save_sfa(host.model, tmp_path / "cut")
    same(open_host(pruned, tmp_path / "cut", **SETTINGS), host)
    with pytest.raises(AdapterMismatchError, match=r"num_heads of layer 0: adapter 2, model 4.*same ones first"):
        open_host(base, tmp_path / "cut", **SETTINGS)
    save_sfa(inject_sfa(open_host(base, **SETTINGS).model), tmp_path / "whole")
    with pytest.raises(AdapterMismatchError, match=r"num_heads of layer 0: adapter 4, model 2.*load the adapter first"):
        open_host(pruned, tmp_path / "whole", **SETTINGS)


def _without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no processor": (
        lambda folder: [file.unlink() for file in folder.glob("*processor_config.json")],
        "Save the processor beside",
    ),
    "no weights": (_without("model.safetensors"), "weights.*cannot be read"),
    "no json": (lambda folder: (folder / "head_plan.json").write_text("{"), "cannot be read"),
    "no plan": (lambda folder: (folder / "head_plan.json").write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder(how: str, pruned: Path, tmp_path: Path) -> None:
    break_it, words = BROKEN[how]
    folder = Path(shutil.copytree(pruned, tmp_path / "copy"))
    break_it(folder)
    with pytest.raises(RecipeError, match=words):
        open_host(folder, **SETTINGS)


def test_a_plan_beside_a_whole_model_makes_it_no_pruned_one(base: Path, plan_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    shutil.copy(plan_file, folder)
    assert not pruned_folder(folder)
    assert folder_metadata(folder) is None
    assert fingerprint(open_host(folder, **SETTINGS).model) == fingerprint(open_host(base, **SETTINGS).model)


# -- what is on record ------------------------------------------------------------------------------------------------


def test_facts(plan: HeadPlan) -> None:
    path = next(path for path, heads in plan.removed.items() if heads)
    metadata = plan_metadata(plan, "absorb")
    assert str(metadata) == (
        f"{plan.count} of {plan.total} heads removed ({plan.rate:.1%}), plan uniform s4 {metadata.plan}, "
        "compensation absorb"
    )
    assert metadata.label == f"{plan.rate:.1%} of heads removed, absorb"
    assert PrunedMetadata.from_dict(json.loads(json.dumps(metadata.to_dict()))) == metadata
    one = HeadPlan({path: (1,)}, {path: 4}, {path: 4})
    other = HeadPlan({path: (2,)}, {path: 4}, {path: 4})
    assert "plan by hand" in str(plan_metadata(one, "none"))
    assert plan_metadata(one, "none").plan != plan_metadata(other, "none").plan
    more = HeadPlan({path: (1,), "b": ()}, {path: 4, "b": 4}, {path: 4, "b": 4})
    assert plan_metadata(more, "none").plan == plan_metadata(one, "none").plan
    assert (plan_metadata(more, "none").rate, plan_metadata(one, "none").rate) == (1 / 8, 1 / 4)
    for wrong in ({"plan": "a"}, {**metadata.to_dict(), "more": 1}, []):
        with pytest.raises(RecipeError, match="no metadata"):
            PrunedMetadata.from_dict(wrong)  # pyright: ignore[reportArgumentType]


def test_answers_without_settings(tmp_path: Path) -> None:
    assert metadata_of_answers(tmp_path / "p.jsonl") is None
    (tmp_path / "p.settings.json").write_text('{"model": "m"}')
    assert metadata_of_answers(tmp_path / "p.jsonl") is None
    for text in ("{", "[]", '{"pruned": {"plan": 1}}'):
        (tmp_path / "p.settings.json").write_text(text)
        with pytest.raises(DataError, match="cannot be read"):
            metadata_of_answers(tmp_path / "p.jsonl")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_sfa_eval_names_what_was_removed(
    base: Path, plan: HeadPlan, plan_file: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ("--data", "charts", "--split", "test", "--limit", "3", "--prompt", "{question}", "--dtype", "float32")
    metadata = plan_metadata(plan, "absorb")
    name = f"base ({metadata.label})"
    assert call("eval", str(base), *ask, "--head-plan", str(plan_file), "--compensation", "absorb") == 0
    folder = tmp_path / "sfa-eval" / f"base-charts-test-pruned-{metadata.plan}-absorb"
    scores = json.loads((folder / "scores.json").read_text())
    assert [row["run"] for row in scores["rows"]] == [name]
    assert scores["title"].startswith(name)
    assert f"{name}: {metadata}." in scores["notes"]
    assert metadata_of_answers(folder / "predictions.jsonl") == metadata
    # The whole model against it, and the folder of the same heads: the same answers under its own name.
    assert call("eval", str(base), *ask, "--out", "whole", "--against", str(folder / "predictions.jsonl")) == 0
    scores = json.loads((tmp_path / "whole" / "scores.json").read_text())
    assert [row["run"] for row in scores["rows"]] == [f"{folder.name} ({metadata.label})", "base"]
    assert scores["notes"][-1] == f"{folder.name} ({metadata.label}): {metadata}."
    assert call("eval", str(pruned), *ask, "--out", "cut", "--against", "whole/predictions.jsonl") == 0
    scores = json.loads((tmp_path / "cut" / "scores.json").read_text())
    assert [row["run"] for row in scores["rows"]] == ["whole", f"pruned ({metadata.label})"]
    lines = [(path / "predictions.jsonl").read_text() for path in (folder, tmp_path / "cut", tmp_path / "whole")]
    assert lines[0] == lines[1] != lines[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--head-plan", "PLAN", "--compensation", "bias"), "evaluate that folder"),
        (("--compensation", "absorb"), "head_plan"),
        (("--head-plan", "nothing.json"), "no head plan nothing.json"),
        (("--head-plan", "PLAN", "--compensation", "scale"), "must be one of"),
    ],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], message: str, base: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(plan_file) if option == "PLAN" else option for option in options]
    assert call("eval", str(base), "--data", "charts", *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_run_on_a_pruned_host_says_so(pruned: Path, plan: HeadPlan, tmp_path: Path) -> None:
    recipe = nano_settings(Recipe(name="r", model="m", family="llava_onevision", output=str(tmp_path / "run")))
    sizes: dict[str, Any] = {"limit": 4, "eval_limit": 2, "batch_size": 2, "micro_batch": 2, "eval_batch": 2}
    recipe = recipe.replace(model=str(pruned), max_steps=1, warmup_steps=0, save_steps=1, **sizes)
    result = run(recipe)
    metadata = plan_metadata(plan, "absorb")
    table = json.loads((tmp_path / "run" / "results.json").read_text())
    assert metadata.label in table["title"]
    assert f"Of all runs: {metadata}." in table["notes"]
    stored = read_run_metadata(result.trained).scores
    assert [entry["host"] for entry in stored] == [metadata.label, f"untrained, {metadata.label}"]
    assert all(entry["pruned"] == metadata.to_dict() for entry in stored)
    assert metadata.label in (result.trained / "README.md").read_text()
    again = open_host(tmp_path / "run")
    assert pruned_metadata(again.model) == metadata
    assert lmms_plugin._metadata_of(str(tmp_path / "run"), None, "none") == metadata
    assert json.loads((result.trained / "adapter_config.json").read_text())["tower"]["num_heads"][0] == 2


def test_what_the_plug_in_tells_before_loading(base: Path, plan: HeadPlan, plan_file: Path, pruned: Path) -> None:
    assert lmms_plugin._metadata_of(str(base), None, "none") is None
    assert lmms_plugin._metadata_of(str(base), str(plan_file), "residual") == plan_metadata(plan, "residual")
    assert lmms_plugin._metadata_of(str(pruned), None, "none") == plan_metadata(plan, "absorb")
    with pytest.raises(RecipeError, match="evaluate that folder"):
        lmms_plugin._metadata_of(str(base), str(plan_file), "bias")


# -- lmms-eval itself -------------------------------------------------------------------------------------------------

TASK = """
task: sfa_pruned
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pruned_functions.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


@pytest.mark.filterwarnings("ignore")
def test_lmms_eval_asks_the_pruned_host(
    base: Path, plan: HeadPlan, plan_file: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (it wants an environment of its own)")
    evaluator: Any = importlib.import_module("lmms_eval.evaluator")
    manager = importlib.import_module("lmms_eval.tasks").TaskManager
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    samples = chart_samples("test", 4)
    lines = []
    for number, sample in enumerate(samples):
        image = tmp_path / f"{number}.png"
        Image.fromarray(sample.image).save(image)
        row = {"question": sample.question, "answer": sample.answer, "image": str(image)}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    (tmp_path / "pruned.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "pruned_functions.py").write_text(FUNCTIONS)
    host = open_host(base, **SETTINGS)
    whole = [p.prediction for p in answer_rows(host, rows(4), progress=False)]
    prune_heads(host.model, plan, "absorb")
    wanted = [p.prediction for p in answer_rows(host, rows(4), progress=False)]
    assert wanted != whole
    metadata = str(plan_metadata(plan, "absorb"))
    for given, expected, suffix in (
        (f"pretrained={base}", whole, None),
        (f"pretrained={base},head_plan={plan_file},compensation=absorb", wanted, metadata),
        (f"pretrained={pruned}", wanted, metadata),
    ):
        results: Any = evaluator.simple_evaluate(
            model="sfa_llava_onevision",
            model_args=f"{given},dtype=float32,max_tiles=2,num_workers=0",
            tasks=["sfa_pruned"],
            task_manager=manager(include_path=str(tmp_path)),
            batch_size=2,
            log_samples=True,
        )
        logged = sorted(results["samples"]["sfa_pruned"], key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"][0] for sample in logged] == expected
        backend = results["config"]["model_backend"]
        assert (f"SFALlavaOnevision with {suffix}" in backend) if suffix else ("removed" not in backend)
