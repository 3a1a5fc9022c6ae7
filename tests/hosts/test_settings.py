"""Settings as people write them: YAML, `key=value`, types, near names, and files that read back equal."""

import errno
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfa_adapters.errors import RecipeError, TrainingError
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.hosts.settings import PEERS, load_recipe, write_recipe

BASE = Recipe(name="base", model="some/host", family="llava", adat=0.5, revision="main", sfa_layers=(1,))


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("lr=2e-5", "lr", 2e-5),
        ("epochs=2", "epochs", 2.0),
        ("limit=1e3", "limit", 1000),
        ("max_steps=2_000", "max_steps", 2000),
        ("freeze-vision=yes", "freeze_vision", True),
        ("--freeze-llm=on", "freeze_llm", True),
        ("sfa=False", "sfa", False),
        ("gradient_checkpointing=0", "gradient_checkpointing", False),
        ("adat=none", "adat", None),
        ("vision_lr=None", "vision_lr", None),
        ("revision=0123456", "revision", "0123456"),
        ("revision=", "revision", None),
        ("sfa_terms=row,col", "sfa_terms", ("row", "col")),
        ("sfa_terms= block , dist ", "sfa_terms", ("block", "dist")),
        ("sfa_layers=0, 2,5", "sfa_layers", (0, 2, 5)),
        ("sfa_layers=none", "sfa_layers", None),
        ("plan=split", "plan", "split"),
        ("log=none", "log", "none"),
        ("data=a=b.jsonl", "data", "a=b.jsonl"),
        (r"prompt={question}\nShort: ", "prompt", "{question}\nShort: "),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(override: str, field: str, value: Any):
    parsed = getattr(load_recipe(BASE, None, [override]), field)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("lr: 2e-5", "lr", 2e-5),  # text, to YAML
        ("limit: 500", "limit", 500),
        ("freeze-vision: yes", "freeze_vision", True),
        ("sfa_terms: [row, col]", "sfa_terms", ("row", "col")),
        ("sfa_terms: row,col", "sfa_terms", ("row", "col")),
        ("sfa_layers: [0, 3]", "sfa_layers", (0, 3)),
        ("adat: null", "adat", None),
        ("adat: none", "adat", None),
        ("revision: '0123456'", "revision", "0123456"),
        ('prompt: "{question}\\nKürze ist 답"', "prompt", "{question}\nKürze ist 답"),
        ("# only a remark", "adat", 0.5),
        ("", "adat", 0.5),
    ],
)
def test_yaml_is_read_by_the_type_of_the_field(tmp_path: Path, text: str, field: str, value: Any):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    parsed = getattr(load_recipe(BASE, file), field)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sfa_term", "sfa_terms"),
        ("epoch", "epochs"),
        ("frieze_vision", "freeze_vision"),
        ("learning-rate", "lr"),
        ("learnig_rate", "lr"),
    ],
)
def test_an_unknown_key_suggests_the_near_one(tmp_path: Path, key: str, near: str):
    file = tmp_path / "run.yaml"
    file.write_text(f"lr: 1e-5\n{key}: 1\n")
    with pytest.raises(RecipeError, match=f"Unknown setting '{key}' in .*run.yaml. Did you mean {near}[?]"):
        load_recipe(BASE, file)
    with pytest.raises(RecipeError, match=f"Unknown setting '{key}' on the command line. Did you mean {near}[?]"):
        load_recipe(BASE, None, [f"{key}=1"])


def test_a_key_that_is_like_none_lists_all():
    with pytest.raises(RecipeError, match=r"Unknown setting 'qqq' on the command line. There are: name, model, .* log"):
        load_recipe(BASE, None, ["qqq=1"])


def test_every_name_that_peers_use_points_to_a_setting():
    for wrong, right in PEERS.items():
        assert hasattr(BASE, right)
        assert not hasattr(BASE, wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: fast", "lr='fast' in .*run.yaml must be a number[.]"),
        ("lr: true", "lr=True in .* must be a number"),
        ("lr: [1]", "lr=.1. in .* must be a number"),
        ("limit: 2.5", "limit=2.5 in .* must be a whole number, or none"),
        ("limit: .inf", "limit=inf in .* must be a whole number, or none"),
        ("freeze_vision: 2", "freeze_vision=2 in .* must be true or false"),
        ("revision: 12345", "revision=12345 in .* must be text .in quotes, in YAML., or none"),
        ("name: null", "name=None in .* must be text"),
        ("sfa_terms: 3", "sfa_terms=3 in .* must be a list like row,col"),
        ("sfa_layers: [a]", "sfa_layers=.'a'. in .* must be a list like 0,1,2, or none"),
        ("plan: 4", "plan=4 in .* must be one of nf4, split, bf16, fsdp2"),
        ("plan: int8", "plan='int8' must be one of nf4, split, bf16, fsdp2"),
        ("lr: -1", "lr=-1.0 must be a number above 0"),
        ("lr: nan", "lr=nan must be a number above 0"),
        ("plan: nf4\nfreeze_llm: false", "4-bit weights cannot train"),
        ("- lr", "must hold one `key: value` for each setting"),
        ("lr: [1", "cannot be read as YAML"),
        ("1: 2", "Unknown setting 1 in"),
        ("x: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_a_wrong_value_is_named_with_the_file_and_what_it_must_be(tmp_path: Path, text: str, message: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(BASE, file)


@pytest.mark.parametrize("override", ["lr", "=3", ""])
def test_what_is_no_setting_is_refused(override: str):
    with pytest.raises(RecipeError, match=r"is no setting[.] Write key=value"):
        load_recipe(BASE, None, [override])


def test_a_missing_file_a_folder_and_another_format_are_told(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"There is no file .*nowhere[.]yaml"):
        load_recipe(BASE, tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot be read as YAML"):
        load_recipe(BASE, tmp_path)
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00\x93")
    with pytest.raises(RecipeError, match="cannot be read as YAML"):
        load_recipe(BASE, tmp_path / "weights")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\nepochs: 5\nplan: bf16\nfreeze_llm: false\n")
    recipe = load_recipe(BASE, file, ["lr=2", "lr=3", "seed=7"])
    assert recipe == BASE.replace(lr=3.0, epochs=5.0, plan="bf16", freeze_llm=False, seed=7)
    assert BASE.lr == 2e-5


RECIPES = st.builds(
    lambda batch, micro, **settings: BASE.replace(batch_size=batch * micro, micro_batch=micro, **settings),
    st.integers(1, 64),
    st.integers(1, 4),
    lr=st.floats(1e-12, 1e3),
    sfa_lr=st.floats(1e-12, 1e3),
    init_strength=st.floats(0.01, 100.0),
    vision_lr=st.none() | st.floats(1e-12, 1.0),
    adat=st.none() | st.floats(0.01, 1.0),
    revision=st.none() | st.sampled_from(["main", "0123456", "1e10", "0x1F", "true", "2026-01-02", "~"]),
    sfa_layers=st.none() | st.lists(st.integers(0, 47), max_size=4).map(tuple),
    sfa_terms=st.lists(st.sampled_from(["row", "col", "dist", "block"]), min_size=1, unique=True).map(tuple),
    freeze_vision=st.booleans(),
    max_steps=st.none() | st.integers(1, 10**9),
    prompt=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20).map(
        lambda t: t + "{question}"
    ),
)


@settings(max_examples=40, deadline=None)
@given(recipe=RECIPES)
@example(recipe=BASE.replace(prompt="\x85;\u2028\u2029 Kürze ist 답 {question}"))
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe):
    file = write_recipe(recipe, tmp_path_factory.getbasetemp() / "settings" / "recipe.yaml")
    other = Recipe(name="other", model="m", family="internvl", plan="split")
    assert load_recipe(other, file) == recipe


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_recipe(BASE, tmp_path / "recipe.yaml")
    before = file.read_text()

    def half(self: Path, text: str, **_: Any) -> int:
        with open(self, "w") as out:
            out.write(text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(TrainingError, match=r"recipe.yaml"):
        write_recipe(BASE.replace(seed=9), file)
    assert file.read_text() == before
