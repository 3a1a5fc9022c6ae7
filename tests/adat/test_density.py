"""The density estimator: its shape, its shipped weights, and what they find."""

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from sfa_adapters.adat import DensityEstimator, density
from sfa_adapters.adat.labels import box_density
from sfa_adapters.errors import DataError, WeightsError
from sfa_adapters.recipes.synthetic.pages import SIZE, render_page, text_page

TEXT = 0.3


@pytest.fixture(scope="module")
def estimator():
    return DensityEstimator.pretrained()


def _see(estimator, *images):
    with torch.inference_mode():
        return estimator(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255).numpy()


def test_parameters_and_shape():
    model = DensityEstimator()
    assert sum(p.numel() for p in model.parameters()) == 186_177
    assert model.eval()(torch.rand(2, 3, 448, 448)).shape == (2, 28, 28)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (1, 1), (17, 40), (100, 33), (448, 336)])
def test_any_size_is_padded_to_whole_cells_with_its_border(estimator, height, width):
    images = torch.rand(2, 3, height, width)
    assert estimator(images).shape == (2, -(-height // 16), -(-width // 16))
    look = estimator.logits(images)
    pad = (0, -width % 16, 0, -height % 16)
    torch.testing.assert_close(look, estimator.logits(torch.nn.functional.pad(images, pad, mode="replicate")))
    assert bool(((estimator(images) >= 0) & (estimator(images) <= 1)).all())


def test_some_hundredths_are_nothing(estimator, monkeypatch):
    look = torch.tensor([[[0.0, 0.01, 0.03, 0.031, 0.515, 1.0]]])
    monkeypatch.setattr(estimator, "logits", lambda images: look.logit())
    expected = torch.tensor([0.0, 0.0, 0.0, 0.001 / 0.97, 0.5, 1.0])
    torch.testing.assert_close(estimator(torch.rand(1, 3, 16, 96))[0, 0], expected)


def test_a_large_page_is_looked_at_in_bounded_size(estimator, monkeypatch):
    seen = []
    logits = estimator.logits
    monkeypatch.setattr(estimator, "logits", lambda images: seen.append(images.shape) or logits(images))
    assert estimator(torch.rand(1, 3, 3000, 2200)).shape == (1, 188, 138)
    assert [shape[2] * shape[3] for shape in seen] == [pytest.approx(density.MOST_PIXELS, rel=0.01)]


def test_print_is_found_however_large_its_page_is(estimator):
    page = text_page(8, 1).image
    large = cv2.resize(page, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC)
    small, big = _see(estimator, page)[0], _see(estimator, large)[0]
    big = cv2.resize(big, small.shape[::-1], interpolation=cv2.INTER_AREA)
    assert np.corrcoef(small.ravel(), big.ravel())[0, 1] > 0.9


def test_a_batch_is_its_images(estimator):
    images = torch.rand(3, 3, 64, 96)
    single = torch.cat([estimator(image[None]) for image in images])
    torch.testing.assert_close(estimator(images), single, atol=1e-5, rtol=1e-4)


def test_pretrained_is_for_inference(estimator):
    assert not estimator.training
    assert not any(p.requires_grad for p in estimator.parameters())


def test_the_fused_estimator_is_the_same_function(estimator):
    images = torch.from_numpy(render_page("mixed", 1).image).permute(2, 0, 1)[None].float() / 255
    fused = estimator.fused()
    torch.testing.assert_close(fused(images), estimator(images), atol=1e-4, rtol=1e-3)
    assert sum(p.numel() for p in estimator.parameters()) == 186_177


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32), (1, 32, 32, 3)])
def test_what_is_no_batch_of_pictures_is_named(estimator, shape):
    with pytest.raises(DataError, match="batch, 3, height, width"):
        estimator(torch.zeros(shape))


def test_bytes_are_no_batch_of_pictures(estimator):
    with pytest.raises(DataError, match="batch, 3, height, width"):
        estimator(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# -- what the shipped weights find ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 128, 255])
def test_blank_pages_are_blank(estimator, value):
    assert _see(estimator, np.full((SIZE, SIZE, 3), value, np.uint8)).mean() < 0.02


def test_blank_scans_are_blank(estimator):
    densities = _see(estimator, *(render_page("blank", seed, "test").image for seed in range(8)))
    assert densities.mean(axis=(1, 2)).max() < 0.02


@pytest.mark.parametrize("sigma", [3, 10, 30])
def test_noise_is_not_text(estimator, sigma):
    rng = np.random.default_rng(sigma)
    noisy = np.clip(225 + rng.normal(0, sigma, (SIZE, SIZE, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    assert _see(estimator, noisy).mean() < 0.02


def test_photographs_are_not_text(estimator):
    photos = [cv2.resize(getattr(skimage.data, name)(), (SIZE, SIZE)) for name in ("chelsea", "coffee", "rocket")]
    assert (_see(estimator, *photos) > TEXT).mean() < 0.05


def test_grids_and_hatching_are_not_text(estimator):
    densities = _see(estimator, *(render_page("lines", seed, "test").image for seed in range(12)))
    assert (densities > TEXT).mean() < 0.03


@pytest.mark.parametrize("x_height", [6, 8, 12, 20])
def test_text_is_found_down_to_six_pixels(estimator, x_height):
    pages = [text_page(x_height, seed) for seed in range(3)]
    for page, page_density in zip(pages, _see(estimator, *(p.image for p in pages)), strict=True):
        centre = ((page.boxes[:, :2] + page.boxes[:, 2:]) / 32).astype(int).clip(0, 27)
        assert (page_density[centre[:, 1], centre[:, 0]] > TEXT).mean() > 0.95


@pytest.mark.parametrize("kind", ["text", "table", "chart", "mixed"])
def test_densities_agree_with_the_printed_boxes(estimator, kind):
    pages = [render_page(kind, seed, "test") for seed in range(6)]
    true = np.stack([box_density(p.boxes, (SIZE, SIZE)) for p in pages])
    assert np.corrcoef(_see(estimator, *(p.image for p in pages)).ravel(), true.ravel())[0, 1] > 0.85


# -- weight files -----------------------------------------------------------------------------------------------------


SHIPPED = {name: density.FOLDER / f"density_{name}.safetensors" for name in density.SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_small_and_load_by_name(name):
    assert SHIPPED[name].stat().st_size < 1_000_000
    first = DensityEstimator.pretrained(name).state_dict()
    again = DensityEstimator.pretrained(SHIPPED[name]).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_the_default_weights_are_the_first_shipped_ones():
    default, first = (DensityEstimator.pretrained(name).head.weight for name in (None, next(iter(SHIPPED))))
    assert torch.equal(default, first)


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"sfa density train"):
        DensityEstimator.pretrained(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match=r"one of real, rendered"):
        DensityEstimator.pretrained("rendred")
    monkeypatch.setattr(density, "FOLDER", tmp_path)
    with pytest.raises(WeightsError, match=r"density_real\.safetensors"):
        DensityEstimator.pretrained()


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    raw = bytearray(SHIPPED["rendered"].read_bytes())
    raw[-1] ^= 1
    (tmp_path / "density_rendered.safetensors").write_bytes(raw)
    monkeypatch.setattr(density, "FOLDER", tmp_path)
    with pytest.raises(WeightsError, match="sha256"):
        DensityEstimator.pretrained("rendered")
    (tmp_path / "b.safetensors").write_bytes(raw[:1000])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        DensityEstimator.pretrained(tmp_path / "b.safetensors")


def test_weights_of_another_model_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="does not fit"):
        DensityEstimator.pretrained(tmp_path / "a.safetensors")
