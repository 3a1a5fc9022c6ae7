"""`modality_dominance`: its identities, equality with dense maps of real hosts, and tokens of neither kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from torch import Tensor

from sfa_adapters.analysis.dominance import modality_dominance, stage_layers
from sfa_adapters.analysis.dominance_report import DominanceReport, attention_efficiency, dominance_index
from sfa_adapters.errors import DataError
from sfa_adapters.readers import KeyMass
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.models import build_nano
from tests.support.compare import Snapshot
from tests.support.hosts import HOSTS, IMAGE, IMAGE_ID, TEXT, HostCase, logits_of
from tests.support.towers import lively

HOST = {host.name: host for host in HOSTS}
ALL = {"all": [0, 1]}
masses, counts = st.floats(1e-6, 1.0), st.integers(1, 5000)


@given(masses, masses, counts, counts)
def test_the_identities_of_the_two_measures(text: float, other: float, num_text: int, num_other: int) -> None:
    mdi = dominance_index(text, other, num_text, num_other)
    aei_text = attention_efficiency(text, other, num_text, num_other)
    aei_other = attention_efficiency(other, text, num_other, num_text)
    share = num_text / (num_text + num_other)
    assert mdi == pytest.approx(aei_text / aei_other, rel=1e-9)
    assert share * aei_text + (1 - share) * aei_other == pytest.approx(1.0, rel=1e-9)
    assert aei_text == pytest.approx(mdi / (share * mdi + 1 - share), rel=1e-9)
    assert min(1.0, mdi) * (1 - 1e-9) <= aei_text <= max(1.0, mdi) * (1 + 1e-9)
    # Nobody is preferred: both are 1, whatever the units of the masses.
    assert dominance_index(3.0 * num_text, 3.0 * num_other, num_text, num_other) == pytest.approx(1.0)
    assert attention_efficiency(3.0 * num_text, 3.0 * num_other, num_text, num_other) == pytest.approx(1.0)


def varied(host: HostCase, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A host that generates without an end token, and two different prompts for it."""
    model: Any = host.build()
    model.generation_config.eos_token_id = None
    inputs = host.inputs(seed)
    inputs["input_ids"][1, -3:] = torch.tensor([7, 33, 21])
    return model, inputs


def dense_masses(model: Any, inputs: dict[str, Any], queries: str, tokens: int, lengths: list[int]) -> np.ndarray:
    """Mean mass of the query rows on text and image tokens, `[B, layers, 2]`, from whole eager maps."""
    model.set_attn_implementation("eager")
    ids = inputs["input_ids"]
    options = {"output_attentions": True, "return_dict_in_generate": True, "do_sample": False}
    rows: list[list[Tensor]] = []
    kinds = [(ids != IMAGE) & (inputs["attention_mask"] == 1), ids == IMAGE]
    with torch.no_grad():
        if queries == "text":
            maps = [a.mean(1) for a in model(**inputs, output_attentions=True).attentions]
            behind = kinds[0] & ((ids == IMAGE).cumsum(-1) > 0)
            rows = [[a[b, behind[b]] for b in range(len(ids))] for a in maps]
        else:
            steps = model.generate(**inputs, **options, max_new_tokens=tokens).attentions[1:]
            for k in range(len(steps[0])):
                prompt = [
                    [s[k][b, :, 0, : ids.shape[1]].mean(0) for s in steps[: n - 1]] for b, n in enumerate(lengths)
                ]
                rows.append([torch.stack(step) for step in prompt])
    model.set_attn_implementation("sdpa")
    return np.array([
        [[float(step[b][:, kind[b]].sum(-1).mean()) for kind in kinds] for step in rows] for b in range(len(ids))
    ])  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("queries", ["generated", "text"])
def test_it_equals_dense_maps_of_real_hosts(name: str, queries: Any) -> None:
    model, inputs = varied(HOST[name])
    logits_of(model, inputs)  # transformers adds hooks of its own at the first forward
    before = Snapshot(model)
    stages = {"first": [0], "all": [0, 1]}
    report = modality_dominance(model, [inputs], layers=stages, queries=queries, max_new_tokens=5)
    before.assert_unchanged(model)
    wanted = dense_masses(model, inputs, queries, 5, [5, 5])
    np.testing.assert_allclose(report.mass[:, 0], wanted[:, 0], atol=1e-5)
    np.testing.assert_allclose(report.mass[:, 1], wanted.mean(1), atol=1e-5)
    images = HOST[name].image_tokens
    np.testing.assert_array_equal(report.tokens, [[6, images]] * 2)
    np.testing.assert_array_equal(report.queries, [4, 4])  # four of five generated tokens; four words behind the image
    assert np.abs(report.mass[0] - report.mass[1]).max() > 1e-3
    for stage in stages:
        averages = [report.ratio_of_means(stage), report.mean_of_ratios(stage)]
        pooled = averages[0]
        share = 6 / (6 + images)
        assert pooled["mdi"].value == pytest.approx(pooled["aei_text"].value / pooled["aei_image"].value)
        assert share * pooled["aei_text"].value + (1 - share) * pooled["aei_image"].value == pytest.approx(1.0)
        text, other = wanted[:, list(stages).index(stage)].T if stage == "first" else wanted.mean(1).T
        assert averages[1]["mdi"].value == pytest.approx(float(np.mean(text / 6 / (other / images))), rel=1e-3)
        assert pooled["mdi"].value == pytest.approx(text.mean() / 6 / (other.mean() / images), rel=1e-3)


def padded(inputs: dict[str, Any], row: int, cut: int) -> dict[str, Any]:
    """The same batch with the first `cut` tokens of one prompt replaced by padding on the left."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[row, :cut], mask[row, :cut] = 0, 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def one(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One prompt of a batch without its padding."""
    seen = inputs["attention_mask"][row] == 1
    inputs_of_row = {k: v[row : row + 1] for k, v in inputs.items() if isinstance(v, Tensor)}
    return {
        **inputs_of_row,
        "input_ids": inputs_of_row["input_ids"][:, seen],
        "attention_mask": inputs_of_row["attention_mask"][:, seen],
    }


@pytest.mark.parametrize("queries", ["generated", "text"])
def test_a_padded_batch_tells_the_same_as_single_prompts(queries: Any) -> None:
    model, inputs = varied(HOST["llava"])
    batch = padded(inputs, 1, 2)
    together = modality_dominance(model, [batch], layers=ALL, queries=queries, max_new_tokens=4)
    apart = modality_dominance(model, [one(batch, 0), one(batch, 1)], layers=ALL, queries=queries, max_new_tokens=4)
    np.testing.assert_allclose(together.mass, apart.mass, atol=1e-5)
    np.testing.assert_array_equal(together.tokens, [[6, 16], [4, 16]])
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    assert together.samples == apart.samples == (0, 1)


def test_padding_behind_an_ended_answer_does_not_count() -> None:
    model, inputs = varied(HOST["llava"])
    for seed in range(20):
        inputs = {**inputs, **HOST["llava"].vision_inputs(seed)}
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        ends = [t for t in new[0, 1:3].tolist() if t not in new[0, :1].tolist() and t not in new[1].tolist()]
        if ends:
            break
    else:
        pytest.fail("no pair of different answers")
    model.generation_config.eos_token_id = [ends[0], 63]
    model.generation_config.pad_token_id = 0
    length = new[0].tolist().index(ends[0]) + 1
    together = modality_dominance(model, [inputs], layers=ALL, max_new_tokens=6)
    np.testing.assert_array_equal(together.queries, [length - 1, 5])
    apart = modality_dominance(model, [one(inputs, 0), one(inputs, 1)], layers=ALL, max_new_tokens=6)
    np.testing.assert_allclose(together.mass, apart.mass, atol=1e-5)
    np.testing.assert_allclose(
        together.mass[:, 0], dense_masses(model, inputs, "generated", 6, [length, 6]).mean(1), atol=1e-5
    )


def test_prompts_that_cannot_be_measured_are_skipped_and_counted() -> None:
    model, inputs = varied(HOST["llava"])
    text_only = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    first = one(inputs, 0)
    words = first["input_ids"]
    image_only = {**first, "input_ids": words[:, 2:18], "attention_mask": torch.ones(1, 16).long()}
    report = modality_dominance(model, [text_only, inputs, image_only], layers=ALL, max_new_tokens=3)
    assert report.samples == (1, 2)
    assert [(s.sample, s.reason) for s in report.skipped] == [(0, "no image tokens"), (3, "no text tokens")]
    front = {**first, "input_ids": words[:, :18], "attention_mask": torch.ones(1, 18).long()}
    with pytest.raises(DataError, match=r"None of the 3 samples.*no image tokens \(1\).*; no text behind the image"):
        modality_dominance(model, [text_only, image_only, front], layers=ALL, queries="text")
    model.generation_config.eos_token_id = int(model.generate(**first, max_new_tokens=1)[0, -1])
    with pytest.raises(DataError, match="the answer is one token"):
        modality_dominance(model, [first], layers=ALL)


def test_bos_and_special_tokens_can_be_left_out_of_both_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = varied(HOST["llava"])
    inputs["input_ids"][:, 0], inputs["input_ids"][:, -1] = 1, 2  # BOS and EOS of the text config
    seen: list[Tensor] = []
    plain = KeyMass.__init__

    def spy(self: KeyMass, groups: Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append(groups)
        plain(self, groups, *args, **kwargs)

    monkeypatch.setattr(KeyMass, "__init__", spy)

    def tokens(**options: Any) -> list[int]:
        return modality_dominance(model, [inputs], layers=ALL, max_new_tokens=3, **options).tokens[0].tolist()

    assert tokens() == [6, 16]
    assert tokens(include_bos=False) == [5, 16]
    assert seen[-1][0, 0] == -1
    assert tokens(include_special=False) == [5, 16]
    assert seen[-1][0, -1] == -1
    assert seen[-1][0, 0] == 0
    assert tokens(include_bos=False, include_special=False) == [4, 16]
    ids = inputs["input_ids"][0, -3:].tolist()
    assert tokens(include_special=False, special_ids=ids) == [3, 16]
    assert tokens(include_special=False, special_ids=[1, 2]) == [5, 16]  # BOS has an option of its own
    assert tokens(include_special=False, special_ids=[IMAGE]) == [6, 16]  # the image stays the image
    nano = build_nano("llava_onevision")
    batch = [encode(nano, [np.zeros((144, 144, 3), np.uint8)], ["What?"])]
    with pytest.raises(DataError, match="names a BOS token"):
        modality_dominance(nano.model, batch, include_bos=False)
    nano.model.generation_config.eos_token_id = None  # pyright: ignore[reportOptionalMemberAccess]
    report = modality_dominance(nano.model, batch, include_special=False, tokenizer=nano.tokenizer, max_new_tokens=3)
    assert report.tokens[0].tolist() == [6, 145]


def test_stages_are_those_of_the_paper_or_thirds() -> None:
    assert stage_layers("2/2/2", 32) == {"early": (0, 1), "middle": (15, 16), "late": (30, 31)}
    assert stage_layers("2/2/2", 7) == {"early": (0, 1), "middle": (2, 3), "late": (5, 6)}
    assert stage_layers("2/2/2", 1) == {"early": (0,), "middle": (0,), "late": (0,)}
    thirds = stage_layers("thirds", 32)
    assert [len(numbers) for numbers in thirds.values()] == [10, 11, 11]
    assert sum(thirds.values(), ()) == tuple(range(32))
    assert stage_layers({"mine": [3, 1]}, 4) == {"mine": (3, 1)}
    for layers, message in (("thirds", "cannot use"), ({"mine": [4]}, "0 to 1"), ({}, "0 to 1"), ("half", "'2/2/2'")):
        with pytest.raises(DataError, match=message):
            stage_layers(layers, 2)  # pyright: ignore[reportArgumentType]


def sliding() -> Any:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=56,
            patch_size=14, vision_use_head=False,
        ),
        text_config=transformers.Gemma3TextConfig(**{**TEXT, "head_dim": 8, "sliding_window": 6}),
        **IMAGE_ID, mm_tokens_per_image=4,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def test_a_sliding_window_drops_keys_but_moves_none() -> None:
    model: Any = lively(sliding)()
    model.generation_config.eos_token_id = None
    inputs = HOST["gemma3"].inputs()
    ids = inputs["input_ids"]
    report = modality_dominance(model, [inputs], layers={"one": [0]}, max_new_tokens=5)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        answered = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        whole = {
            name: torch.cat((value, torch.ones_like(answered[:, ids.shape[1] :]) * (name == "attention_mask")), 1)
            for name, value in inputs.items()
            if value.shape == ids.shape
        }
        maps = model(**{**inputs, **whole, "input_ids": answered}, use_cache=False, output_attentions=True).attentions
    rows = maps[0][:, :, ids.shape[1] : -1, : ids.shape[1]].mean((1, 2))  # of the first four generated tokens
    wanted = torch.stack([(rows * ((ids == IMAGE) == image)).sum(-1) for image in (False, True)], -1)
    np.testing.assert_allclose(report.mass[:, 0], wanted, atol=1e-5)
    seen = (maps[0][0, 0, -2] > 0).sum()
    assert seen == 6  # and not the whole prompt


Change = Callable[[dict[str, Any]], dict[str, Any]]
BAD: list[tuple[str, Change, dict[str, Any], str]] = [
    ("mask", lambda i: {**i, "attention_mask": torch.ones(2, 5)}, {}, r"attention_mask \(2, 5\) does not fit"),
    ("ids", lambda i: {**i, "input_ids": i["input_ids"][0]}, {}, r"input_ids is \(22,\)"),
    ("missing", lambda i: {"pixel_values": i["pixel_values"]}, {}, "input_ids is missing"),
    ("queries", dict, {"queries": "answer"}, "queries='answer'"),
    ("tokens", dict, {"max_new_tokens": 1}, "at least 2"),
]


@pytest.mark.parametrize(("change", "options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_named(change: Change, options: dict[str, Any], message: str) -> None:
    model, inputs = varied(HOST["llava"])
    with pytest.raises(DataError, match=message):
        modality_dominance(model, [change(inputs)], **{"layers": ALL, **options})


def test_models_that_cannot_be_read_are_named() -> None:
    bare = HOST["llava"].build().model.language_model  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DataError, match="names no image token"):
        modality_dominance(bare, [])  # pyright: ignore[reportArgumentType]


def texts(figure: Any) -> list[Text]:
    figure.canvas.draw()
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def test_exports_and_figure(tmp_path: Path) -> None:
    model, inputs = varied(HOST["llava"])
    report = modality_dominance(model, [inputs, inputs], max_new_tokens=3)
    assert isinstance(report, DominanceReport)
    rows = report.table()
    assert [(r["stage"], r["average"]) for r in rows][:2] == [("early", "mean of ratios"), ("early", "ratio of means")]
    assert len(rows) == 6
    for row in rows:
        assert row["mdi_low"] <= row["mdi"] * (1 + 1e-9)
        assert row["mdi"] <= row["mdi_high"] * (1 + 1e-9)
        assert row["text_mass"] + row["image_mass"] < 1  # what was generated before is in neither
    exported = json.loads(report.to_json())
    assert exported["table"] == json.loads(json.dumps(rows))
    assert exported["options"]["queries"] == "generated"
    assert exported["options"]["stages"] == {"early": [0, 1], "middle": [0, 1], "late": [0, 1]}
    with report.to_csv(tmp_path / "dominance.csv").open(encoding="utf-8") as file:
        assert [float(row["mdi"]) for row in csv.DictReader(file)] == [row["mdi"] for row in rows]
    labels = texts(report.figure())
    assert min(float(t.get_fontsize()) for t in labels) >= 15
    words = " ".join(t.get_text() for t in labels)
    for word in ("MDI", "AEI", "ratio, log scale", "early\nlayers 0, 1", "n = 4", "95% interval"):
        assert word in words
