"""DyMU on real towers and hosts: against a slow tower, exact where nothing merges, in batches, with SFA and ADAT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import SiglipImageProcessor
from typer.testing import CliRunner

from sfa_adapters import eject_sfa, features_of, inject_sfa, observe
from sfa_adapters.adat import PatchPolicy, eject_adat, inject_adat
from sfa_adapters.cli.calibrate import app
from sfa_adapters.errors import (
    AdapterMismatchError,
    BiasNotAppliedError,
    DataError,
    InjectionError,
    LayoutError,
    RecipeError,
    SFAError,
    WeightsError,
)
from sfa_adapters.readers import RowEntropy
from sfa_adapters.recipes.calibrate.dymu import run_calibrate_dymu
from sfa_adapters.reduction.dymu.calibrate import calibrate_dymu, threshold_of
from sfa_adapters.reduction.dymu.config import DyMUConfig, load_dymu, save_dymu
from sfa_adapters.reduction.dymu.inject import dymu_state, eject_dymu, inject_dymu, token_counts
from sfa_adapters.reduction.dymu.size_attention import SizedPackedMask, sized_attention
from tests.support.compare import Snapshot, assert_close, strong_config
from tests.support.dymu import BY_NAME, NAMES, THRESHOLD, slow_tower
from tests.support.hosts import HOSTS, lm_loss, logits_of
from tests.support.reference import regular_places
from tests.support.towers import CASES, TowerCase, set_checkpointing, set_eager

TOWERS = {case.name: case for case in CASES}
every_host = pytest.mark.parametrize("name", NAMES)
MERGING = ("clip", "internvit", "internvit_qknorm", "siglip", "qwen2_5", "timm_cls", "timm_reg4", "timm_qknorm")
every_merging_tower = pytest.mark.parametrize("name", MERGING)
OFF = DyMUConfig(thresholds=1.0)


def hidden(case: TowerCase, tower: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return case.hidden(tower, inputs)


# -- the tower --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sfa", [None, "before", "after"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_merging_tower_is_the_slow_one_image_by_image(name: str, sfa: str | None) -> None:
    case = TOWERS[name]
    tower, inputs = case.fresh()
    torch.manual_seed(3)
    thresholds = (0.3, 0.1)
    if sfa == "before":
        inject_sfa(tower, strong_config())
    inject_dymu(tower, DyMUConfig(thresholds=thresholds))
    if sfa == "after":
        inject_sfa(tower, strong_config())
    with torch.no_grad():
        output: Any = tower(**inputs, output_hidden_states=True)
        places = regular_places((4, 4), case.prefix)
        counts = token_counts(tower).after
        eject_dymu(tower)
        for image in range(2):
            wanted = slow_tower(tower, inputs["pixel_values"][image : image + 1], thresholds, places)
            for states, behind in zip(output.hidden_states[1:], wanted, strict=True):
                assert_close(states[image].double(), behind, 1e-4)
    assert all(count < 16 for count in counts)


def test_recorded_hidden_states_are_those_of_each_layer() -> None:
    """LLaVA reads one that is not the last."""
    case = TOWERS["clip"]
    tower, inputs = case.fresh()
    inject_dymu(tower, DyMUConfig(thresholds=(0.3, 0.1)))
    with torch.no_grad():
        output: Any = tower(**inputs, output_hidden_states=True)
        short: Any = inject_dymu(eject_dymu(tower), DyMUConfig(thresholds=(0.3, 1.0)))(
            **inputs, output_hidden_states=True
        )
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 17, 32)] * 4
    assert torch.equal(output.hidden_states[2], short.hidden_states[2])  # in front of the second merge
    assert_close(output.hidden_states[3], output.last_hidden_state, 0)
    assert (output.hidden_states[3] - short.hidden_states[3]).abs().max() > 1e-3


@every_merging_tower
def test_a_threshold_of_one_is_the_untouched_tower_and_ejecting_too(name: str) -> None:
    case = TOWERS[name]
    tower, inputs = case.fresh()
    plain = hidden(case, tower, inputs)
    before = Snapshot(tower)
    inject_dymu(tower, OFF)
    assert list(tower.state_dict()) == list(before.tensors)
    assert all(map(torch.equal, hidden(case, tower, inputs), plain))
    eject_dymu(tower)
    before.assert_unchanged(tower)
    inject_dymu(tower, DyMUConfig(thresholds=THRESHOLD))
    assert not any(map(torch.equal, hidden(case, tower, inputs), plain))
    eject_dymu(tower)
    before.assert_unchanged(tower)
    assert all(map(torch.equal, hidden(case, tower, inputs), plain))


@every_merging_tower
@pytest.mark.parametrize("eager", [False, True])
def test_a_batch_is_its_images_one_at_a_time(name: str, eager: bool) -> None:
    case = TOWERS[name]
    if eager and not case.eager_takes_bias:
        pytest.skip("SDPA only")
    tower, inputs = case.fresh()
    if eager:
        set_eager(case, tower)
    inject_dymu(tower, DyMUConfig(thresholds=THRESHOLD))
    together = hidden(case, tower, inputs)
    counts = token_counts(tower).after
    for number, alone in enumerate(case.split(inputs)):
        assert_close(hidden(case, tower, alone)[0], together[number], 1e-4)
        assert token_counts(tower).after == counts[number : number + 1]


@every_merging_tower
def test_sfa_goes_along(name: str) -> None:
    """The bias must follow the merged tokens: with its scalars at zero it changes nothing, and else something."""
    case = TOWERS[name]
    tower, inputs = case.fresh()
    inject_sfa(tower, strong_config())
    inject_dymu(tower, DyMUConfig(thresholds=THRESHOLD))
    strong = hidden(case, tower, inputs)
    for number, alone in enumerate(case.split(inputs)):
        assert_close(hidden(case, tower, alone)[0], strong[number], 1e-4)
    with torch.no_grad():
        for key, parameter in tower.named_parameters():
            if ".sfa_" in key:
                parameter.zero_()
    zero = hidden(case, tower, inputs)
    eject_sfa(tower)
    for one, other in zip(zero, hidden(case, tower, inputs), strict=True):
        assert_close(one, other, 1e-4)
    assert max((one - other).abs().max() for one, other in zip(strong, zero, strict=True)) > 1e-2


def test_prefix_tokens_never_merge() -> None:
    tower, inputs = TOWERS["timm_reg4"].fresh()
    inject_dymu(tower, DyMUConfig(thresholds=-1.0))  # whatever can merge does
    hidden(TOWERS["timm_reg4"], tower, inputs)
    tokens = dymu_state(tower).tokens
    assert tokens is not None
    assert tokens.merged is not None
    assert tokens.token_lengths == (5 + 6, 5 + 6)  # 24 patches, 12, 6
    assert torch.equal(tokens.log_size[:5], torch.zeros(5))
    assert tokens.merged.size.sum() == 48


@pytest.mark.parametrize("first", ["adat", "dymu"])
def test_adaptive_tokens_merge_too(first: str) -> None:
    tower, inputs = TOWERS["siglip"].fresh()
    inputs["pixel_values"] = inputs["pixel_values"].clamp(-1, 1)
    policy = PatchPolicy(levels=((0.5, 14), (0.0, 28)), scorer=lambda images: torch.eye(2).expand(len(images), 2, 2))
    before = Snapshot(tower)
    steps = [lambda: inject_adat(tower, policy), lambda: inject_dymu(tower, DyMUConfig(thresholds=0.0))]
    for step in steps if first == "adat" else steps[::-1]:
        step()
    inject_sfa(tower, strong_config())
    case = TOWERS["siglip"]
    together = hidden(case, tower, inputs)
    counts = token_counts(tower)
    assert counts.before == (10, 10)
    assert max(counts.after) < 10
    for number, alone in enumerate(case.split(inputs)):
        assert_close(hidden(case, tower, alone)[0], together[number], 1e-4)
    for eject in (eject_sfa, eject_dymu, eject_adat):
        eject(tower)
    before.assert_unchanged(tower)


def test_attention_is_observed_image_by_image_with_sizes() -> None:
    case = TOWERS["siglip"]
    tower, inputs = case.fresh()
    inject_dymu(tower, DyMUConfig(thresholds=-1.0))
    reader = RowEntropy()
    with observe(tower, reader), torch.no_grad():
        tower(**inputs)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in reader.results.values()]
    assert shapes == [[(2, 4, 16)], [(1, 4, 8)] * 2, [(1, 4, 4)] * 2]


# -- hosts ------------------------------------------------------------------------------------------------------------


@every_host
def test_groups_that_become_one_token_merge_whole(name: str) -> None:
    host = BY_NAME[name]
    model = inject_dymu(host.build(), DyMUConfig(thresholds=THRESHOLD))
    logits_of(model, host.inputs())
    tokens = dymu_state(model).tokens
    assert tokens is not None
    assert tokens.unit == (4 if name in ("internvl", "qwen2_5_vl") else 1)
    assert all(after % tokens.unit == 0 for after in token_counts(model).after)


@every_host
def test_a_host_is_untouched_where_nothing_merges(name: str) -> None:
    host = BY_NAME[name]
    model, inputs = host.build(), host.inputs()
    plain = logits_of(model, inputs)
    before = Snapshot(model)
    for language in ("logical_rope", "vtu", "off"):
        inject_dymu(model, DyMUConfig(thresholds=1.0, language=language))
        assert torch.equal(logits_of(model, inputs), plain)
        eject_dymu(model)
        before.assert_unchanged(model)


def test_a_copy_of_a_model_has_its_own_state() -> None:
    host = BY_NAME["llava_onevision"]
    model = inject_dymu(host.build(), DyMUConfig(thresholds=THRESHOLD))
    wanted = logits_of(model, host.inputs())
    twin = copy.deepcopy(model)
    eject_dymu(model)
    assert torch.equal(logits_of(twin, host.inputs()), wanted)
    assert not torch.equal(logits_of(model, host.inputs()), wanted)


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_hosts_that_are_not_understood_are_named_and_left_alone(name: str) -> None:
    model = {host.name: host for host in HOSTS}[name].build()
    before = Snapshot(model)
    with pytest.raises(
        InjectionError, match=r"language='off'|masks or attention of its own|masks that are made before"
    ):
        inject_dymu(model)
    before.assert_unchanged(model)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_padded_tiles_are_refused_where_tokens_are_exchanged(name: str, adaptive: bool) -> None:
    """They come with a mask; tiles that fill their picture have none."""
    host = {host.name: host for host in HOSTS}[name]
    model = inject_adat(host.build()) if adaptive else inject_dymu(host.build(), DyMUConfig(thresholds=-1.0))
    with pytest.raises(InjectionError, match="mask of its own"):
        logits_of(model, host.inputs())


def test_groups_of_4x4_patches_merge_whole() -> None:
    """SmolVLM makes one image token of 16 patches: merged ones are equal, and the prompt loses all but one."""
    from sfa_adapters.recipes.nano.hosts import build_host

    model = build_host("smolvlm")[0]
    inject_dymu(model, DyMUConfig(thresholds=-1.0))
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(torch.rand(1, 2, 3, 112, 112)).pooler_output))
    counts = token_counts(model)
    assert counts.before == (64, 64)
    assert set(counts.after) == {16}
    assert torch.allclose(features.view(2, 4, -1), features.view(2, 4, -1)[:, :1], atol=1e-6)


def test_losses_and_gradients_have_their_usual_shape() -> None:
    host = BY_NAME["internvl"]
    model = inject_dymu(host.build(), DyMUConfig(thresholds=THRESHOLD)).train()
    loss = lm_loss(model, host.inputs())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"thresholds": 1.5}, {"thresholds": (0.5, float("nan"))}, {"thresholds": True}, {"language": "rope"}, {"side": 3}],
)
def test_options_that_cannot_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        DyMUConfig(**options)


def test_injecting_wrongly_names_the_reason_and_changes_nothing() -> None:
    tower, _ = TOWERS["clip"].fresh()
    before = Snapshot(tower)
    for error, config in [
        (InjectionError, DyMUConfig(thresholds=(0.5, 0.5, 0.5))),
        (AdapterMismatchError, DyMUConfig(tower={"backbone": "siglip", "num_layers": 3, "places": 2})),
    ]:
        with pytest.raises(error):
            inject_dymu(tower, config)
        before.assert_unchanged(tower)
    with pytest.raises(InjectionError, match="merges no tokens"):
        eject_dymu(tower)
    inject_dymu(tower)
    with pytest.raises(InjectionError, match="already"):
        inject_dymu(tower)
    with pytest.raises(InjectionError, match="has not seen an image"):
        token_counts(tower)
    host = BY_NAME["internvl"].build()
    with pytest.raises(InjectionError, match="2x2"):
        inject_dymu(host, DyMUConfig(side=1))
    with pytest.raises(InjectionError, match="cannot merge"):
        inject_dymu(TOWERS["internvit_remote"].build())


def test_sizes_that_an_attention_drops_are_an_error() -> None:
    case = TOWERS["qwen2_5"]
    tower, inputs = case.fresh()
    inject_dymu(tower, DyMUConfig(thresholds=THRESHOLD))
    set_eager(case, tower)
    with pytest.raises(BiasNotAppliedError, match="dropped the sizes"):
        hidden(case, tower, inputs)


def test_checkpointing_is_refused() -> None:
    case = TOWERS["siglip"]
    tower, inputs = case.fresh()
    inject_dymu(tower, DyMUConfig(thresholds=THRESHOLD))
    set_checkpointing(case, tower, reentrant=False)
    tower.train()
    with pytest.raises(InjectionError, match="checkpointing"):
        tower(**inputs)


def test_a_grid_without_whole_groups_is_refused() -> None:
    tower, _ = TOWERS["timm_cls"].fresh()
    inject_dymu(tower, DyMUConfig(thresholds=0.0, side=2))
    with pytest.raises(LayoutError, match="no whole 2x2 groups"):
        tower(torch.randn(1, 3, 80, 48))


# -- calibration ------------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_largest_that_merges_so_many() -> None:
    score = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for merges in (1, 7, 50):
        threshold = threshold_of(score, merges)
        assert int((score > threshold).sum()) == merges
        assert int((score > torch.nextafter(torch.tensor(threshold), torch.tensor(2.0))).sum()) < merges
    assert threshold_of(score, 0) == 1.0
    assert threshold_of(score, 51) == 0.0
    assert threshold_of(torch.tensor([-0.5, -0.7]), 1) == 0.0


@pytest.mark.parametrize("name", ["siglip", "internvit", "qwen2_5"])
def test_calibrated_thresholds_leave_the_share_that_was_asked_for(name: str) -> None:
    case = TOWERS[name]
    tower, inputs = case.fresh()
    batch: Any = inputs["pixel_values"] if name != "qwen2_5" else {
        "pixel_values": inputs["hidden_states"], "image_grid_thw": inputs["grid_thw"],
    }  # fmt: skip
    before = Snapshot(tower)
    config = calibrate_dymu(tower, [batch], keep=0.75)
    before.assert_unchanged(tower)
    inject_dymu(tower, config)
    hidden(case, tower, inputs)
    counts = token_counts(tower)
    unit = 4 if name == "qwen2_5" else 1
    assert abs(sum(counts.after) - 0.75 * sum(counts.before)) <= 2 * unit  # rounded at two places


def test_thresholds_are_means_over_batches_each_on_merged_tokens() -> None:
    case = TOWERS["siglip"]
    tower, _ = case.fresh()
    batches = [case.inputs(seed)["pixel_values"] for seed in range(3)]
    single: list[Any] = [calibrate_dymu(tower, [batch], merges=2.0).thresholds for batch in batches]
    thresholds: Any = calibrate_dymu(tower, batches, merges=2.0).thresholds
    for place in range(2):
        assert thresholds[place] == pytest.approx(sum(values[place] for values in single) / 3)
    inject_dymu(tower, DyMUConfig(thresholds=single[0]))
    with torch.no_grad():
        tower(batches[0])
    assert token_counts(tower).layers == (32, 28, 24)  # two merges per image at each place


def test_calibrating_on_nothing_or_for_nothing_is_an_error() -> None:
    tower, _ = TOWERS["siglip"].fresh()
    images = torch.zeros(1, 3, 56, 56)
    for error, batches, options in [
        (DataError, [], {}), (DataError, [{"input_ids": torch.zeros(1)}], {}), (RecipeError, [images], {"keep": 0.0}),
        (RecipeError, [images], {"merges": (1.0,)}), (RecipeError, [images], {"merges": -1.0}),
    ]:  # fmt: skip
        with pytest.raises(error):
            calibrate_dymu(tower, batches, **options)
    assert not features_of(tower)


def test_thresholds_survive_a_folder_beside_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    tower, _ = TOWERS["siglip"].fresh()
    config = calibrate_dymu(tower, [TOWERS["siglip"].inputs(0)["pixel_values"]], config=DyMUConfig(language="vtu"))
    for saved in (config, DyMUConfig(thresholds=0.875)):
        assert load_dymu(save_dymu(saved, tmp_path)) == saved
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"x"
    inject_dymu(tower, load_dymu(save_dymu(config, tmp_path)))
    (tmp_path / "dymu_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_dymu(tmp_path)
    (tmp_path / "dymu.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no dymu\.safetensors"):
        load_dymu(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SFAError, match="cannot be written"):
        save_dymu(config, tmp_path / "file")


# -- sfa calibrate dymu -----------------------------------------------------------------------------------------------


def test_the_command_calibrates_the_nano_host_and_a_model_of_the_user(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    result = CliRunner().invoke(app, ["dymu", "--charts", "6", "--batch", "3", "--keep", "0.4", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "tokens per picture are left" in result.output
    config = load_dymu(out)
    assert config.tower == {"backbone": "siglip", "num_layers": 4, "places": 3}
    folder = tmp_path / "model"
    TOWERS["siglip"].build().save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    page = tmp_path / "page.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)).save(page)
    calibrated = run_calibrate_dymu(out, [page, page], str(folder), keep=0.5, language="vtu")
    assert load_dymu(out) == calibrated
    assert calibrated.language == "vtu"
    assert calibrated.tower is not None
    assert calibrated.tower["places"] == 2


@pytest.mark.parametrize(
    ("options", "error"),
    [({"model": "x"}, DataError), ({"images": ["a.png"]}, DataError), ({"batch": 0}, DataError),
     ({"language": "x"}, RecipeError), ({"images": ["nowhere.png"], "model": "x"}, DataError)],
)  # fmt: skip
def test_mistakes_of_the_command(options: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        run_calibrate_dymu(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sizes_run_in_the_flash_kernel() -> None:
    """Flash takes no mask, so with the others switched off only the channel can run; it agrees with the matrix."""
    query, key, value = torch.randn(3, 1, 16, 577, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    log_size = torch.randint(1, 9, (577,), device="cuda").float().log()
    wanted = sized_attention(query.float(), key.float(), value.float(), log_size, backend="dense")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = sized_attention(query, key, value, log_size)
        packed = SizedPackedMask((300, 277), log_size).attend(query, key, value, None, 0.0)
    assert_close(output.float(), wanted, 2e-2)
    first = sized_attention(query[:, :, :300], key[:, :, :300], value[:, :, :300], log_size[:300])
    assert_close(packed[:, :, :300].float(), first.float(), 2e-2)
