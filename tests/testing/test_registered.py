"""Where the suite finds small towers, and its errors where there are none."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib import import_module

import pytest

from sfa_adapters.errors import ContractError
from sfa_adapters.registry import Backbone, register_backbone, registered_backbones
from sfa_adapters.testing.cases import NoTower, TowerCase
from sfa_adapters.testing.members import Small, installed
from sfa_adapters.testing.registered import small_towers, towers_or_reasons
from sfa_adapters.testing.test_backbones import test_every_registered_backbone_has_a_small_tower as check_one
from tests.support.paths import ROOT

Register = Callable[[str | None], None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Registers a backbone named `new` for the time of a test."""
    geometry = registered_backbones()["clip"].geometry
    monkeypatch.setattr("sfa_adapters.registry._BACKBONES", registered_backbones())

    def add(small_towers: str | None) -> None:
        record = Backbone(
            name="new",
            towers=(),
            attentions=(),
            geometry=geometry,
            layouts=lambda *_: None,
            small_towers=small_towers,
        )
        register_backbone(record)

    return add


def test_every_backbone_of_this_library_brings_its_towers() -> None:
    entries = towers_or_reasons(runs=("everything", "bias", "nightly"))
    assert {entry.backbone if isinstance(entry, TowerCase) else entry.name for entry in entries} == set(
        registered_backbones()
    )
    assert {entry.library for entry in entries if isinstance(entry, NoTower)} <= {"transformers"}, "too old for some"
    assert [case.name for case in small_towers("idefics")] == ["idefics2", "idefics3", "smolvlm"]


def test_a_backbone_without_a_tower_is_noticed(register: Register) -> None:
    register(None)
    (entry,) = towers_or_reasons("new")
    assert isinstance(entry, NoTower)
    with pytest.raises(ContractError, match=r"'new' names no small tower .* small_towers=\"module:NAME\""):
        small_towers()
    with pytest.raises(pytest.fail.Exception, match="names no small tower"):
        check_one("new")


def test_a_family_that_the_installed_transformers_lacks_is_skipped(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("towers_of_tomorrow")
    module.NEW = installed("new", {}, {}, [Small("tomorrow.modeling_tomorrow", "Tower", "Config")])  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "towers_of_tomorrow", module)
    register("towers_of_tomorrow:NEW")
    with pytest.raises(pytest.skip.Exception, match="has no tower of backbone 'new' that works; install a newer one"):
        check_one("new")
    with pytest.raises(ContractError, match="install a newer one"):
        small_towers("new")
    assert "new" not in {case.backbone for case in small_towers(runs=("everything", "bias", "nightly"))}


def test_towers_of_a_library_that_is_missing_are_skipped(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "sfa_adapters.testing.towers_timm")
    (entry,) = towers_or_reasons("timm_vit")
    assert isinstance(entry, NoTower)
    assert entry.library == "timm"
    with pytest.raises(pytest.skip.Exception, match="small towers of 'timm_vit' need timm"):
        check_one("timm_vit")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("sfa_adapters.nowhere:NAME", "cannot be imported: No module named 'sfa_adapters.nowhere'"),
        ("sfa_adapters.testing.towers_qwen:NAME", "cannot be read: .*has no attribute 'NAME'"),
        ("no name at all", "cannot be read: invalid format"),
        ("sfa_adapters.testing.towers_qwen:QWEN_VIT", r"must be a sequence of TowerCase\(backbone='new', ...\); got"),
        ("tests.support.paths:__all__", "cannot be read"),
    ],
)
def test_a_place_that_holds_no_towers_is_an_error(register: Register, place: str, text: str) -> None:
    register(place)
    with pytest.raises(ContractError, match=f"Backbone 'new': small_towers={place!r} {text}"):
        towers_or_reasons()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ContractError, match="No backbone is named 'clipp'; registered: blip, clip, clip_kin"):
        small_towers("clip", "clipp")


def test_without_pytest_the_suite_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.delitem(sys.modules, "sfa_adapters.testing")
    with pytest.raises(ModuleNotFoundError, match=r"not installed\. Run: pip install pytest"):
        import_module("sfa_adapters.testing")


def test_no_other_module_imports_pytest() -> None:
    for folder in ("sfa_adapters", "backbones", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            if "testing" not in file.parts[len(ROOT.parts) :]:
                assert "import pytest" not in file.read_text("utf-8"), file
