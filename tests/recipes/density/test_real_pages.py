"""Real pages from a package: downloaded, checked, rendered, and read again; every broken part named."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.density import debian_packages, real_pages
from sfa_adapters.recipes.density.batches import CropBatches
from sfa_adapters.recipes.density.checks import RealCheck
from sfa_adapters.recipes.density.debian_packages import DebianPackage, check_tools, download, read_list, run_tool
from sfa_adapters.recipes.density.options import PagesConfig
from sfa_adapters.recipes.density.real_pages import LONGER, RealPage, make_pages, read_page, read_part
from sfa_adapters.recipes.density.views import VIEWS, view_of

missing = [tool for tool in debian_packages.TOOLS if shutil.which(tool) is None]
needs_tools = pytest.mark.skipif(bool(missing), reason=f"not on this machine: {', '.join(missing)}")
WORDS = ("Many", "words", "of", "a", "page", "that", "somebody", "could", "read", "if", "it", "had", "a", "meaning")


def _package(folder, name="some-doc", part="test", lines=20):
    """A .deb file with a PDF of two pages, a compressed copy of it, a broken PDF and a text file."""
    from matplotlib.backends.backend_pdf import PdfPages

    tree = folder / "tree"
    docs = tree / "usr/share/doc" / name
    docs.mkdir(parents=True)
    with PdfPages(docs / "manual.pdf") as pdf:
        for page in range(2):
            figure = Figure(figsize=(6, 8))
            for line in range(lines):
                figure.text(0.1, 0.9 - 0.035 * line, " ".join(WORDS[(line + page) % 5 :][:9]), fontsize=11)
            pdf.savefig(figure)
    packed = subprocess.run(["gzip", "-kc", docs / "manual.pdf"], capture_output=True, check=True).stdout
    (docs / "copy.pdf.gz").write_bytes(packed)
    (docs / "broken.pdf").write_text("no PDF at all")
    (docs / "readme.txt").write_text("left out")
    control = tree / "DEBIAN/control"
    control.parent.mkdir()
    control.write_text(
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <n@o>\nDescription: pages\n"
    )
    archive = folder / f"{name}_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", tree, archive], check=True, capture_output=True)
    shutil.rmtree(tree)
    return archive, DebianPackage(name, "1.0", hashlib.sha256(archive.read_bytes()).hexdigest(), part)


@pytest.fixture
def engine(monkeypatch):
    """No OCR engine: it sees no text, so that the rule of unlisted words always holds."""
    monkeypatch.setattr("sfa_adapters.adat.labels.ocr_boxes", lambda picture: np.zeros((0, 4)))


def _make(tmp_path, monkeypatch, **kwargs):
    out = tmp_path / "set"
    (out / "packages").mkdir(parents=True)
    archive, package = _package(tmp_path, **kwargs)
    archive.rename(out / "packages" / archive.name)
    monkeypatch.setattr(real_pages, "read_list", lambda: (package,))
    return out, make_pages(PagesConfig(out=out))


@needs_tools
@pytest.mark.usefixtures("engine")
def test_pages_of_a_package_come_back_with_their_words(tmp_path, monkeypatch):
    out, counts = _make(tmp_path, monkeypatch)
    pages = read_part(out, "test")
    assert counts["test pages"] == len(pages) == 4  # two pages, twice: the compressed copy is a file of its own
    page = pages[0]
    picture = page.picture()
    assert max(picture.shape) == LONGER
    assert picture.shape[:2] == page.size
    assert page.script == "latin"
    assert page.package == "some-doc"
    assert len(page.boxes) > 100
    # Where boxes are there is ink, and nowhere else.
    mask = np.zeros(page.size, dtype=bool)
    for left, top, right, bottom in page.boxes.round().astype(int):
        mask[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = True
    ink = picture.mean(axis=2) < 128
    assert (ink & mask).sum() > 0.999 * ink.sum()
    assert len(list(out.rglob("*.600dpi.png"))) == 1
    assert not list((out / "unpacked").iterdir())


@needs_tools
@pytest.mark.usefixtures("engine")
def test_a_complete_package_is_not_made_again(tmp_path, monkeypatch):
    out, counts = _make(tmp_path, monkeypatch)
    monkeypatch.setattr(real_pages, "download", lambda *_: pytest.fail("downloaded again"))
    assert make_pages(PagesConfig(out=out)) == counts


@needs_tools
@pytest.mark.usefixtures("engine")
def test_views_keep_words_where_they_are(tmp_path, monkeypatch):
    out, _ = _make(tmp_path, monkeypatch)
    page = next(p for p in read_part(out, "test") if view_of(p, "scan, 300 dpi", 0) is not None)
    for name in VIEWS:
        view = view_of(page, name, 3)
        assert view is not None
        rows, columns = view.density.shape
        assert view.picture.shape == (rows * 16, columns * 16, 3)
        inside = view.middles[((view.middles >= 0) & (view.middles < (rows, columns))).all(axis=1)].astype(int)
        assert (view.density[inside[:, 0], inside[:, 1]] > 0.3).mean() > 0.95, name
    ink = [view_of(page, name, 3).picture.mean(axis=2) < 128 for name in ("upright", "turned by 90")]  # pyright: ignore
    np.testing.assert_array_equal(np.rot90(ink[0], -1), ink[1])


@needs_tools
@pytest.mark.usefixtures("engine")
def test_batches_and_checks_are_functions_of_the_seed(tmp_path, monkeypatch):
    out, _ = _make(tmp_path, monkeypatch, part="train")
    shutil.copytree(out / "train/pages", out / "val/pages")
    for kind in ("fonts", "photographs"):
        (out / "train" / kind).mkdir()
    import matplotlib
    from PIL import Image

    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    shutil.copy(font, out / "train/fonts")
    Image.effect_noise((300, 200), 60).save(out / "train/photographs/a.png")
    batches = CropBatches(out, 16, 0)
    pictures, density, weight = batches[3]
    assert pictures.shape == (16, 3, 256, 256)
    assert density.shape == weight.shape == (16, 16, 16)
    assert 0 <= float(density.min()) <= float(density.max()) <= 1
    assert float(density.max()) > 0.5
    assert bool((CropBatches(out, 16, 0)[3][0] == pictures).all())
    assert not bool((CropBatches(out, 16, 1)[3][0] == pictures).all())

    class Knows:
        training = False
        eval = train = lambda self, mode=True: self

        def __init__(self, answers):
            self.answers = iter(answers)

        def logits(self, images):
            import torch

            return torch.logit(torch.from_numpy(np.stack([next(self.answers) for _ in images])), eps=1e-6)

    check = RealCheck(out)
    assert check(Knows([crop.density for crop in check.crops])) < 1e-6  # pyright: ignore[reportArgumentType]
    assert check(Knows([1 - crop.density for crop in check.crops])) > 0.1  # pyright: ignore[reportArgumentType]


def test_a_missing_part_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match="sfa density pages"):
        read_part(tmp_path, "val")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"boxes": [[1, 2]], "script": "latin", "size": [1, 1]}',
        '{"boxes": [], "script": "runes", "size": [1, 1]}',
    ],
)
def test_a_damaged_file_of_words_is_named(tmp_path, content):
    (tmp_path / "a.words.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.words\.json"):
        read_page(tmp_path / "a.words.json")


def test_the_list_of_the_library_is_complete():
    packages = read_list()
    assert len(packages) > 60
    assert {p.part for p in packages if p.kind == "pages"} == {"train", "val", "test"}
    assert all(len(p.sha256) == 64 for p in packages)


@pytest.mark.parametrize("entry", [{"name": "a"}, {"name": "a", "version": "1", "sha256": "", "part": "exam"}])
def test_a_list_with_a_wrong_entry_is_named(tmp_path, entry):
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match=r"list\.json"):
        read_list(tmp_path / "list.json")


def test_missing_programs_name_their_package(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"apt install .*poppler-utils"):
        check_tools()


def test_a_program_that_fails_is_quoted():
    with pytest.raises(DataError, match="exit code 3"):
        run_tool("sh", "-c", "exit 3")


@needs_tools
def test_a_package_with_another_hash_is_refused(tmp_path):
    archive, package = _package(tmp_path)
    (tmp_path / "kept").mkdir()
    archive.rename(tmp_path / "kept" / archive.name)
    other = DebianPackage(package.name, package.version, "0" * 64, "test")
    with pytest.raises(DataError, match="SHA-256"):
        download(other, tmp_path / "kept")
    assert download(package, tmp_path / "kept").name == archive.name


def test_a_version_that_apt_does_not_have_is_named(tmp_path, monkeypatch):
    def fail(*command, **_):
        raise DataError("E: Version '9' was not found")

    monkeypatch.setattr(debian_packages, "run_tool", fail)
    with pytest.raises(DataError, match="some-doc 9 cannot be downloaded"):
        download(DebianPackage("some-doc", "9", "0" * 64, "test"), tmp_path)


def test_leaders_of_a_table_of_contents_are_no_words(tmp_path: Path) -> None:
    boxes = np.array([[10, 10, 40, 20], [50, 10, 52, 20], [60, 10, 70, 20], [80, 10, 95, 20]], dtype=np.float32)
    page = RealPage(tmp_path / "page.png", boxes, "latin", "a", (160, 160), ("Chapter", ".", "7", "漢字"))
    assert page.readable.tolist() == [True, False, True, True]
    assert replace(page, words=None).readable.all()
    Image.new("RGB", (160, 160), "white").save(page.path)
    view = view_of(page, "upright", 0)
    assert view is not None
    assert len(view.middles) == 3
