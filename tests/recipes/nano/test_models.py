"""Nano hosts: classes of transformers, generation, training, and the errors for wrong weights."""

import copy

import numpy as np
import pytest
import torch
import transformers

from sfa_adapters.errors import WeightsError
from sfa_adapters.recipes.nano import models as nano
from sfa_adapters.recipes.nano.encode import EOS, IGNORE, IMAGE, encode, encode_packed, nano_tokenizer
from sfa_adapters.recipes.nano.evaluate import bootstrap, evaluate, fabricated, generate_answers, paired_difference
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, load_charts
from sfa_adapters.recipes.synthetic.legible import ReadingHeads, reading_targets, text_records
from sfa_adapters.recipes.synthetic.questions import PHRASES, questions_for

CLASSES = {
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "SiglipVisionModel"),
    "internvl": ("InternVLForConditionalGeneration", "InternVLVisionModel"),
    "llava": ("LlavaForConditionalGeneration", "CLIPVisionModel"),
}


@pytest.fixture(scope="module", params=nano.HOSTS)
def host(request):
    return nano.build_nano(request.param)


@pytest.fixture(scope="module")
def samples():
    return load_charts("rendered", "val", limit=6)


def _images(n):
    return [np.random.default_rng(i).integers(0, 255, (144, 144, 3), dtype=np.uint8) for i in range(n)]


def test_hosts_are_the_genuine_classes(host):
    model_name, tower_name = CLASSES[host.name]
    assert type(host.model) is getattr(transformers, model_name)
    assert tower_name in {type(m).__name__ for m in host.model.modules()}
    assert 1e6 < sum(p.numel() for p in host.model.parameters()) < 8e6
    assert not host.model.training


def test_building_is_reproducible_and_leaves_the_random_state_alone(host):
    before = torch.random.get_rng_state()
    again = nano.build_nano(host.name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(host.model.parameters(), again.model.parameters(), strict=True))
    other = nano.build_nano(host.name, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(host.model.parameters(), other.model.parameters(), strict=True))


def test_generation_of_a_batch_equals_one_at_a_time(host):
    images = _images(3)
    questions = ["What is the value of KOR?", "x", "Which has the largest value in 1952?"]
    together, _ = generate_answers(host, images, questions)
    alone = [generate_answers(host, [i], [q])[0][0] for i, q in zip(images, questions, strict=True)]
    assert together == alone


def test_generation_with_a_cache_equals_generation_without(host):
    batch = encode(host, _images(2), ["What is the value of KOR?", "longer question, please?"])
    one = host.model.generate(**batch, max_new_tokens=6, do_sample=False)
    two = host.model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(one, two)


def test_packed_questions_see_only_the_picture_and_themselves(host):
    pairs = [("What is the value of AB?", "12"), ("Which has the largest value?", "AB"), ("q", "3.5")]
    images = _images(1)
    packed = encode_packed(host, images, [pairs])
    logits = host.model(**{k: v for k, v in packed.items() if k != "labels"}, use_cache=False).logits[0]
    start = host.image_tokens
    for question, answer in pairs:
        single = encode(host, images, [question], [answer])
        wanted = host.model(**{k: v for k, v in single.items() if k != "labels"}).logits[0, host.image_tokens :]
        assert torch.allclose(logits[start : start + len(wanted)], wanted, atol=1e-4)
        start += len(wanted)


def test_labels_cover_answers_only(host):
    batch = encode(host, _images(2), ["q?", "a longer question?"], ["12", "3"])
    kept = [row[row != IGNORE].tolist() for row in batch["labels"]]
    assert [host.tokenizer.decode(ids[:-1]) for ids in kept] == ["12", "3"]
    assert all(ids[-1] == EOS for ids in kept)
    packed = encode_packed(host, _images(2), [[("q?", "12"), ("p?", "7")], [("r?", "345")]])
    assert [host.tokenizer.decode(row[row != IGNORE], skip_special_tokens=True) for row in packed["labels"]] == [
        "127",
        "345",
    ]


def test_training_lowers_the_loss():
    host = copy.deepcopy(nano.build_nano("llava_onevision"))
    batch = encode_packed(host, _images(2), [[("What is the value of A?", "12")], [("What is the value of A?", "57")]])
    optimizer = torch.optim.AdamW(host.model.parameters(), lr=1e-3)
    host.model.train()
    losses = []
    for _ in range(15):
        loss = host.model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_tokenizer_keeps_every_text_and_forges_no_image():
    tokenizer = nano_tokenizer()
    text = "What is the difference between KEN and PER in 1952? 12.5% [x] #1"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert all(len(tokenizer(p, add_special_tokens=False)["input_ids"]) == 1 for p in PHRASES)
    host = nano.build_nano("llava_onevision")
    ids = encode(host, _images(1), ["<image><image>?"])["input_ids"]
    assert int((ids == IMAGE).sum()) == host.image_tokens


def test_pictures_of_another_size_are_resized():
    host = nano.build_nano("llava_onevision")
    batch = encode(host, [np.full((50, 90, 3), 255, dtype=np.uint8)], ["?"])
    assert batch["pixel_values"].shape == (1, 3, 144, 144)
    assert batch["pixel_values"].abs().max() == 0  # white is zero


def test_unknown_host_is_refused():
    with pytest.raises(ValueError, match="blip"):
        nano.build_nano("blip")  # pyright: ignore[reportArgumentType]


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(WeightsError, match=r"python -m sfa_adapters\.recipes\.nano\.pretrain --host internvl"):
        nano.load_nano("internvl", path=tmp_path / "none.safetensors")


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    file = tmp_path / "w.safetensors"
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        nano.load_nano("llava", path=file)
    monkeypatch.setattr(nano, "weights_path", lambda host: file)
    with pytest.raises(WeightsError, match="sha256"):
        nano.load_nano("llava_onevision")
    save_file({"some.weight": torch.zeros(2)}, file)
    with pytest.raises(WeightsError, match="does not fit"):
        nano.load_nano("llava", path=file)


def test_weights_survive_saving_and_loading(tmp_path):
    from safetensors.torch import save_file

    source = nano.build_nano("llava", seed=3)
    save_file({n: p.detach().half() for n, p in source.model.named_parameters()}, tmp_path / "w.safetensors")
    loaded = nano.load_nano("llava", path=tmp_path / "w.safetensors")
    for a, b in zip(source.model.parameters(), loaded.model.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.half().float(), b)


def test_the_shipped_host_reads_charts_it_has_never_seen():
    host = nano.load_nano("llava_onevision")
    unseen = load_charts("rendered", "test", limit=60, seed=1)
    result = evaluate(host, unseen)
    assert 0.25 < result.accuracy.value < 0.85
    blank = [
        ChartSample(np.full_like(s.image, 255), s.question, s.answers, s.texts, s.type, s.kind, s.id) for s in unseen
    ]
    assert evaluate(host, blank).accuracy.value < 0.5 * result.accuracy.value
    assert nano.weights_path("llava_onevision").stat().st_size < 10_000_000


def test_evaluation_counts(monkeypatch, samples):
    host = nano.build_nano("llava_onevision")
    answers = [s.answer for s in samples]
    answers[0] = "99999"
    monkeypatch.setattr("sfa_adapters.recipes.nano.evaluate.generate_answers", lambda *a, **k: (answers, 1.0))
    result = evaluate(host, samples)
    assert result.correct.tolist() == [False] + [True] * 5
    assert result.by_type()["value"].value == 0.5
    assert result.fabricated[0]
    assert result.readable[0]
    assert not result.readable[1]  # a difference
    better = evaluate(host, samples)
    assert paired_difference(result, better).value == 0
    with pytest.raises(ValueError, match="same samples"):
        paired_difference(result, evaluate(host, samples[::-1]))


def test_fabricated(samples):
    sample = next(s for s in samples if s.type == "value")
    assert not fabricated(sample.answer, sample)
    assert fabricated("98765", sample)
    assert not fabricated("KEN", sample)


def test_bootstrap_interval_holds_the_mean_and_shrinks():
    rng = np.random.default_rng(0)
    small, large = bootstrap(rng.random(20) < 0.5), bootstrap(rng.random(2000) < 0.5)
    assert small.low <= small.value <= small.high
    assert large.high - large.low < 0.06 < small.high - small.low
    assert np.isnan(bootstrap(np.array([])).value)
    assert bootstrap(np.ones(5)).low == 1


def test_reading_targets_lie_on_their_texts(samples):
    from sfa_adapters.recipes.synthetic.charts import draw
    from sfa_adapters.recipes.synthetic.real_tables import load_tables

    table = next(t for t in load_tables("val") if len(t.rows) == 2 and len(t.series) == 1)
    chart = draw(table, "hbar")
    records = text_records(table, chart.texts)
    targets = reading_targets([records, records], [(0, 0), (12, 0)], 12, 12)
    assert targets.shape == (2, 144, 18)
    grid = targets.view(2, 12, 12, 18)
    assert torch.equal(grid[0, :, :5], grid[1, :, 1:6])  # one patch to the right
    assert {tuple(t[3:8].tolist()) for t in targets[0] if t[3] >= 0} == {tuple(r[4:9].tolist()) for r in records}
    losses = ReadingHeads(8)(torch.randn(2, 144, 8), targets)
    assert losses.shape == (4,)
    assert losses[:3].gt(1).all()
    assert losses[3] == 0  # one series: nothing to say
    assert questions_for(table)


@pytest.mark.parametrize("name", nano.HOSTS)
def test_pretraining_runs_every_stage_and_goes_on_where_it_stopped(tmp_path, tmp_path_factory, monkeypatch, name):
    from sfa_adapters.recipes.nano import pretrain
    from sfa_adapters.recipes.synthetic import rendering

    monkeypatch.setattr(rendering, "CHUNK", 6)
    monkeypatch.setattr(pretrain, "VALIDATION", 3)
    shards: pretrain.Shards = {"easy-1": ("easy", 1, 1)}
    stages = [
        pretrain.Stage("pages", 2, 2, 1.0, {"easy-1": 1}, None, (1e-3, 1e-3)),
        pretrain.Stage("read", 2, 2, 0.5, {"easy-1": 1}, None, (1e-3, 1e-3)),
        pretrain.Stage("answer", 2, 2, 0.0, {"easy-1": 1}, (1.0, 1.0, 1.0), (1e-3, 1e-4)),
    ]

    data = tmp_path_factory.getbasetemp() / "shards"  # rendered once for all hosts

    def trainer(folder):
        return pretrain.Trainer(nano.build_nano(name), data, folder, shards=shards)

    first = trainer(tmp_path / "run")
    before = {n: p.detach().clone() for n, p in first.host.model.named_parameters()}
    first.train(every=1, stages=stages[:2])
    moved = {n for n, p in first.host.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not any("language_model" in n for n in moved)  # only the tower has learned so far
    again = trainer(tmp_path / "run")
    again.resume()
    assert (again.stage, again.step) == (2, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(again.host.model.parameters(), first.host.model.parameters(), strict=True)
    )
    again.train(every=2, stages=stages)
    moved = {n for n, p in again.host.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("language_model" in n for n in moved)
    digest = pretrain.ship(again.host.model, tmp_path / "w.safetensors")
    assert len(digest) == 64
    assert nano.load_nano(name, path=tmp_path / "w.safetensors").name == name
