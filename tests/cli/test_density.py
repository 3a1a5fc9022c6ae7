"""`sfa density`: training that can be interrupted, maps beside their pages, one line for each mistake."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfa_adapters.adat.density import DensityEstimator
from sfa_adapters.cli.main import main
from sfa_adapters.errors import WeightsError
from sfa_adapters.recipes.density import labelled_pages
from sfa_adapters.recipes.density import train as train_density
from sfa_adapters.recipes.density.train import TrainConfig
from sfa_adapters.recipes.synthetic.pages import text_page
from tests.test_images import png, png_header


def _run(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(["density", *map(str, arguments)])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def _mistake(capsys, *arguments):
    code, _, err = _run(capsys, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    return err


@pytest.fixture
def folder(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for seed in range(5):
        Image.fromarray(text_page(6 + seed, seed).image[: 300 + seed]).save(scans / f"{seed}.png")
    return scans


@pytest.mark.parametrize("command", [(), ("train",), ("map",)])
def test_help_has_an_example(capsys, command):
    code, out, _ = _run(capsys, *command, "--help")
    assert code == 0
    assert "Example:  sfa density" in out


def test_train_on_a_folder_then_map_with_the_weights(capsys, folder, tmp_path):
    run = tmp_path / "run"
    code, out, _ = _run(capsys, "train", folder, "--out", run, "--steps", 3, "--batch", 2, "--every", 2)
    assert code == 0
    assert str(run / "best.safetensors") in out.replace("\n", "")
    history = json.loads((run / "progress.json").read_text())["history"]
    assert [step for step, _ in history] == [2, 3]
    DensityEstimator.pretrained(run / "best.safetensors")
    code, out, _ = _run(capsys, "map", folder / "0.png", "--weights", run / "best.safetensors", "--size", 224)
    assert code == 0
    with Image.open(folder / "0_density.png") as figure:
        assert figure.width > 1000


def test_a_run_that_was_cut_off_ends_with_the_same_weights(folder, tmp_path, monkeypatch):
    options = {"images": (folder,), "labels": "edges", "steps": 5, "batch": 2, "every": 2}
    whole = train_density.train_density(TrainConfig(out=tmp_path / "whole", **options))
    batch, killed = train_density._batch, []

    def cut(pages, config, step):
        if step == 3 and not killed:
            killed.append(step)
            raise KeyboardInterrupt
        return batch(pages, config, step)

    monkeypatch.setattr(train_density, "_batch", cut)
    parts = TrainConfig(out=tmp_path / "parts", **options)
    with pytest.raises(KeyboardInterrupt):
        train_density.train_density(parts)
    assert json.loads((parts.out / "progress.json").read_text())["step"] == 2
    resumed = train_density.train_density(parts)
    assert resumed.history == whole.history
    for name in ("best.safetensors", "step-000005/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    with pytest.raises(WeightsError, match="batch"):
        train_density.train_density(TrainConfig(out=parts.out, **{**options, "batch": 3}))


def test_rendered_pages_and_their_labels(tmp_path):
    pages = labelled_pages.rendered(tmp_path / "pages", "train", 4)
    stamp = (tmp_path / "pages" / "images.npy").stat().st_mtime_ns
    edges, mix = (labelled_pages.rendered(tmp_path / "pages", "train", 4, labels) for labels in ("edges", "mix"))
    assert (tmp_path / "pages" / "images.npy").stat().st_mtime_ns == stamp  # not drawn again
    assert pages.images.shape == (4, 448, 448, 3)
    assert pages.labels.shape == (4, 28, 28)
    assert pages.labels.max() > 0.9
    np.testing.assert_allclose(mix.labels, (pages.labels + edges.labels) / 2)


def test_batches_move_picture_and_label_together(monkeypatch):
    labels = np.random.default_rng(0).random((3, 28, 28), dtype=np.float32)
    images = np.round(labels * 255).astype(np.uint8).repeat(16, axis=1).repeat(16, axis=2)[..., None].repeat(3, axis=3)
    pages = labelled_pages.PageSet(images, labels)
    matched = 0
    for step in range(20):
        pictures, targets, _ = train_density._batch(pages, TrainConfig(batch=8), step)
        seen = torch.nn.functional.avg_pool2d(pictures, 16).mean(1).flatten(1)
        for picture, target in zip(seen, targets.flatten(1), strict=True):
            matched += abs(float(torch.corrcoef(torch.stack([picture, target]))[0, 1])) > 0.97
    assert matched > 150  # other light clips a few of the 160


def test_map_of_edges(capsys, folder, tmp_path):
    code, out, _ = _run(
        capsys, "map", folder / "1.png", folder / "2.png", "--source", "edges", "--out", tmp_path / "maps"
    )
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["1_density.png", "2_density.png"]
    assert "mean density" in out


def test_map_of_what_scanners_and_print_shops_save(capsys, tmp_path):
    """Each has the density of the same page in RGB."""
    picture = Image.fromarray(text_page(9, 0).image[:320]).convert("L")
    deep = np.asarray(picture).astype(np.uint16) * 257
    rows = [np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in deep]
    picture.convert("RGB").save(tmp_path / "rgb.png")
    picture.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.tif")
    picture.convert("1", dither=Image.Dither.NONE).save(tmp_path / "bits.png")
    Image.fromarray(deep).save(tmp_path / "gray16.png")
    (tmp_path / "colour16.png").write_bytes(png(rows, 16, 2))
    picture.convert("P").save(tmp_path / "palette.png", transparency=255)  # its white
    pages = sorted(tmp_path.iterdir())
    code, out, _ = _run(capsys, "map", *pages, "--source", "edges", "--out", tmp_path / "maps")
    assert code == 0
    densities = [float(line.split("mean density ")[1].split(",")[0]) for line in out.splitlines()]
    assert len(densities) == 6
    assert min(densities) > 0.1
    assert max(densities) - min(densities) < 0.02


def test_a_document_and_a_scan_that_is_too_large_are_one_line(capsys, tmp_path):
    for name, raw in (("report.pdf", b"%PDF-1.7\n" + bytes(2000)), ("scan.png", png_header(20_000, 20_000))):
        (tmp_path / name).write_bytes(raw)
    assert "pdftoppm -r 150 -png FILE page" in _mistake(capsys, "map", tmp_path / "report.pdf")
    line = _mistake(capsys, "map", tmp_path / "scan.png")
    assert "scan.png" in line
    assert "50,000,000 pixels" in line


def test_mistakes_are_one_line(capsys, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (folder / "bad.png").write_bytes(b"no picture")
    assert "There is no folder" in _mistake(capsys, "train", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert "found 0 images" in _mistake(capsys, "train", tmp_path / "empty", "--out", tmp_path / "run")
    assert "bad.png" in _mistake(capsys, "train", folder, "--out", tmp_path / "run")
    assert "--steps 0" in _mistake(capsys, "train", "--steps", 0)
    assert "--labels" in _mistake(capsys, "train", "--labels", "lines")
    assert "needs rendered pages" in _mistake(capsys, "train", folder, "--labels", "boxes")
    assert "bad.png" in _mistake(capsys, "map", folder / "0.png", folder / "bad.png")
    assert not (folder / "0_density.png").exists()
    assert "nothing.png" in _mistake(capsys, "map", tmp_path / "nothing.png")
    assert "--source" in _mistake(capsys, "map", folder / "0.png", "--source", "magic")
    assert "--size 3" in _mistake(capsys, "map", folder / "0.png", "--size", 3)
    assert "Missing argument" in _mistake(capsys, "map")


def test_pages_that_differ_in_their_ending_only_get_pictures_of_their_own(capsys, folder, tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.fromarray(text_page(6, 0).image[:300]).save(folder / name)
    out = tmp_path / "maps"
    options = ("--source", "edges", "--out", out)
    code, _, _ = _run(capsys, "map", folder / "a.png", folder / "a.jpg", folder / "a.png", folder / "0.png", *options)
    assert code == 0
    names = ["0_density.png", "a_jpg_density.png", "a_png_density.png"]
    assert sorted(p.name for p in out.iterdir()) == names


def test_a_picture_that_would_overwrite_a_page_or_another_picture_is_refused(capsys, folder, tmp_path):
    (tmp_path / "other").mkdir()
    for name in (folder / "0_density.png", tmp_path / "other" / "0.png"):
        Image.fromarray(text_page(6, 0).image[:300]).save(name)
    before = (folder / "0_density.png").read_bytes()
    line = _mistake(capsys, "map", folder / "0.png", folder / "0_density.png", "--source", "edges")
    assert "would overwrite" in line
    options = ("--source", "edges", "--out", tmp_path / "maps")
    assert "would overwrite" in _mistake(capsys, "map", folder / "0.png", tmp_path / "other" / "0.png", *options)
    assert (folder / "0_density.png").read_bytes() == before
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize("out", ["/proc/none", "/dev/full/maps"])
def test_a_folder_that_cannot_be_made_is_one_line(capsys, folder, out):
    assert out in _mistake(capsys, "map", folder / "0.png", "--source", "edges", "--out", out)
