"""The registry of hosts: names, entry points, live models, and what a record refuses."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.hosts.spec import HOSTS, families
from sfa_adapters.reduction import FastVConfig, inject_fastv
from sfa_adapters.vlm import records
from sfa_adapters.vlm.records import check_allowed, find_spec, register_vlm, registered_vlms, vlm_spec
from sfa_adapters.vlm.spec import VLMSpec
from tests.support.hosts import HOSTS as CASES

OURS = {"internvl", "llava", "llava_next", "llava_onevision", "qwen2_5_vl"}


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
    assert set(registered_vlms()) == OURS
    assert set(families()) == OURS - {"llava_next"} == set(HOSTS)
    assert len(HOSTS) == 4
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


def test_a_model_without_a_record() -> None:
    other = next(case for case in CASES if case.name == "gemma3").build()
    assert find_spec(other) is None
    check_allowed(other, "fastv")
    assert find_spec(nn.Linear(2, 2)) is None


def test_what_a_record_refuses_the_user_reads(registered: dict[str, VLMSpec]) -> None:
    registered["llava"] = replace(registered["llava"], refuses={"fastv": "its layers look back. Use DyMU."})
    model = next(case for case in CASES if case.name == "llava").build()
    before = dict(model.__dict__)
    with pytest.raises(InjectionError, match=r"LLaVA-1\.5: its layers look back\. Use DyMU\."):
        inject_fastv(model, FastVConfig(layer=1))
    assert model.__dict__.keys() == before.keys()


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
