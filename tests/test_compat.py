"""`compat.py`: only it reads versions, its ranges are the declared ones, and unknown names are errors."""

from __future__ import annotations

import ast
import re
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from sfa_adapters import compat
from sfa_adapters.compat import TESTED, cache_of, cache_of_output, check_versions, with_cache
from sfa_adapters.errors import UnknownInterfaceError, UntestedVersionWarning
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ("sfa_adapters", "backbones", "recipes", "benchmarks")
CACHE = DynamicCache(config=LlamaConfig(num_hidden_layers=1))


# -- versions ---------------------------------------------------------------------------------------------------------


def test_the_ranges_are_those_of_pyproject_and_the_readme_says_so() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["timm"]]
    for name, (first, end) in TESTED.items():
        assert f"{name}>={first},<{end}" in wanted
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name in ("torch", "transformers", "peft"):
        first, end = TESTED[name]
        major, minor = end.split(".")
        assert f"{name} {first}-{major}.{int(minor) - 1}" in readme
    assert f"timm {TESTED['timm'][0]} or a later 1.0 release" in readme
    assert TESTED["timm"][1] == "1.1"


def test_the_lowest_versions_are_the_lower_ends() -> None:
    lines = (ROOT / "constraints" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned.keys() == TESTED.keys()
    for name, (first, _) in TESTED.items():
        assert pinned[name].removesuffix(".0") == first.removesuffix(".0"), name


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What is installed, to be changed; None for not at all."""
    versions: dict[str, str | None] = {name: f"{first}.7" for name, (first, _) in TESTED.items()}
    versions["timm"] = "1.0.31"

    def version(name: str) -> str:
        if (value := versions[name]) is None:
            raise compat.PackageNotFoundError(name)
        return value

    monkeypatch.setattr(compat, "version", version)
    monkeypatch.setattr(compat, "_checked", False)
    return versions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch", "2.16.0+cu130"), ("torch", "2.16.0.dev20261101"), ("torch", "3.0"), ("transformers", "5.25.0"),
        ("transformers", "5.16.4"), ("peft", "0.22.0rc1"), ("timm", "1.1.0"), ("timm", "1.0.9"),
    ],
)  # fmt: skip
def test_a_version_outside_the_range_warns_once_by_name(
    installed: dict[str, str | None], name: str, value: str
) -> None:
    installed[name] = value
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check_versions()
        check_versions()
    first, end = TESTED[name]
    assert [warning.category for warning in seen] == [UntestedVersionWarning]
    assert f"tested with {name} from {first} to below {end}; {name} {value} is installed" in str(seen[0].message)


@pytest.mark.parametrize("torch_version", ["2.11", "2.11.0+cpu", "2.15.9"])
def test_versions_inside_the_range_and_a_missing_timm_say_nothing(
    installed: dict[str, str | None], torch_version: str
) -> None:
    installed.update(torch=torch_version, timm=None, transformers="5.24.3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions()


# -- nobody else asks -------------------------------------------------------------------------------------------------


def sources() -> Iterator[tuple[Path, str]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "compat.py" and "egg-info" not in str(path):
                yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


LIBRARIES = {"torch", "transformers", "peft", "timm", "accelerate", "trl"}
# Renamed or added between the supported versions: only compat.py may know them.
RENAMED = re.compile(
    r"past_key_values|(\bout(put)?s?|\bgenerated|\))\.cache\b|(\[|\.get\(|\.pop\()[\"']cache[\"']|mm_encoder_outputs|(activation|gradient)_checkpointing_enable"
    r"|loss_is_scaled_for_ga|is_activation_checkpointing|is_gradient_checkpointing"
)
# A benchmark that hands features over is for versions that take them.
ALLOWED = {("benchmarks/fastv.py", "mm_encoder_outputs")}


VERSION = re.compile(r"__version__|\bversion\(|parse_version|is_\w+_version|is_\w+_greater_or_equal")


def branches_on_versions(text: str) -> list[str]:
    """Where a source branches on what a library is or has: versions in comparisons, guarded imports, hasattr on it."""
    return [ast.unparse(node).split("\n")[0] for node in ast.walk(ast.parse(text)) if _branches(node)]


def _branches(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return bool(VERSION.search(ast.unparse(node)))
    if isinstance(node, ast.If | ast.IfExp):
        return bool(VERSION.search(ast.unparse(node.test)))
    if isinstance(node, ast.Try):
        names = [n.module or "" for n in node.body if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in node.body if isinstance(n, ast.Import) for alias in n.names]
        caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type is not None)
        return "ImportError" in caught and any(_is_library(name) for name in names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        asks = node.func.id == "hasattr" or (
            node.func.id == "getattr" and len(node.args) == 3 and isinstance(node.args[1], ast.Constant)
        )
        return asks and _is_library(ast.unparse(node.args[0]))
    return False


def _is_library(name: str) -> bool:
    return name.split(".")[0] in LIBRARIES


def renamed_names(text: str) -> list[str]:
    """The names of `RENAMED` that a source uses; comments do not count."""
    return [match[0] for match in RENAMED.finditer(ast.unparse(ast.parse(text)))]


def test_nobody_else_branches_on_a_version_or_knows_two_names() -> None:
    wrong = []
    for path, text in sources():
        wrong += [f"{path}: {line}" for line in branches_on_versions(text)]
        wrong += [f"{path}: {name}" for name in renamed_names(text) if (path.as_posix(), name) not in ALLOWED]
    assert not wrong, "Move these to sfa_adapters/compat.py:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "if torch.__version__ >= '2.12': pass",
        "new = version('peft') > '0.20'",
        "try:\n    from transformers.new import x\nexcept ImportError:\n    x = None",
        "if hasattr(torch.nn, 'RMSNorm'): pass",
        "getattr(transformers, 'AutoModelForImageTextToText', None)",
    ],
)
def test_the_check_for_branches_can_fail(text: str) -> None:
    assert branches_on_versions(text)


@pytest.mark.parametrize(
    "text",
    [
        "kwargs['cache']",
        "kwargs.get('cache')",
        "out.cache",
        "model(**batch).cache",
        "outputs.past_key_values",
        "f(past_key_values=x)",
    ],
)
def test_the_check_for_renamed_names_can_fail(text: str) -> None:
    assert renamed_names(text)
    assert not renamed_names("speed.cache is None  # past_key_values")


# -- the cache --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Takes a cache by the name `cache`."""

    def forward(self, x: Any, cache: Any = None, use_cache: bool = False, **kwargs: Any) -> None: ...


class OldLayer(nn.Module):
    """Takes a cache by its former name."""

    def forward(self, x: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


class ThirdLayer(nn.Module):
    """Takes a cache by another name."""

    def forward(self, x: Any, kv_store: Any = None, **kwargs: Any) -> None: ...


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("layer", [Layer(), OldLayer(), ThirdLayer()])
def test_a_cache_is_read_and_written_under_the_name_that_it_came_by(layer: nn.Module, name: str) -> None:
    kwargs = {name: CACHE, "use_cache": True}
    assert cache_of(layer, kwargs) is CACHE
    other = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
    assert with_cache(layer, kwargs, other) == {name: other, "use_cache": True}
    assert cache_of(layer, {name: None, "use_cache": True}) is None


def test_where_none_came_the_signature_names_it() -> None:
    assert with_cache(Layer(), {"x": 1}, CACHE) == {"x": 1, "cache": CACHE}
    assert with_cache(OldLayer(), {"x": 1}, CACHE) == {"x": 1, "past_key_values": CACHE}
    wrapper: Any = nn.Module()
    wrapper.get_base_model = OldLayer
    assert with_cache(wrapper, {}, CACHE) == {"past_key_values": CACHE}
    assert with_cache(ThirdLayer(), {"x": 1}, None) == {"x": 1}
    with pytest.raises(UnknownInterfaceError, match="ThirdLayer takes no cache by a name that is known"):
        with_cache(ThirdLayer(), {}, CACHE)


def test_no_cache_in_use_is_no_error_and_an_unknown_name_is_one() -> None:
    for layer in (Layer(), OldLayer()):
        assert cache_of(layer, {"use_cache": True}) is None  # its signature says that it is not given
    assert cache_of(ThirdLayer(), {"use_cache": False}) is None
    assert cache_of(ThirdLayer(), {}) is None
    assert cache_of(ThirdLayer(), {"use_cache": True}, decodes=False) is None
    for layer in (Layer(), ThirdLayer()):
        with pytest.raises(UnknownInterfaceError, match="gets a cache as kv_store=") as caught:
            cache_of(layer, {"kv_store": CACHE})
    assert "transformers (>=5.17,<5.25)" in str(caught.value)
    with pytest.raises(UnknownInterfaceError, match="use_cache=True and no cache argument"):
        cache_of(ThirdLayer(), {"use_cache": True})


@dataclass
class ThirdOutput:
    """An output whose cache has another name."""

    last_hidden_state: Any = None
    kv_store: Any = None


def test_the_cache_of_an_output() -> None:
    states = torch.zeros(1, 1, 1)
    fields: Mapping[str, Any] = with_cache(Layer() if _has_new_names() else OldLayer(), {}, CACHE)
    assert cache_of_output(BaseModelOutputWithPast(last_hidden_state=states, **fields)) is CACHE  # pyright: ignore
    assert cache_of_output((states, CACHE)) is CACHE
    assert cache_of_output((states,)) is None
    assert cache_of_output(CausalLMOutputWithPast(logits=states)) is None  # pyright: ignore[reportArgumentType]
    assert cache_of_output(SimpleNamespace(past_key_values=CACHE)) is CACHE
    assert cache_of_output({"cache": CACHE}) is CACHE
    with pytest.raises(UnknownInterfaceError, match="ThirdOutput returns a cache as kv_store"):
        cache_of_output(ThirdOutput(states, CACHE))


def _has_new_names() -> bool:
    return "cache" in BaseModelOutputWithPast.__dataclass_fields__


@pytest.mark.parametrize(
    ("installed", "takes", "skips"), [("5.17.3", False, True), ("5.18.0", True, True), ("5.23.0", True, False)]
)
def test_what_older_releases_of_transformers_drop(
    installed: str, takes: bool, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "version", lambda name: installed)
    assert compat.eager_takes_masks("dinov2") is takes
    assert compat.eager_takes_masks("vit")
    assert compat.resume_skips_outer_adapter() is skips


def test_models_that_a_release_ships_broken_count_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.has_vision_model("siglip")
    assert not compat.has_vision_model("no_such_model")
    for folder, first in compat.MENDED.items():
        monkeypatch.setattr(compat, "version", lambda name, first=first: first)
        assert compat.has_vision_model(folder)
        before = f"{first.partition('.')[0]}.{int(first.partition('.')[2]) - 1}.9"
        monkeypatch.setattr(compat, "version", lambda name, before=before: before)
        assert not compat.has_vision_model(folder)
        assert compat.has_vision_model("siglip")


def test_a_model_that_does_not_take_encoded_images_is_named() -> None:
    class Old(nn.Module):
        def forward(self, pixel_values: Any) -> None: ...

    class New(nn.Module):
        def forward(self, pixel_values: Any, mm_encoder_outputs: Any) -> None: ...

    assert compat.with_encoded_images(New(), 3) == {"mm_encoder_outputs": {"image": 3}}
    with pytest.raises(UnknownInterfaceError, match=r"Old of transformers .* does not take the output of its tower"):
        compat.with_encoded_images(Old(), 3)
