"""Features attach to modules by name: attached and removed in any order, they leave nothing behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfa_adapters import eject_sfa, features_of, inject_sfa, observe
from sfa_adapters.adat import AdaptiveTokenizer, PatchPolicy, eject_adat, inject_adat
from sfa_adapters.errors import SFAError
from sfa_adapters.hooks import attach, attached_while, attachment_of, detach, detach_all, state_of, watch_method
from sfa_adapters.recipes.nano.models import build_nano
from sfa_adapters.reduction import DyMUConfig, FastVConfig, inject_dymu, inject_fastv
from sfa_adapters.reduction.dymu.inject import eject_dymu
from sfa_adapters.reduction.fastv.inject import eject_fastv
from sfa_adapters.scr import SCRConfig
from sfa_adapters.scr.watch import Watch
from tests.support.compare import strong_config

# -- any features of a host, in any order -----------------------------------------------------------------------------


def _inject_sfa(model: nn.Module) -> None:
    torch.manual_seed(3)
    inject_sfa(model, strong_config())


INJECT: dict[str, Callable[[nn.Module], Any]] = {
    "sfa": _inject_sfa,
    "adat": lambda model: inject_adat(
        model, AdaptiveTokenizer(policy=PatchPolicy(scorer="edges", budget=0.5), residual=True)
    ),
    "dymu": lambda model: inject_dymu(model, DyMUConfig(thresholds=0.6, language="logical_rope")),
    "fastv": lambda model: inject_fastv(model, FastVConfig(layer=2, ratio=0.5)),
    # Watches the packing method of the host, as DyMU does; each refuses the other.
    "fastv by density": lambda model: inject_fastv(model, FastVConfig(layer=2, ratio=0.5, selector="density")),
    "fastv at the input": lambda model: inject_fastv(model, FastVConfig(layer=2, ratio=0.5, prune_at="input")),
}
EJECT: dict[str, Callable[[nn.Module], Any]] = {
    "sfa": eject_sfa, "adat": eject_adat, "dymu": eject_dymu, "fastv": eject_fastv,
}  # fmt: skip
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_load_state_dict_pre_hooks", "_state_dict_hooks",
)  # fmt: skip


@cache
def _host() -> nn.Module:
    model = build_nano("llava_onevision").model.eval()
    _logits(model)  # transformers puts hooks of its own into a tower at its first forward
    return model


@cache
def _inputs() -> dict[str, Any]:
    host = build_nano("llava_onevision")
    text = torch.tensor([[5, 6, 7, 8, 9]])
    image = torch.full((1, host.image_tokens), host.model.config.image_token_id)
    ids = torch.cat((text[:, :1], image, text[:, 1:]), 1)
    pixels = torch.randn(1, 1, 3, host.pixels, host.pixels, generator=torch.Generator().manual_seed(1))
    pixels[..., host.pixels // 3 :] = 1.0  # a blank part, for ADAT and for DyMU
    sizes = torch.tensor([[host.pixels, host.pixels]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**_inputs()).logits


def _outcome(model: nn.Module) -> bytes:
    """Every bit of the logits."""
    return _logits(model).numpy().tobytes()


@cache
def _expected(features: tuple[str, ...]) -> bytes:
    """The outcome of a fresh model with these features, injected in this order and never ejected."""
    model = copy.deepcopy(_host())
    for feature in features:
        INJECT[feature](model)
    return _outcome(model)


def _name(feature: str) -> str:
    return feature.partition(" ")[0]


def _traces(model: nn.Module) -> dict[str, Any]:
    """Attributes, hooks, children and parameters of every module."""
    return {
        name: (
            sorted(module.__dict__),
            [list(getattr(module, hooks)) for hooks in HOOKS],
            {child: id(value) for child, value in module._modules.items()},
            {key: id(value) for key, value in module._parameters.items()},
            module.training,
        )
        for name, module in model.named_modules()
    }


STEPS = st.lists(st.tuples(st.sampled_from([*INJECT, "scr"]), st.booleans()), min_size=3, max_size=7)


@settings(max_examples=6, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(STEPS)
@example([("fastv by density", True), ("dymu", True), ("fastv", False), ("dymu", False)])
@example([("adat", True), ("dymu", True), ("sfa", True), ("adat", False), ("scr", True), ("dymu", False)])
@example([("fastv at the input", True), ("dymu", True), ("adat", False), ("sfa", True), ("sfa", True)])
@example([("dymu", True), ("fastv", True), ("scr", True), ("adat", True), ("dymu", False), ("scr", False)])
def test_features_come_and_go_in_any_order(steps: list[tuple[str, bool]]) -> None:
    """Injects (True) and ejects (False); an error of the library must leave the model as it was."""
    model = copy.deepcopy(_host())
    at_first, present = _traces(model), []
    watched, seen = ExitStack(), None
    for feature, inject in steps:
        before = _traces(model)
        if feature == "scr":
            watched.close()
            if inject:
                watch = Watch(model, SCRConfig(entropy=0.0, grounding=0.3))
                with torch.no_grad():
                    seen = watched.enter_context(watch())
                assert features_of(model)["scr"] is seen
        else:
            try:
                INJECT[feature](model) if inject else EJECT[_name(feature)](model)
            except SFAError:
                assert _traces(model) == before
                there = _name(feature) in map(_name, present)
                dymu_after = feature == "dymu" and "fastv at the input" in present
                density_and_dymu = {"fastv by density", "dymu"} <= {feature, *present}
                assert dymu_after or density_and_dymu if inject and not there else inject == there
                continue
            if inject:
                present.append(feature)
            else:
                present = [name for name in present if _name(name) != _name(feature)]
        assert features_of(model).keys() - {"scr", "observe"} == set(map(_name, present))
        if "scr" not in features_of(model) or feature == "scr":  # a watch is for one forward
            outcome = _outcome(model)
            assert outcome == _expected(tuple(present))
            assert (outcome == _expected(())) == (not present)
        if feature == "scr" and inject:
            assert seen is not None
            assert len(seen.towers) == 1
            assert seen.calls
    watched.close()
    for feature in reversed(present) if len(steps) % 2 else present:
        EJECT[_name(feature)](model)
    assert _traces(model) == at_first
    assert not features_of(model)
    assert _outcome(model) == _expected(())


# -- one module ------------------------------------------------------------------------------------------------------


class Packer(nn.Module):
    """A module with a method that no hook reaches."""

    def pack(self, tiles: int, newline: int = 1) -> int:
        return tiles + newline

    def forward(self, number: int) -> int:
        return number


def _log(feature: str) -> Callable[..., None]:
    def hook(module: nn.Module, *rest: Any) -> None:
        state_of(module, feature).append(feature)

    return hook


def test_detaching_one_feature_leaves_the_others_hooks_on_the_same_module() -> None:
    module, calls = Packer(), []
    before = sorted(module.__dict__)
    for feature in ("first", "second"):
        attach(module, feature, calls, pre=_log(feature), post=_log(feature), always_call=True)
    attach(module, "second", calls, place=0)
    attach(module, "second", calls)
    assert attachment_of(module, "second").place == 0
    assert detach(module, "first")
    assert not detach(module, "first")
    module(1)
    assert calls == ["second", "second"]
    assert list(features_of(module)) == ["second"]
    assert detach_all(module, "second")
    assert not detach_all(module, "second")
    module(1)
    assert calls == ["second", "second"]
    assert sorted(module.__dict__) == before
    assert not any(getattr(module, hooks) for hooks in HOOKS)


def test_a_feature_is_taken_from_every_module_of_a_model_and_has_the_state_that_came_last() -> None:
    model = nn.Sequential(Packer(), nn.Sequential(Packer(), Packer()))
    for module in model.modules():
        attach(module, "one", "before")
        attach(module, "one", "afterwards")
        attach(module, "two", "stays")
    assert dict(features_of(model)) == {"one": "afterwards", "two": "stays"}
    assert detach_all(model, "one")
    assert [state_of(module, "one") for module in model.modules()] == [None] * 5
    assert [state_of(module, "two") for module in model.modules()] == ["stays"] * 5
    assert state_of(Packer(), "one") is None


class Failing(Packer):
    def forward(self, number: int) -> int:
        raise RuntimeError("out of memory")


def test_a_hook_may_run_in_front_of_others_and_after_an_error() -> None:
    module, calls = Failing(), []
    module.register_forward_hook(lambda *_: calls.append("foreign"), always_call=True)
    attach(module, "behind", None, post=lambda *_: calls.append("behind"), always_call=True)
    attach(module, "front", None, post=lambda *_: calls.append("front"), prepend=True, always_call=True)
    attach(module, "silent", None, post=lambda *_: calls.append("silent"))
    with pytest.raises(RuntimeError, match="out of memory"):
        module(1)
    assert calls == ["front", "foreign", "behind"]


@pytest.mark.parametrize("first", ["one", "two"])
@pytest.mark.parametrize("foreign", [False, True])
def test_a_method_is_watched_until_nobody_does(first: str, foreign: bool) -> None:
    module, calls = Packer(), []
    if foreign:
        module.__dict__["pack"] = lambda tiles, newline=1: 100
    before = dict(module.__dict__)

    def watcher(feature: str) -> Callable[..., None]:
        def watch(module: Any, method: Any, called: dict[str, Any]) -> None:
            assert method(**called) == 5  # the class's own, which may be called with other arguments
            called["tiles"] = 99
            calls.append(feature)

        return watch

    for feature in ("one", "two"):
        attach(module, feature, None)
        watch_method(module, feature, "pack", watcher(feature))
    assert module.pack(4) == (100 if foreign else 5)
    assert calls == ["one", "two"]
    detach(module, first)
    assert module.pack(tiles=4) == (100 if foreign else 5)
    assert calls == ["one", "two", "two" if first == "one" else "one"]
    detach(module, "two" if first == "one" else "one")
    assert module.__dict__ == before


def test_a_method_that_somebody_shadowed_behind_us_stays_his() -> None:
    module = Packer()
    attach(module, "one", None)
    watch_method(module, "one", "pack", lambda *_: None)
    ours = module.__dict__["pack"]
    module.__dict__["pack"] = lambda tiles: ours(tiles) + 10
    detach(module, "one")
    assert module.pack(4) == 15


def test_watchers_of_two_methods_and_one_that_goes_while_it_watches() -> None:
    module, calls = Packer(), []

    def once(module: nn.Module, method: Any, called: dict[str, Any]) -> None:
        calls.append("one")
        detach(module, "one")

    for feature, name, watcher in (
        ("one", "pack", once),
        ("two", "forward", lambda *_: calls.append("two")),
        ("three", "pack", lambda *_: calls.append("three")),
    ):
        attach(module, feature, None)
        watch_method(module, feature, name, watcher)
    assert [module.pack(4), module.pack(4)] == [5, 5]
    assert calls == ["one", "three", "three"]
    assert module(1) == 1
    assert calls[-1] == "two"


class Unhooked(Packer):
    def register_forward_hook(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("no hooks here")


@pytest.mark.parametrize("kind", [Packer, Unhooked])
def test_a_context_that_fails_leaves_nothing(kind: type[Packer]) -> None:
    module = kind()
    before = sorted(module.__dict__)
    with pytest.raises(RuntimeError), attached_while("look") as attach_here:  # noqa: PT012
        attach_here(module, None, pre=lambda *_: None, post=lambda *_: None)
        raise RuntimeError
    assert sorted(module.__dict__) == before
    assert not any(getattr(module, hooks) for hooks in HOOKS)


def test_contexts_of_one_feature_take_away_their_own() -> None:
    module, calls = Packer(), []
    with attached_while("look") as outer:
        outer(module, "outer", pre=lambda *_: calls.append("outer"))
        with attached_while("look") as inner:
            inner(module, "inner", pre=lambda *_: calls.append("inner"))
            assert features_of(module) == {"look": "outer"}
            module(1)
        module(1)
    module(1)
    assert calls == ["outer", "inner", "outer"]
    assert not features_of(module)


def test_observing_is_a_feature_while_it_lasts() -> None:
    model = copy.deepcopy(_host())
    with observe(model, lambda call: None) as observation:
        assert dict(features_of(model)) == {"observe": observation}
        _logits(model)
    assert not features_of(model)


def test_a_copy_has_its_own_attachments_and_what_is_given_cannot_be_written() -> None:
    module = Packer()
    attach(module, "one", [], pre=_appending)
    attachment_of(module, "one").mask = "a mask under way"
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert attachment_of(twin, "one").mask is None
        twin(1)
        assert features_of(twin)["one"] == ["called"]
        detach(twin, "one")
        assert not twin._forward_pre_hooks
    assert features_of(module)["one"] == []
    with pytest.raises(TypeError):
        features_of(module)["two"] = 2  # pyright: ignore[reportIndexIssue]


def _appending(module: nn.Module, args: Any, kwargs: Any) -> None:
    state_of(module, "one").append("called")
