"""The study of adaptive tokens: its pictures and questions, its arms at equal tokens, and one short run of each."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sfa_adapters.adat import latest_plans
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.nano.encode import pixel_values
from sfa_adapters.recipes.studies.settings import Job, load_settings
from sfa_adapters.recipes.studies.token_pictures import COLOURS, SIDE, CutOuts, chart_picture, scaled_records
from sfa_adapters.recipes.studies.tokens import build_arm, exact, train
from sfa_adapters.recipes.synthetic.legible import ALPHABET, BLANK, LENGTH, reading_targets
from sfa_adapters.recipes.synthetic.real_tables import load_tables

LINES = (
    ("ALPHA", "beta", "12.5"),
    ("gamma", "delta", "7"),
    ("EPSI", "zeta", "381"),
    ("theta", "kappa", "42"),
    ("1999", "iota", "55"),
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three parts with one page each: four lines of two words and a number."""
    folder = tmp_path_factory.mktemp("pages")
    for part in ("train", "val", "test"):
        place = folder / part / "pages" / "a-doc"
        place.mkdir(parents=True)
        picture = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
        boxes, words = [], []
        for line, texts in enumerate(LINES):
            for column, text in enumerate(texts):
                left, base = 10 + 60 * column, 30 + 35 * line
                cv2.putText(picture, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
                boxes.append([left, base - 11.0, left + 8.0 * len(text), base + 2.0])
                words.append(text)
        cv2.imwrite(str(place / "p-0001.png"), picture)
        content = {"boxes": boxes, "words": words, "script": "latin", "size": [SIDE, SIDE]}
        (place / "p-0001.words.json").write_text(json.dumps(content))
    return folder


def options(pages: Path, **changes: Any) -> dict[str, Any]:
    return {
        "pages": str(pages), "tokens": 121, "kind": "adat", "pictures": 6, "charts": 0.5, "steps": 2, "batch": 2,
        "lr": 1e-3, "warmup": 1, "measurements": 2, "validation": 2,
        "test_pictures": {"words": 2, "rows": 2, "charts": 2}, **changes,
    }  # fmt: skip


def test_a_question_about_a_word_is_framed_in_its_colour(pages: Path) -> None:
    cut_outs = CutOuts(pages, "train")
    texts = {word.upper(): n for n, word in enumerate(word for line in LINES for word in line)}
    for seed in range(5):
        picture = cut_outs.picture(np.random.default_rng(seed), "word")
        assert len(picture.questions) == 3
        for question, answer in picture.questions:
            colour = COLOURS[question.split()[0]]
            ys, xs = np.nonzero((picture.image == colour).all(-1))
            box = cut_outs.pages[0].boxes[texts[answer]]
            assert abs(xs.min() - box[0]) <= 2
            assert abs(xs.max() - box[2]) <= 3
            assert abs(ys.min() - box[1]) <= 2


def test_a_question_about_a_row_is_marked_at_its_height_and_asks_for_its_only_number(pages: Path) -> None:
    cut_outs = CutOuts(pages, "test")
    numbers = {line[2]: n for n, line in enumerate(LINES[:4])}  # the last line has two
    for seed in range(12):
        picture = cut_outs.picture(np.random.default_rng(seed), "row")
        ((question, answer),) = picture.questions
        ys, xs = np.nonzero((picture.image == COLOURS[question.split()[0]]).all(-1))
        assert xs.max() == 3
        assert abs((ys.min() + ys.max()) / 2 - (30 + 35 * numbers[answer] - 4.5)) < 2


def test_letters_are_expected_where_they_are_printed_also_on_the_smaller_picture(pages: Path) -> None:
    picture = CutOuts(pages, "train").picture(np.random.default_rng(0), "word")
    for side in (16, 11):
        targets = reading_targets([scaled_records(picture.records, side / 16)], [(0, 0)], side, 12)[0]
        letters = targets[:, :3]
        printed = "".join(ALPHABET[c] for c in letters[(letters >= 0) & (letters < BLANK)].tolist())
        step = SIDE / side
        boxes = CutOuts(pages, "train").pages[0].boxes
        with_letters = (letters[:, 0] >= 0) & (letters[:, 0] < BLANK)
        for patch in with_letters.nonzero().ravel().tolist():
            top, left = patch // side * step, patch % side * step
            begun = (boxes[:, :2] < (left + step + 1, top + step + 1)).all(1)
            assert (begun & (boxes[:, 2:] > (left - 1, top - 1)).all(1)).any(), "letters are expected where no word is"
        # a patch has room for three letters, so few of the smaller picture are left out
        assert len(printed) >= (0.95 if side == 16 else 0.8) * sum(len(word) for line in LINES for word in line)
        assert set(printed) <= set("".join("".join(line) for line in LINES).upper())


def test_a_long_word_is_expected_in_pieces_each_in_its_part_of_the_box(pages: Path) -> None:
    from sfa_adapters.recipes.studies.token_pictures import _records

    records = _records(np.array([[20.0, 40.0, 140.0, 53.0]]), ["abcdefghijkl"])
    assert len(records) == 3
    assert (records[:, 0] + 4).tolist() == [20, 70, 120]
    assert (records[:, 2] - 4).tolist() == [70, 120, 140]
    assert "".join(ALPHABET[c] for c in records[:, 4 : 4 + LENGTH].ravel() if c < BLANK) == "ABCDEFGHIJKL"


def test_a_chart_keeps_its_questions_and_moves_its_texts_with_it() -> None:
    table = load_tables("train")[0]
    one, other = (chart_picture(table, np.random.default_rng(seed)) for seed in (0, 1))
    for picture in (one, other):
        assert picture.questions
        for record in picture.records.tolist():
            left, top, right, bottom = (int(v) for v in np.clip(record[:4], 0, SIDE))
            assert picture.image[top:bottom, left:right].min() < 160, "no print in the box of a text"


@pytest.mark.parametrize("tokens", [121, 64])
def test_arms_have_equally_many_tokens(tokens: int, pages: Path) -> None:
    image = CutOuts(pages, "train").picture(np.random.default_rng(0)).image
    counts = {}
    for kind in ("all", "adat", "down", "adat-random"):
        host = build_arm(options(pages, kind=kind, tokens=tokens), 0)
        tower = host.model.model.vision_tower  # pyright: ignore[reportAttributeAccessIssue]
        seen: list[int] = []
        hook = tower.vision_model.encoder.layers[0].register_forward_hook(
            lambda _module, inputs, _output, seen=seen: seen.append(inputs[0].shape[-2])
        ) if hasattr(tower, "vision_model") else tower.encoder.layers[0].register_forward_hook(
            lambda _module, inputs, _output, seen=seen: seen.append(inputs[0].shape[-2])
        )  # fmt: skip
        size = torch.tensor([[host.pixels] * 2])
        host.model.model.get_image_features(  # pyright: ignore[reportAttributeAccessIssue]
            pixel_values([image], host.pixels), image_sizes=size
        )
        hook.remove()
        counts[kind] = seen[0]
        if kind.startswith("adat"):
            assert latest_plans(tower)[0].num_tokens == seen[0]
    assert counts["all"] == 256
    assert counts["down"] == tokens
    assert tokens - 15 < counts["adat"] <= tokens
    assert tokens - 15 < counts["adat-random"] <= tokens


def test_arms_of_a_seed_start_from_the_same_weights(pages: Path) -> None:
    hosts = [build_arm(options(pages, kind=kind), 3) for kind in ("all", "adat", "adat-random")]
    states = [dict(host.model.named_parameters()) for host in hosts]
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_a_budget_that_is_no_square_and_an_unknown_arm_are_refused(pages: Path) -> None:
    with pytest.raises(DataError, match="must be a square"):
        build_arm(options(pages, tokens=120), 0)
    with pytest.raises(DataError, match="none of all, adat, down"):
        build_arm(options(pages, kind="finer"), 0)


def test_pages_without_words_are_refused_with_what_to_do(pages: Path, tmp_path: Path) -> None:
    place = tmp_path / "train" / "pages" / "a-doc"
    place.mkdir(parents=True)
    source = pages / "train" / "pages" / "a-doc" / "p-0001.words.json"
    content = {key: value for key, value in json.loads(source.read_text()).items() if key != "words"}
    (place / "p-0001.words.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"boxes without words.*sfa density pages"):
        CutOuts(tmp_path, "train")


@pytest.mark.parametrize("kind", ["adat", "down"])
def test_a_run_trains_tower_projector_and_language_model(kind: str, pages: Path) -> None:
    outcome = train(Job("x", 100, {}, options(pages, kind=kind)))
    assert [step for step, _ in outcome.curve] == [1, 2]
    assert {name: len(values) for name, values in outcome.tests.items()} == {"words": 2, "rows": 2, "charts": 2}
    assert np.isfinite(list(outcome.numbers.values())).all()
    again = train(Job("x", 100, {}, options(pages, kind=kind)))
    assert again.numbers == outcome.numbers


def test_a_model_that_answers_right_is_scored_one(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = build_arm(options(pages, kind="all"), 0)
    pictures = [CutOuts(pages, "val").picture(np.random.default_rng(n), "word") for n in range(3)]
    assert exact(host, pictures).max() < 1
    forward = host.model.forward

    def cheat(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        ids = kwargs["input_ids"]
        output.logits = torch.nn.functional.one_hot(ids.roll(-1, 1), output.logits.shape[-1]).float()
        return output

    monkeypatch.setattr(host.model, "forward", cheat)
    assert exact(host, pictures).tolist() == [1.0, 1.0, 1.0]


def test_the_settings_of_the_study_are_whole() -> None:
    settings = load_settings("tokens")
    assert settings.control == "down"
    assert {job.options["kind"] for job in settings.jobs()} == {"all", "adat", "down", "adat-random"}
