"""The registry of hosts: names, entry points, live models, and what a record refuses."""

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from sfa_adapters import plugins
from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.hosts.spec import HOSTS, families
from sfa_adapters.reduction import FastVConfig, inject_fastv
from sfa_adapters.vlm import records
from sfa_adapters.vlm.records import check_allowed, find_spec, register_vlm, registered_vlms, vlm_spec
from sfa_adapters.vlm.spec import FEATURES, VLMSpec
from tests.support.hosts import HOSTS as CASES

OURS = {"internvl", "llava", "llava_next", "llava_onevision", "qwen2_5_vl"}
OURS |= {"glm_ocr", "paddleocr_vl", "qwen3_5", "qwen3_vl", "gemma3", "gemma4", "idefics3", "lighton_ocr", "smolvlm"}


@pytest.fixture
def registered() -> Iterator[dict[str, VLMSpec]]:
    """The table of records, put back afterwards."""
    registered_vlms()
    before = dict(records._SPECS)
    yield records._SPECS
    records._SPECS.clear()
    records._SPECS.update(before)


def _spec(**changes: Any) -> VLMSpec:
    return replace(vlm_spec("llava"), name="mine", title="Mine", **changes)


def test_the_records_of_the_library_are_found() -> None:
    registered_vlms().clear()
    assert set(registered_vlms()) == OURS
    assert set(families()) == OURS - {"llava_next"} == set(HOSTS)
    assert len(HOSTS) == len(OURS) - 1
    with pytest.raises(KeyError):
        HOSTS["llava_next"]


def test_a_name_that_is_not_there_and_one_that_is(registered: dict[str, VLMSpec]) -> None:
    with pytest.raises(RecipeError, match=r"family='lava' is not registered; there are .*llava_next.*adding_a_host"):
        vlm_spec("lava")
    with pytest.raises(RecipeError, match="A host named 'llava' is registered already"):
        register_vlm(vlm_spec("llava"))
    with pytest.raises(RecipeError, match="refuses 'everything'; it can refuse train, adat"):
        register_vlm(_spec(refuses={"everything": "no."}))
    assert register_vlm(_spec()) is vlm_spec("mine")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in OURS], ids=str)
def test_a_live_model_and_its_core_have_their_record(case: Any) -> None:
    model: Any = case.build()
    assert find_spec(model) is vlm_spec(case.name)
    assert find_spec(model.model) is vlm_spec(case.name)
    wrapped = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))
    assert find_spec(wrapped) is vlm_spec(case.name)


class Mine(nn.Module):
    """A class of the user around the core of a known model."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core


def test_a_class_around_a_known_core_has_its_record_unless_it_has_one(registered: dict[str, VLMSpec]) -> None:
    model = Mine(next(case for case in CASES if case.name == "llava").build().get_submodule("model"))
    assert find_spec(model) is vlm_spec("llava")
    registered["mine"] = _spec(classes=("*.Mine",))
    assert find_spec(model) is registered["mine"]


def test_a_model_of_another_class_is_refused_and_a_sharded_one_is_not() -> None:
    model: Any = next(case for case in CASES if case.name == "llava").build()
    with pytest.raises(RecipeError, match="family='internvl' is InternVLForConditionalGeneration, but the model is a "):
        vlm_spec("internvl").places(model)
    places = vlm_spec("llava").places(model)
    model.__class__ = type("FSDPLlavaForConditionalGeneration", (type(model),), {})  # as `fully_shard` does
    assert replace(vlm_spec("llava").places(model), model_class=places.model_class) == places


def test_a_record_passes_on_all_places_that_it_names() -> None:
    model = next(case for case in CASES if case.name == "llava").build()
    named: dict[str, Any] = {
        "tower": "model.vision_tower",
        "projector": ("model.multi_modal_projector", "model.language_model.embed_tokens", "lm_head"),
        "language_model": "model.language_model.layers",
        "lm_head": "model.language_model.norm",
        "layer_classes": ("Layer",),
        "unread": ("head",),
    }
    places = _spec(**named).places(model)
    assert {name: getattr(places, name) for name in named} == named
    with pytest.raises(RecipeError, match=r"has no model\.eye"):
        _spec(tower="model.eye").places(model)


def test_a_package_whose_module_fails_fails_again_and_works_when_it_is_mended(
    registered: dict[str, VLMSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "their_host-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-host\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[sfa_adapters.hosts]\ntheirs = their_host\n")
    file = tmp_path / "their_host.py"
    file.write_text("raise ImportError('their library is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(records, "_loaded_entry_points", set(records._loaded_entry_points))
    for _ in range(2):
        with pytest.raises(ImportError, match="their library is missing"):
            registered_vlms()
    file.write_text(
        "from dataclasses import replace\n"
        "from sfa_adapters.vlm.records import register_vlm, vlm_spec\n"
        "import sfa_adapters.recipes.vlms.llava as llava\n"
        "register_vlm(replace(llava.SPEC, name='theirs', classes=('their_host.*',)))\n"
    )
    importlib.invalidate_caches()
    assert set(registered_vlms()) == {*OURS, "theirs"}
    assert vlm_spec("theirs").title == "LLaVA-1.5"
    sys.modules.pop("their_host")


def test_the_metadata_of_all_packages_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 12 ms in an environment of 135 packages, and every search for a record asks."""
    registered_vlms()
    monkeypatch.setattr(plugins, "entry_points", lambda group: pytest.fail("read again"))
    assert set(registered_vlms()) >= set(OURS)


def test_a_model_without_a_record() -> None:
    other = next(case for case in CASES if case.name == "paligemma").build()
    assert find_spec(other) is None
    check_allowed(other, "fastv")
    assert find_spec(nn.Linear(2, 2)) is None


def test_what_a_record_refuses_the_user_reads(registered: dict[str, VLMSpec]) -> None:
    registered["llava"] = replace(registered["llava"], refuses={"fastv": "its layers look back. Use DyMU."})
    model = next(case for case in CASES if case.name == "llava").build()
    before = dict(model.__dict__)
    with pytest.raises(InjectionError, match=r"^LLaVA-1\.5: its layers look back\. Use DyMU\.$"):
        inject_fastv(model, FastVConfig(layer=1))
    assert model.__dict__.keys() == before.keys()


def test_the_reason_of_a_record_comes_before_what_it_leaves_out() -> None:
    assert (
        vlm_spec("llava_next").refusal("train")
        == "LLaVA-NeXT: there is no recipe for it yet. Inject adapters and use a Trainer of your own."
    )
    reasons: Any = dict.fromkeys(FEATURES, "it is not tried.")
    bare = _spec(images=None, memory=None, image_tokens=None, refuses=reasons)
    assert {bare.refusal(feature) for feature in FEATURES} == {"Mine: it is not tried."}


def test_parts_that_a_record_leaves_out_are_refused_by_name() -> None:
    bare = _spec(images=None, memory=None, image_tokens=None)
    assert bare.refusal("train") == "Mine: its record has no rules for images."
    assert bare.refusal("memory") == "Mine: its record has no rules for memory."
    assert bare.refusal("dymu") == "Mine: its record does not say which image tokens the patches become."
    assert bare.refusal("heads") is None
    with pytest.raises(RecipeError, match="no rules for memory"):
        bare.require("memory")
    bare.require("heads")


def test_records_are_pickled_and_copied_as_their_names() -> None:
    spec = vlm_spec("qwen2_5_vl")
    assert pickle.loads(pickle.dumps(spec)) is spec
    assert copy.deepcopy(spec) is spec


def test_a_record_that_is_not_registered_is_not_copied_as_another_one() -> None:
    for spec in (replace(vlm_spec("llava"), unread=()), _spec()):
        with pytest.raises(
            RecipeError, match=f"no record of a host that is registered as {spec.name!r}.*call register"
        ):
            copy.deepcopy(spec)
