"""`attention_entropy` by region: equal to dense maps, averaged per image first, resampled in pairs, no silent gaps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from torch import Tensor

from sfa_adapters import inject_sfa
from sfa_adapters.adat import PatchPolicy, inject_adat
from sfa_adapters.analysis.entropy import attention_entropy
from sfa_adapters.analysis.entropy_report import EntropyReport, compare_entropy, entropy_change
from sfa_adapters.analysis.report import Skips
from sfa_adapters.errors import DataError, ObservationError
from sfa_adapters.recipes.nano.models import build_nano
from tests.support.compare import Snapshot, strong_config
from tests.support.hosts import HOSTS
from tests.support.towers import CASES, Inputs, TowerCase, set_eager

BY_NAME = {case.name: case for case in CASES}
HOST = {host.name: host for host in HOSTS}
read_towers = pytest.mark.parametrize(
    "case", [BY_NAME[n] for n in ("clip", "siglip", "internvit", "timm_reg4", "idefics3")], ids=str
)


def dense_maps(case: TowerCase, tower: Any, inputs: Inputs) -> list[Tensor]:
    """Whole attention maps of every layer, `[B, H, N, N]`, as the eager implementation computes them."""
    set_eager(case, tower)
    with torch.no_grad():
        if case.library != "timm":
            return list(tower(**inputs, output_attentions=True).attentions)
        maps: list[Tensor] = []
        hooks = [b.attn.attn_drop.register_forward_hook(lambda _, args, out: maps.append(out)) for b in tower.blocks]
        tower(inputs["pixel_values"])
        for hook in hooks:
            hook.remove()
    return maps


def given_inputs(case: TowerCase, inputs: Inputs) -> Any:
    return inputs["pixel_values"] if case.library == "timm" else inputs


def random_regions(case: TowerCase, seed: int = 0) -> Tensor:
    assert case.grid is not None
    grid = (5, 4) if case.name == "idefics3" else case.grid
    return torch.rand(2, *grid, generator=torch.Generator().manual_seed(seed)) > 0.6


@read_towers
@pytest.mark.parametrize("keys", ["all", "patches"])
def test_it_equals_the_entropy_of_dense_maps(case: TowerCase, keys: Any) -> None:
    tower, inputs = case.fresh()
    regions = random_regions(case)
    report = attention_entropy(tower, [given_inputs(case, inputs)], regions, keys=keys)
    real = inputs.get("patch_attention_mask", torch.ones_like(regions))
    for layer, whole in enumerate(dense_maps(case, tower, inputs)):
        share = whole.double()[:, :, case.prefix :]
        if keys == "patches":
            share = share[..., case.prefix :] / share[..., case.prefix :].sum(-1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-300).log()).sum(-1)
        for image in range(2):
            limit = np.log(int(real[image].sum()) + (case.prefix if keys == "all" else 0))
            for region, chosen in enumerate((regions[image] & real[image], ~regions[image] & real[image])):
                wanted = entropy[image][:, chosen.flatten()].mean(-1).numpy()
                np.testing.assert_allclose(report.nats[image, region, layer], wanted, atol=1e-5)
                np.testing.assert_allclose(report.relative[image, region, layer], wanted / limit, atol=1e-5)
                assert report.patches[image, region] == int(chosen.sum())


def test_batches_images_alone_and_whole_models_tell_the_same() -> None:
    host = HOST["llava_onevision"]
    model, inputs = host.build(), host.inputs()
    regions = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5  # two images of two tiles
    whole = attention_entropy(model, [inputs], regions)
    alone = attention_entropy(model, inputs["pixel_values"], regions)
    single = attention_entropy(
        model, ({"pixel_values": p[None]} for p in inputs["pixel_values"].flatten(0, 1)), regions
    )
    for other in (alone, single):
        np.testing.assert_allclose(other.nats, whole.nats, atol=1e-5)
        assert other.images == whole.images == (0, 1, 2, 3)
    assert whole.layers[0].startswith("model.vision_tower.")


def pages() -> Tensor:
    """Three pages in -1..1: white on the left, white below, and black."""
    images = -torch.ones(3, 3, 56, 56)
    images[0, :, :, :28] = 1
    images[1, :, 28:] = 1
    return images


def bright(images: Tensor) -> Tensor:
    return images.mean(1)


def test_images_are_scored_as_they_were_before_normalisation() -> None:
    tower, _ = BY_NAME["siglip"].fresh()
    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True
    below = left.T.flip(0)
    wanted = attention_entropy(tower, [pages()[:2]], [left, below])
    # 0.9 of white and 0.1 of black only where mean and deviation are undone.
    report = attention_entropy(tower, [pages()[:2]], scorer=bright, threshold=(0.1, 0.9))
    np.testing.assert_array_equal(report.nats, wanted.nats)
    assert report.options()["regions"] == "bright"
    shifted = attention_entropy(
        tower, [pages()[:2]], scorer=bright, image_mean=(0.6,) * 3, image_std=(0.4,) * 3, threshold=0.5
    )
    np.testing.assert_array_equal(shifted.nats, wanted.nats)
    with pytest.raises(DataError, match=r"reach from -0\.5 to 1\.5"):
        attention_entropy(tower, [pages()], scorer=bright, image_mean=(0.5,) * 3, image_std=(1.0,) * 3)


def test_between_two_thresholds_nothing_counts() -> None:
    tower, _ = BY_NAME["siglip"].fresh()
    density = torch.tensor([0.1, 0.4, 0.6, 0.9])[None, None, :].expand(3, 4, 4)
    report = attention_entropy(tower, [pages()], scorer=lambda images: density, threshold=(0.4, 0.6))
    np.testing.assert_array_equal(report.patches, [[4, 8]] * 3)
    again = attention_entropy(tower, [pages()], torch.tensor([0, 0, -1, 1]).expand(3, 4, 4))
    np.testing.assert_array_equal(report.nats, again.nats)


def test_images_of_one_region_are_skipped_and_counted() -> None:
    tower, _ = BY_NAME["siglip"].fresh()
    all_dense = torch.ones(4, 4, dtype=torch.bool)
    half = torch.arange(16).view(4, 4) % 2 == 0
    report = attention_entropy(tower, pages().split(2), [~all_dense, half, all_dense])
    assert report.images == (1,)
    assert report.skipped.counts() == {"no dense patch": 1, "no sparse patch": 1}
    assert [(s.sample, s.reason) for s in report.skipped] == [(0, "no dense patch"), (2, "no sparse patch")]
    assert report.table()[0]["images"] == 1
    with pytest.raises(DataError, match=r"None of the 3 images .*no sparse patch \(2\); no dense patch \(1\)"):
        attention_entropy(tower, [pages()], [all_dense, all_dense, ~all_dense])


def test_layers_that_the_host_does_not_read_are_left_out() -> None:
    host = HOST["llava"]
    regions = torch.arange(16).view(1, 4, 4).expand(2, 4, 4) % 2 == 0
    model = host.build()
    assert len(attention_entropy(model, [host.inputs()], regions).layers) == host.layers == 2
    last = attention_entropy(model, [host.inputs()], regions, modules="*vision*layers.2.self_attn")
    assert len(last.layers) == 1


def report_of(nats: np.ndarray, normalize: bool = False) -> EntropyReport:
    images, _, layers, _ = nats.shape
    names, numbers = tuple(f"layer{n}" for n in range(layers)), tuple(range(images))
    how = {"regions": "given", "keys": "all"}
    return EntropyReport(
        names, nats, nats / 5, np.ones((images, 2), dtype=int), numbers, Skips(), normalize, seed=0, how=how
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.floats(0.3, 3), st.integers(0, 99))
def test_dense_and_sparse_of_an_image_are_drawn_together(images: int, ratio: float, seed: int) -> None:
    sparse = np.random.default_rng(seed).uniform(0.5, 5, (images, 2, 3))
    report = report_of(np.stack((ratio * sparse, sparse), 1))
    for layer in (None, 0, 1):
        interval = report.ratio(layer)
        # However much images differ, the ratio is the same in every draw.
        np.testing.assert_allclose([interval.value, interval.low, interval.high], ratio, rtol=1e-9)
    assert report.difference().low <= report.difference().value <= report.difference().high


def test_every_image_counts_once_and_layers_heads_and_all_are_means() -> None:
    nats = np.random.default_rng(0).uniform(1, 5, (6, 2, 3, 4))
    rows = report_of(nats).table()
    assert len(rows) == 1 + 3 + 12
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["dense_nats"] == pytest.approx(nats[:, 0].mean())
    assert rows[0]["ratio"] == pytest.approx(nats[:, 0].mean() / nats[:, 1].mean())
    assert rows[2]["layer"] == 1
    assert rows[2]["sparse_relative"] == pytest.approx(nats[:, 1, 1].mean() / 5)
    assert (rows[-1]["layer"], rows[-1]["head"]) == (2, 3)
    assert rows[-1]["difference"] == pytest.approx((nats[:, 0, 2, 3] - nats[:, 1, 2, 3]).mean())
    assert rows[0]["unit"] == "nats"
    relative = report_of(nats, normalize=True).table()[0]
    assert relative["difference"] == pytest.approx(rows[0]["difference"] / 5)
    assert relative["unit"] == "H / log n"


def test_a_change_is_drawn_in_pairs_of_images() -> None:
    nats = np.random.default_rng(0).uniform(1, 5, (6, 2, 3, 4))
    rows = entropy_change(report_of(nats), report_of(nats + 0.25))
    assert [row["layer"] for row in rows] == ["all", 0, 1, 2]
    for row in rows:
        np.testing.assert_allclose([row["dense"], row["dense_low"], row["sparse_high"]], 0.25, atol=1e-9)
    assert rows[0]["ratio"] == pytest.approx(
        (nats[:, 0].mean() + 0.25) / (nats[:, 1].mean() + 0.25) - nats[:, 0].mean() / nats[:, 1].mean()
    )
    with pytest.raises(DataError, match="same images"):
        entropy_change(report_of(nats), report_of(nats[1:]))


def texts(figure: Any) -> list[Text]:
    figure.canvas.draw()
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def test_exports_and_figures(tmp_path: Path) -> None:
    nats = np.random.default_rng(0).uniform(1, 5, (6, 2, 9, 4))
    report = report_of(nats)
    exported = json.loads(report.to_json())
    assert exported["table"] == json.loads(json.dumps(report.table()))
    assert exported["options"]["dense_share_of_patches"] == 0.5
    with report.to_csv(tmp_path / "entropy.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(report.table())
    assert float(read[0]["ratio"]) == report.table()[0]["ratio"]
    figures = [report.figure(), compare_entropy({"before": report, "after": report_of(nats * 1.1)})]
    for figure in figures:
        labels = texts(figure)
        assert min(float(t.get_fontsize()) for t in labels) >= 15
        words = {t.get_text() for t in labels}
        assert {"layer", "entropy, nats", "dense text", "sparse"} <= words
    assert {"before", "after", "ratio before", "ratio after"} <= {t.get_text() for t in texts(figures[1])}
    with pytest.raises(DataError, match="at least one report"):
        compare_entropy({})
    with pytest.raises(DataError, match="all in nats"):
        compare_entropy({"a": report, "b": report_of(nats, normalize=True)})


def test_the_model_is_left_as_it_was_and_structure_is_seen() -> None:
    tower, inputs = BY_NAME["clip"].fresh()
    tower.train()
    tower.encoder.layers[1].eval()  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    before = Snapshot(tower)
    regions = random_regions(BY_NAME["clip"])
    plain = attention_entropy(tower, [inputs], regions)
    before.assert_unchanged(tower)
    adapted = attention_entropy(inject_sfa(tower, strong_config()), [inputs], regions)
    assert np.abs(adapted.nats - plain.nats).max() > 0.01


def test_a_nano_host_and_the_density_estimator() -> None:
    host = build_nano("internvl")
    image = torch.ones(1, 3, 144, 144)
    image[:, :, 40:80, 20:120] = torch.randint(0, 2, (40, 100)).float()
    normalised = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    report = attention_entropy(host.model, [normalised])
    assert report.options()["regions"] == "density"
    assert report.patches.sum() == 144
    assert 0 < report.patches[0, 0] < 144


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("modules", {"modules": "*text*"}, "fits no attention module"),
    ("keys", {"keys": "cls"}, "keys='cls'"),
    ("threshold", {"regions": None, "threshold": (0.6, 0.2)}, "the lower one comes first"),
    ("shape", {"regions": torch.zeros(2, 3, 4, dtype=torch.bool)}, r"\(4, 4\) truth values"),
    ("float", {"regions": torch.zeros(2, 4, 4)}, "truth values"),
    ("few", {"regions": torch.zeros(1, 4, 4, dtype=torch.bool)}, "There are 1 region maps, but more images"),
    ("many", {"regions": torch.zeros(3, 4, 4, dtype=torch.bool)}, "more region maps than images: the tower saw 2"),
    ("statistics", {"regions": None, "image_std": (0.0, 1.0, 1.0)}, "deviations above 0"),
]


@pytest.mark.parametrize(("options", "message"), [(o, m) for _, o, m in BAD], ids=[n for n, _, _ in BAD])
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    tower, inputs = BY_NAME["siglip"].fresh()
    options = {"regions": random_regions(BY_NAME["siglip"]), **options}
    with pytest.raises((DataError, ObservationError), match=message):
        attention_entropy(tower, [inputs], **options)


def test_towers_and_inputs_that_cannot_be_read_are_named() -> None:
    windows, patches = BY_NAME["qwen2_5"].fresh()
    with pytest.raises(ObservationError, match="no fixed"):
        attention_entropy(windows, [patches], [])
    tower, inputs = BY_NAME["siglip"].fresh()
    with pytest.raises(DataError, match="floating point"):
        attention_entropy(tower, [inputs["pixel_values"].long()], random_regions(BY_NAME["siglip"]))
    with pytest.raises(DataError, match="no images among the inputs"):
        attention_entropy(HOST["llava"].build(), [{"input_ids": torch.ones(1, 4).long()}], [])
    nan = inputs["pixel_values"].clone()
    nan[0, 0, 0, 0] = float("nan")
    with pytest.raises(ObservationError, match="NaN"):
        attention_entropy(tower, [nan], random_regions(BY_NAME["siglip"]))
    with pytest.raises(DataError, match="image_mean=None"):
        attention_entropy(BY_NAME["internvit_remote"].build(), [])
    adaptive = inject_adat(tower, PatchPolicy(levels=[(0.0, 28)], scorer="uniform", cell=28))
    with pytest.raises(ObservationError, match="not its own grid of patches"):
        attention_entropy(adaptive, [inputs], random_regions(BY_NAME["siglip"]))
