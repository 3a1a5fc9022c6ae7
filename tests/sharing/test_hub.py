"""The model card and the hub: what is written, what is sent, what is refused. Nothing here uses a network."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import get_peft_model
from transformers import SiglipVisionConfig, SiglipVisionModel

from sfa_adapters import SFAConfig
from sfa_adapters.cli.main import main
from sfa_adapters.errors import MergeError, RecipeError
from sfa_adapters.hosts.load import Host, load_host
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.sharing import (
    RunMetadata,
    fetch,
    model_card,
    push_to_hub,
    read_run_metadata,
    share,
    write_card,
    write_run_metadata,
)
from sfa_adapters.sharing.metadata import hub_id
from sfa_adapters.training.checkpoints import load_trained, save_trained

SCORES: dict[str, Any] = {
    "metric": "relaxed", "rows": 40, "truncated": 3, "failed": 1, "unscored": 0,
    "scores": [
        {"group": "all", "of": 40, "points": 25.0, "mean": 0.625, "low": 0.475, "high": 0.775},
        {"group": "human", "of": 0, "points": 0.0, "mean": float("nan"), "low": float("nan"), "high": float("nan")},
    ],
}  # fmt: skip
METADATA = RunMetadata(
    command="sfa train llava_1_5_7b --limit 40", hardware="2 x NVIDIA A100-SXM4-40GB", processes=2, seconds=3723.4,
    steps=12, examples=384, skipped=2, loss=0.51234, scores=(SCORES,),
)  # fmt: skip


class FakeApi:
    """Notes what the hub would get; takes only arguments that the real one takes."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def _note(self, name: str, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs)
        self.calls.append((name, {key: value for key, value in bound.arguments.items() if key != "self"}))
        if self.error is not None:
            raise self.error

    def create_repo(self, *args: Any, **kwargs: Any) -> None:
        self._note("create_repo", args, kwargs)

    def create_commit(self, *args: Any, **kwargs: Any) -> Any:
        self._note("create_commit", args, kwargs)
        return type("CommitInfo", (), {"commit_url": "https://huggingface.co/me/x/commit/1"})


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A nano LLaVA whose adapter has values of its own."""
    base = nano_checkpoint("llava", tmp_path_factory.mktemp("base") / "host")
    settings: dict[str, Any] = {"plan": "bf16", "dtype": "float32", "lora_llm": 2, "revision": "abc123"}
    recipe = Recipe(name="llava_1_5_7b", model=str(base), family="llava", freeze_vision=True, seed=7, **settings)
    loaded = load_host(recipe, device="cpu")
    loaded.model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return loaded


@pytest.fixture
def run(host: Host, tmp_path: Path) -> Path:
    """The folder of a run, with its adapter in `final`."""
    folder = tmp_path / "run"
    save_trained(host, folder / "final")
    write_run_metadata(folder / "final", METADATA)
    for name in ("results.md", "results.json", "predictions.jsonl", "training.png", "host.log", ".hidden.json"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"\x80")
    return folder


def pretend(adapter: Path, **settings: Any) -> None:
    """Other settings in the recipe of a saved adapter."""
    record = json.loads((adapter / "recipe.json").read_text())
    record["recipe"] |= settings
    rewrite(adapter, record)


def rewrite(adapter: Path, record: dict[str, Any]) -> None:
    """Another recipe, with its size in the list of files."""
    (adapter / "recipe.json").write_text(json.dumps(record))
    sizes = json.loads((adapter / "manifest.json").read_text())
    sizes["recipe.json"] = (adapter / "recipe.json").stat().st_size
    (adapter / "manifest.json").write_text(json.dumps(sizes))


# -- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_all_that_is_known(run: Path) -> None:
    pretend(run / "final", model="llava-hf/llava-1.5-7b-hf", plan="nf4")
    assert write_card(run / "final", licence="apache-2.0", repo_id="me/charts") == ()
    card = ModelCard.load(run / "final" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "llava-hf/llava-1.5-7b-hf"
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["HuggingFaceM4/ChartQA"]
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "sfa-adapters"
    results: Any = card.data.eval_results  # pyright: ignore[reportAttributeAccessIssue]
    (result,) = results
    assert (result.metric_type, result.metric_value) == ("relaxed_accuracy", 0.625)
    assert result.metric_args == {"questions": 40, "interval_95": [0.475, 0.775]}
    assert (result.dataset_type, result.dataset_split) == ("HuggingFaceM4/ChartQA", "test")
    text = " ".join(card.text.split())
    for expected in (
        "| revision | abc123 |",
        "| layers with a bias | 2 of 3 |",
        "| parameters: SFA | 16 |",
        "rank 2",
        "| tuned parts of the base | projector |",
        "| seed | 7 |",
        "2 x NVIDIA A100-SXM4-40GB",
        "`sfa train llava_1_5_7b --limit 40`",
        "1 h 2 min",
        "| all | 40 | 62.5 | 47.5 to 77.5 |",
        "| human | 0 | - | - |",
        "1 failed, 3 truncated",
        "it cannot be merged into weights",
        "in 4 bits while it was trained",
        'fetch("me/charts")',
        "reads the bias alone, without the tuned base and the LoRA",
    ):
        assert expected in text, expected
    assert text.count("## ") == 5


def test_a_card_of_little_invents_nothing_and_names_no_folder_of_this_machine(host: Host, tmp_path: Path) -> None:
    save_trained(host, tmp_path / "plain")
    pretend(tmp_path / "plain", data=str(tmp_path / "my charts"), revision=None)
    card = model_card(tmp_path / "plain")
    assert str(tmp_path) not in str(card)
    assert "my charts" in card.text
    assert not {"base_model", "base_model_relation", "datasets", "license", "model-index"} & set(card.data.to_dict())
    assert card.text.count("not recorded") == 8
    assert "It was not evaluated." in card.text
    assert "The revision of the base model was not pinned" in card.text


def test_other_hosts_are_in_the_text_and_not_in_the_index(run: Path) -> None:
    base = {**SCORES, "host": "untrained"}
    card = model_card(run / "final", metadata=RunMetadata(scores=(base, SCORES)))
    assert "metric `relaxed` (untrained)" in card.text
    assert len(card.data.eval_results or ()) == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_an_adapter_of_sfa_alone_loads_with_peft_too(run: Path) -> None:
    record = json.loads((run / "final" / "recipe.json").read_text())
    record["tensors"] = {"adapter_model.safetensors": record["tensors"]["adapter_model.safetensors"]}
    rewrite(run / "final", record)
    assert "`PeftModel.from_pretrained(base_model" in model_card(run / "final").text


def test_the_metadata_of_a_card_by_its_old_keyword(run: Path) -> None:
    metadata = RunMetadata(command="sfa train charts")
    card = str(model_card(run / "final", metadata=metadata))
    assert "sfa train charts" in card
    old: Any = {"facts": metadata}
    with pytest.warns(FutureWarning, match="metadata="):
        assert str(model_card(run / "final", **old)) == card
    with pytest.warns(FutureWarning, match="metadata="):
        assert write_card(run / "final", **old) == ()
    assert (run / "final" / "README.md").read_text() == card
    with pytest.warns(FutureWarning, match="metadata="):
        assert share(run / "final", **old).warnings == ()


def test_a_card_of_somebody_stays(run: Path) -> None:
    write_card(run / "final")
    write_card(run / "final", metadata=RunMetadata())  # ours is overwritten
    assert "not evaluated" in (run / "final" / "README.md").read_text()
    (run / "final" / "README.md").write_text("# mine")
    (warning,) = write_card(run / "final")
    assert "stays as it is" in warning
    assert (run / "final" / "README.md").read_text() == "# mine"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b", "a/b"), ("charts", None), ("/tmp/a", None), ("a/b/c", None), ("./a", None), ("a/b c", None), (None, None)],
)
def test_names_of_the_hub(name: str | None, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_facts_of_a_run(tmp_path: Path) -> None:
    assert read_run_metadata(tmp_path) == RunMetadata()
    write_run_metadata(tmp_path, METADATA)
    again = read_run_metadata(tmp_path)
    assert (again.command, again.scores[0]["rows"]) == (METADATA.command, 40)
    here = RunMetadata.here(seconds=1.5)
    assert here.command
    assert "CPU" in (here.hardware or "") or torch.cuda.is_available()
    for broken in ("{", '{"speed": 1}', '{"scores": [1]}', "[]"):
        (tmp_path / "run.json").write_text(broken)
        with pytest.raises(RecipeError, match=r"run\.json cannot be read"):
            read_run_metadata(tmp_path)


# -- the hub ----------------------------------------------------------------------------------------------------------


def test_one_commit_with_exactly_the_adapter(run: Path) -> None:
    api = FakeApi()
    done = share(run / "final", "me/charts", private=True, api=api)
    (first, repo), (second, commit) = api.calls
    assert (first, second) == ("create_repo", "create_commit")
    assert repo == {"repo_id": "me/charts", "repo_type": "model", "private": True, "exist_ok": True}
    sent = {operation.path_in_repo: operation for operation in commit["operations"]}
    assert set(sent) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tuned.safetensors", "recipe.json",
        "lora/adapter_config.json", "lora/adapter_model.safetensors", "run.json", "manifest.json",
    }  # fmt: skip
    assert done.sent
    assert done.url == "https://huggingface.co/me/x/commit/1"
    assert done.files == {name: operation.upload_info.size for name, operation in sent.items()}
    assert "me/charts" in (run / "final" / "README.md").read_text()


def test_results_are_what_stands_at_the_top_of_the_run(run: Path) -> None:
    api = FakeApi()
    share(run / "final", "me/charts", results=run, api=api)
    sent = {operation.path_in_repo for operation in api.calls[1][1]["operations"]}
    assert {name for name in sent if name.startswith("results/")} == {
        "results/predictions.jsonl", "results/results.json", "results/results.md", "results/training.png",
    }  # fmt: skip
    (run / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no results"):
        share(run / "final", "me/charts", results=run / "empty", api=api)


def test_a_dry_run_sends_nothing(run: Path) -> None:
    api = FakeApi()
    done = share(run / "final", "me/charts", dry_run=True, api=api)
    assert not api.calls
    assert not done.sent
    assert "adapter_model.safetensors" in done.files


def test_folders_of_this_machine_are_pointed_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    pretend(run / "final", output=str(run))
    (warning,) = share(run / "final", "me/charts", dry_run=True).warnings
    assert "recipe.json" in warning
    assert "README.md" not in warning


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("optimizer.pt", b"\x80\x04", "can run code"),
        ("lora/adapter_model.bin", b"\x80\x04", "can run code"),
        ("modeling_sfa.py", b"import os", "can run code"),
        ("notes.txt", b"private", "no part of an adapter: notes.txt"),
        ("sub/adapter_model.safetensors", b"", "no part of an adapter"),
        ("adapter_model.safetensors", b"\x80\x04pickle", "is broken"),
        ("recipe.json", b"{", "is broken"),
    ],
)
def test_what_is_no_adapter_is_not_sent(run: Path, name: str, content: bytes, match: str) -> None:
    (run / "final" / name).parent.mkdir(exist_ok=True)
    (run / "final" / name).write_bytes(content)
    api = FakeApi()
    with pytest.raises(RecipeError, match=match):
        share(run / "final", "me/charts", api=api)
    assert not api.calls
    assert not (run / "final" / "README.md").exists()


def test_links_and_folders_without_an_adapter_are_not_sent(run: Path, tmp_path: Path) -> None:
    (run / "final" / "tuned.safetensors").unlink()
    (run / "final" / "tuned.safetensors").symlink_to(tmp_path / "elsewhere")
    api = FakeApi()
    with pytest.raises(RecipeError, match=r"holds a link, tuned\.safetensors"):
        share(run / "final", "me/charts", api=api)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("# x")
    with pytest.raises(RecipeError, match="holds no adapter"):
        push_to_hub(tmp_path / "bare", "me/charts", api=api)
    with pytest.raises(RecipeError, match="is no folder"):
        push_to_hub(tmp_path / "nothing", "me/charts", api=api)
    assert not api.calls


def test_half_an_adapter_is_not_sent(run: Path) -> None:
    push = {"repo_id": "me/charts", "api": FakeApi()}
    write_card(run / "final")
    (run / "final" / "tuned.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"not whole: tuned\.safetensors"):
        push_to_hub(run / "final", **push)
    assert not push["api"].calls


def test_a_card_is_needed_and_a_name(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no README\.md"):
        push_to_hub(run / "final", "me/charts", api=FakeApi())
    for name in ("charts", "me/my charts", "me/a/b", "-/x"):
        with pytest.raises(RecipeError, match="repo="):
            push_to_hub(run / "final", name, api=FakeApi())


def test_what_the_hub_says_becomes_one_line(run: Path) -> None:
    # The real client, at an address where nothing listens.
    with pytest.raises(RecipeError, match="hf auth login") as raised:
        share(run / "final", "me/charts", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_none"))
    assert len(str(raised.value).splitlines()) == 1
    refused = OSError("401 Client Error\nmore")
    refused.response = type("Response", (), {"status_code": 403})  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RecipeError, match=r"\(401 Client Error\)\. Your token may not write"):
        share(run / "final", "me/charts", api=FakeApi(refused))
    with pytest.raises(ZeroDivisionError):  # a bug is no message to the user
        share(run / "final", "me/charts", api=FakeApi(ZeroDivisionError()))


def test_there_and_back(run: Path, host: Host, tmp_path: Path) -> None:
    share(run / "final", api=FakeApi())
    request: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        inspect.signature(__import__("huggingface_hub").snapshot_download).bind(repo_id, **options)
        request.update(options, repo_id=repo_id)
        return str(shutil.copytree(run / "final", tmp_path / "cache"))

    folder = fetch("me/charts", "v1", download=download)
    assert request["repo_id"] == "me/charts"
    assert request["revision"] == "v1"
    assert not any("*" in name or name.endswith((".bin", ".pt", ".py")) for name in request["allow_patterns"])
    fresh = load_host(host.recipe, device="cpu", train=False)
    load_trained(fresh, folder)
    for (name, parameter), other in zip(fresh.model.named_parameters(), host.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    with pytest.raises(RecipeError, match="holds no adapter"):
        fetch("me/charts", download=lambda *_, **__: str(tmp_path))


def test_merging_is_refused_with_the_reason() -> None:
    options: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tower = SiglipVisionModel(SiglipVisionConfig(**options, num_attention_heads=4, image_size=56, patch_size=14))
    with pytest.raises(MergeError, match="adds to the attention scores"):
        get_peft_model(tower, SFAConfig()).merge_and_unload()  # pyright: ignore[reportCallIssue]


# -- the command ------------------------------------------------------------------------------------------------------


def run_sfa(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["share", *map(str, arguments)])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_command(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run_sfa(capsys, run)
    assert code == 0
    assert f"card: {run / 'final' / 'README.md'}" in out.replace("\n", "")
    code, out, _ = run_sfa(capsys, run, "--repo", "me/charts", "--results", "--dry-run", "--license", "mit")
    assert code == 0
    assert "results/predictions.jsonl" in out
    assert "dry run: nothing was sent to me/charts" in out
    assert ModelCard.load(run / "final" / "README.md").data.to_dict()["license"] == "mit"
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    code, out, _ = run_sfa(capsys, run / "final", "--repo", "me/charts", "--private")
    assert code == 0
    assert "sent: https://huggingface.co/me/x/commit/1" in out
    assert api.calls[0][1]["private"] is True


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((tmp_path / "nothing",), "holds no trained adapter"),
        ((run, "--results"), "--repo"),
        ((run, "--repo", "no name"), "repo='no name'"),
        ((), "Missing argument"),
    ):
        code, _, err = run_sfa(capsys, *arguments)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
    code, out, _ = run_sfa(capsys, "--help")
    assert code == 0
    assert "Example:  sfa share" in out
