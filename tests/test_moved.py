"""Old paths of modules: they give the module at its new place, one warning names it, and the table is right."""

import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from sfa_adapters import moved
from sfa_adapters.moved import old_keywords
from tests.support.paths import ROOT

# All modules that moved.
GONE = {
    "": "cli_analyze cli_app cli_bench cli_calibrate cli_density cli_errors cli_eval cli_quiet cli_share cli_study "
    "cli_train",
    "heads": "facts probe",
    "recipes": "answer_page attention_study bench_figure bench_heads bench_quality bench_tokens calibrate_dymu "
    "calibrate_heads charts data demo_charts demo_options demo_report demo_tables demo_tables_figures "
    "demo_tables_report density_data density_map devices encode evaluate finetune fonts heads_figure "
    "heads_quality heads_report korean legible many_heads nano_checkpoint nano_hosts nano_words own_host "
    "packing pages plots predictions pretrain questions render rendered_rows scans sheet shuffled_places "
    "sources table_pages table_pictures tables teacher_forcing token_budgets tokens_report train_density",
    "reduction": "asking cache_record calibrate dymu_config dymu_hooks dymu_tokens dymu_tower fastv_hooks fastv_input "
    "host_tokens kept logical_rope merging prompt selectors size_attention token_density vtu",
    "sharing": "facts",
    "training": "activations census collate columns engine evidence folders four_bit hosts local memory memory_plan "
    "pages plans prepare prompt pruned questions recipe rows settings sizes specs table tables",
}
# What the pages of 0.1 told users to import, before the modules moved.
DOCUMENTED = {
    "recipes": "charts data encode evaluate many_heads nano_checkpoint pages predictions pretrain questions "
    "rendered_rows shuffled_places sources",
    "training": "collate hosts memory plans questions recipe rows settings specs",
}


def _file(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Old paths that a test imported are unknown again behind it, as attributes of their packages too."""
    yield
    for old in moved.MODULES.keys() & sys.modules.keys():
        del sys.modules[old]
        package, _, name = old.rpartition(".")
        vars(sys.modules[package]).pop(name, None)


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_old_paths_are_free_and_new_ones_are_there(old: str) -> None:
    assert _file(moved.MODULES[old]).is_file()
    assert not _file(old).exists()
    assert not _file(old).with_suffix("").exists()
    assert _file(old).parent.is_dir()


def test_the_table_has_every_module_that_moved() -> None:
    assert set(moved.MODULES) == {
        ".".join(filter(None, ("sfa_adapters", package, name))) for package in GONE for name in GONE[package].split()
    }


def test_no_two_old_paths_lead_to_one_module() -> None:
    assert len(set(moved.MODULES.values())) == len(moved.MODULES)


@pytest.mark.parametrize("old", [f"{package}.{name}" for package in DOCUMENTED for name in DOCUMENTED[package].split()])
@pytest.mark.usefixtures("forgotten")
def test_an_old_path_gives_the_module_and_warns_once_where_it_is_imported(old: str) -> None:
    new = moved.MODULES[f"sfa_adapters.{old}"]
    module = import_module(new)
    package, _, name = f"sfa_adapters.{old}".rpartition(".")
    statement, namespace = f"from {package} import {name}\n", {}
    with pytest.warns(FutureWarning) as seen:
        exec(compile(2 * statement, "their_file.py", "exec"), namespace)
    assert namespace[name] is module
    assert module.__name__ == new
    assert module.__spec__ is not None
    assert module.__spec__.name == new
    (warning,) = [w for w in seen if "has moved" in str(w.message)]
    assert f"sfa_adapters.{old} has moved to {new};" in str(warning.message)
    assert warning.filename == "their_file.py"


def _pairs(table: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    return [(old, name) for old in table for name in table[old]]


@pytest.mark.parametrize(("old", "name"), _pairs(moved.NAMES))
@pytest.mark.usefixtures("forgotten")
def test_old_names_are_those_of_the_new_module(old: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = moved.NAMES[old][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the path of the module, where that moved too
        module = import_module(old)
    assert name not in vars(module)
    monkeypatch.setitem(vars(module), name, None)  # so that it is gone afterwards
    del vars(module)[name]
    with pytest.warns(FutureWarning, match=f"{old}.{name} has moved to {new};") as seen:
        values = [getattr(module, name) for _ in range(2)]
    package, _, new_name = new.rpartition(".")
    assert values == [getattr(import_module(package), new_name)] * 2
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize(("old", "name"), _pairs(moved.REPLACED))
@pytest.mark.usefixtures("forgotten")
@pytest.mark.filterwarnings("ignore:.* has moved to:FutureWarning")
def test_names_that_were_replaced_say_what_to_use(old: str, name: str) -> None:
    with pytest.raises(ImportError) as error:
        exec(f"from {old} import {name}")
    assert str(error.value) == f"{old}.{name} is no more: {moved.REPLACED[old][name]}."
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sys.modules[old].nonsense


def test_every_object_that_a_replacement_names_is_there() -> None:
    """`x of sfa_adapters.y` stands for `from sfa_adapters.y import x`."""
    texts = {text for names in moved.REPLACED.values() for text in names.values()}
    named = [pair for text in texts for pair in re.findall(r"(\w+)(?:\(\w*\))? of (sfa_adapters[.\w]+)", text)]
    assert len(named) >= 6
    for name, module in named:
        assert hasattr(import_module(module), name), (name, module)


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"sfa_adapters\.training\.nonsense"):
        import_module("sfa_adapters.training.nonsense")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = import_module("sfa_adapters.training.trainer").nonsense


def test_an_old_path_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "sfa_adapters.training.folders"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "sfa_adapters.training.folders has moved to sfa_adapters.files;" in done.stderr


def test_an_old_path_says_which_file_it_leads_to() -> None:
    """`python -m` makes it `sys.argv[0]`."""
    spec = find_spec("sfa_adapters.training.folders")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).samefile(ROOT / "sfa_adapters" / "files.py")


def test_the_program_of_an_older_installation_works(capsys: pytest.CaptureFixture[str]) -> None:
    from sfa_adapters.cli import main

    with pytest.warns(FutureWarning, match="Install it again"), pytest.raises(SystemExit) as left:
        main(["--version"])  # pyright: ignore[reportCallIssue]
    assert left.value.code == 0
    assert "sfa-adapters" in capsys.readouterr().out


@old_keywords(words="text")
def repeat(text: str, times: int = 2) -> str:
    return text * times


def test_a_keyword_by_its_old_name_is_the_new_one_and_warns() -> None:
    with pytest.warns(FutureWarning, match=r"repeat\(words=\.\.\.\) is text=\.\.\. now") as seen:
        assert repeat(words="a", times=3) == "aaa"  # pyright: ignore[reportCallIssue]
    assert [warning.filename for warning in seen] == [__file__]
    assert repeat("a") == repeat(text="a") == "aa"
    assert list(inspect.signature(repeat).parameters) == ["text", "times"]
    with pytest.raises(TypeError, match=r"got 'text', and 'words', which is its old name"):
        repeat(text="a", words="b")  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="wards"):
        repeat(wards="b")  # pyright: ignore[reportCallIssue]
