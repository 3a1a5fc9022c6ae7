"""The collator with the real processor of every family: tokens, tiles, labels, evidence, texts like control tokens."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sfa_adapters.data.collator import IGNORE, NOT_FOR_MODEL, Collator
from sfa_adapters.data.datasets import Questions
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.hosts.spec import HOSTS
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.scr import SCRConfig, SCRLoss
from sfa_adapters.scr.targets import boxes_to_tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")

FAMILIES = ("internvl", "llava_onevision", "llava", "qwen2_5_vl")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("hosts")
    return {family: nano_checkpoint(family, place / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def processors(folders):
    return {family: transformers.AutoProcessor.from_pretrained(folders[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def models(folders):
    load = transformers.AutoModelForImageTextToText.from_pretrained
    return {family: load(folders[family]).eval() for family in FAMILIES}


@pytest.fixture
def collator(processors):
    def make(family, train=True, **changes):
        recipe = Recipe(name="x", model="m", family=family, **{"data": "charts", "max_tiles": 2, **changes})
        return Collator(processors[family], HOSTS[family], recipe, train)

    return make


def _picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def _example(question="What is shown?", answers=("42",), image=None, **fields):
    image = _picture(144, 144) if image is None else image
    return {"row": Row("r1", None, question, answers, **fields), "image": image, "skipped": ()}


def _two():
    """Questions and images of different sizes, one in Korean."""
    korean = _example("서울의 값은 얼마입니까?", ("서울 3.5", "x"), _picture(100, 290, 1))
    return [_example("How many are there in the chart on the left?", ("1,234",)), korean]


def _for_model(batch):
    return {name: value for name, value in batch.items() if name not in NOT_FOR_MODEL}


def _prompt(processor, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _squared(image):
    """The image in the middle of a white square (the nano processor's mean is white), written out."""
    side = max(image.shape[:2])
    top, left = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
    below, right = side - image.shape[0] - top, side - image.shape[1] - left
    return np.pad(image, ((top, below), (left, right), (0, 0)), constant_values=255)


# -- tokens and pixels ------------------------------------------------------------------------------------------------


@every_family
def test_a_prompt_is_what_the_hosts_own_processor_makes_of_a_batch(collator, processors, family):
    processor, examples = processors[family], _two()
    batch = collator(family, train=False)(examples)
    texts = [
        _prompt(processor, f"{e['row'].question}\nAnswer the question using a single word or phrase.") for e in examples
    ]
    images = [_squared(e["image"]) if family == "llava" else e["image"] for e in examples]
    options = {"max_patches": 2} if family == "internvl" else {}
    options |= {"size": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 784}} if family == "qwen2_5_vl" else {}
    expected = processor(
        images=images, text=texts, padding=True, padding_side="left", return_tensors="pt", images_kwargs=options
    )
    assert batch.keys() - set(NOT_FOR_MODEL) == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@every_family
def test_labels_are_the_answer_and_the_end_and_nothing_else(collator, processors, models, family):
    tokenizer, make = processors[family].tokenizer, collator(family)
    batch, prompts = make(_two()), collator(family, train=False)(_two())
    ends = models[family].generation_config.eos_token_id
    assert make.end_id in ([ends] if isinstance(ends, int) else ends)  # `generate` stops there
    for row, answer in enumerate(("1,234", "서울 3.5")):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        places = (labels != IGNORE).nonzero().flatten()
        assert torch.equal(labels[places], ids[places])
        assert tokenizer.decode(labels[places][:-1]) == answer
        assert labels[places][-1] == make.end_id
        # In one piece behind the prompt, at the end of what is not padding.
        length = int(batch["attention_mask"][row].sum())
        assert places.tolist() == list(range(length - len(places), length))
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        assert torch.equal(ids[: length - len(places)], prompt)
        assert bool((ids[length:] == make.prompt.pad_id).all())
    assert "서울의 값은" in tokenizer.decode(batch["input_ids"][1])


@every_family
def test_a_sample_in_a_batch_is_the_sample_alone(collator, models, family):
    make, model = collator(family), models[family]
    together = make(_two())
    with torch.no_grad():
        both = model(**_for_model(together)).logits
        for row, example in enumerate(_two()):
            alone = make([example])
            used = alone["labels"][0] != IGNORE
            logits = model(**_for_model(alone)).logits[0]
            torch.testing.assert_close(both[row, : len(logits)][used], logits[used], atol=2e-4, rtol=1e-3)


@every_family
def test_generation_from_left_padding_is_that_of_the_sample_alone(collator, models, family):
    make, model = collator(family, train=False), models[family]

    def first(examples):
        options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(**_for_model(make(examples)), **options).logits[0]

    both = first(_two())
    for row, example in enumerate(_two()):
        torch.testing.assert_close(both[row], first([example])[0], atol=2e-4, rtol=1e-3)


# -- texts that play tricks -------------------------------------------------------------------------------------------


@every_family
def test_a_text_never_becomes_a_control_token(collator, processors, family):
    processor, make = processors[family], collator(family)
    controls = [processor.image_token, processor.tokenizer.eos_token, processor.tokenizer.pad_token, "<img>", "<video>"]
    spelled = "".join(controls)
    trick = _example(f"What is {spelled}{spelled} here?", (f"it is {spelled}",))
    plain = make([_example()])
    batch = make([trick])
    for token in controls:
        number = processor.tokenizer.convert_tokens_to_ids(token)
        expected = plain["input_ids"].eq(number).sum()  # a template writes some of them itself
        assert batch["input_ids"].eq(number).sum() == expected, token
    assert batch["labels"][0][batch["labels"][0] != IGNORE].tolist().count(make.end_id) == 1
    assert spelled in processor.tokenizer.decode(batch["input_ids"][0]).replace(processor.image_token, "", 0)
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])


def test_braces_and_marks_in_a_question_stay(collator, processors):
    make = collator("llava", prompt="Q: {question} {x}")
    batch = make([_example("What is {answer} or {question}?")])
    text = processors["llava"].tokenizer.decode(batch["input_ids"][0])
    assert "Q: What is {answer} or {question}? {x}" in text


def test_a_processor_without_a_template_gets_a_plain_prompt(processors):
    processor = copy.deepcopy(processors["llava"])
    processor.chat_template = processor.tokenizer.chat_template = None
    recipe = Recipe(name="x", model="m", family="llava")
    batch = Collator(processor, HOSTS["llava"], recipe)([_example()])
    text = processor.tokenizer.decode(batch["input_ids"][0]).replace("<image>", "")
    assert text == "\nWhat is shown?\nAnswer the question using a single word or phrase.\n42</s>"


@pytest.mark.parametrize("template", ["no image: {{ messages[0]['content'][1]['text'] }}", "<image><image>", "<image>"])
def test_a_template_without_place_for_image_and_question_is_refused(processors, template):
    processor = copy.deepcopy(processors["llava"])
    processor.chat_template = template
    with pytest.raises(RecipeError, match="must write one <image> in front of the question"):
        Collator(processor, HOSTS["llava"], Recipe(name="x", model="m", family="llava"))


def test_a_tokenizer_that_starts_a_text_itself_does_so_once(processors):
    processor = copy.deepcopy(processors["llava"])
    processor.tokenizer.bos_token = "<unk>"
    processor.chat_template = "<unk>" + processor.chat_template
    processor.tokenizer._tokenizer.post_processor = __import__("tokenizers").processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", processor.tokenizer.convert_tokens_to_ids("<unk>"))]
    )
    make = Collator(processor, HOSTS["llava"], Recipe(name="x", model="m", family="llava"))
    start = processor.tokenizer.convert_tokens_to_ids("<unk>")
    assert make([_example()])["input_ids"][0].tolist().count(start) == 1
    processor.chat_template = processor.chat_template.removeprefix("<unk>")
    make = Collator(processor, HOSTS["llava"], Recipe(name="x", model="m", family="llava"))
    assert make([_example()])["input_ids"][0].tolist().count(start) == 1


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "tiles"), [(1, 1), (2, 3), (3, 4), (12, 4)])
def test_internvl_cuts_into_no_more_tiles_than_the_recipe_says(collator, processors, most, tiles):
    batch = collator("internvl", max_tiles=most)([_example(image=_picture(100, 300))])
    assert len(batch["pixel_values"]) == tiles  # with the whole page behind them
    token = collator("internvl").prompt.image_id
    assert batch["input_ids"].eq(token).sum() == processors["internvl"].image_seq_length * tiles


def test_llava_onevision_shrinks_a_page_that_has_too_many_tiles(collator, processors, models):
    side = processors["llava_onevision"].image_processor.size["height"]
    page = _picture(side - 4, 2 * side + 2)
    free, bound = collator("llava_onevision"), collator("llava_onevision", max_tiles=1)
    assert free([_example(image=page)])["pixel_values"].shape[1] == 3
    batch = bound(
        [
            _example(
                image=page,
            )
        ]
    )
    assert batch["pixel_values"].shape[1] == 2  # the page and one tile
    assert batch["image_sizes"].tolist() == [[int((side - 4) * side / (2 * side + 2)), side]]
    assert torch.isfinite(models["llava_onevision"](**_for_model(batch)).loss)  # the model counts the same tiles
    small = _picture(50, 60)
    assert bound([_example(image=small)])["image_sizes"].tolist() == [[50, 60]]
    processor = copy.deepcopy(processors["llava_onevision"])
    processor.image_processor.image_grid_pinpoints = [[2 * side, 2 * side]]
    recipe = Recipe(name="x", model="m", family="llava_onevision", max_tiles=3)
    with pytest.raises(RecipeError, match="max_tiles=3 must be at least 4"):
        Collator(processor, HOSTS["llava_onevision"], recipe)


def test_qwen_keeps_to_max_pixels(collator):
    page = _picture(300, 500)
    for most in (56 * 56, 112 * 112, 196 * 196):
        (grid,) = collator("qwen2_5_vl", max_pixels=most)([_example(image=page)])["image_grid_thw"]
        assert grid[1] * grid[2] * 14 * 14 <= most
    with pytest.raises(RecipeError, match="max_pixels=700 must be at least 784"):
        collator("qwen2_5_vl", max_pixels=700)


# -- evidence ---------------------------------------------------------------------------------------------------------


def _marked(height, width, box):
    """A white page with a black box."""
    image = np.full((height, width, 3), 255, np.uint8)
    left, top, right, bottom = (round(v) for v in box)
    image[top:bottom, left:right] = 0
    return image


def _dark(tile):
    """The box of what is dark in a normalised tile `[3, H, W]`, as shares of its sides."""
    rows, columns = (tile.mean(0) < tile.mean() - 0.5).nonzero(as_tuple=True)
    height, width = tile.shape[1:]
    return [c.item() for c in (columns.min() / width, rows.min() / height, columns.max() / width, rows.max() / height)]


@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "llava"])
@pytest.mark.parametrize(("source", "tiles"), [(None, 2), (None, 1), ((600, 200), 2), ((600, 200), 1)])
def test_evidence_boxes_lie_where_the_tower_sees_them(collator, family, source, tiles):
    box = (180, 30, 240, 60)
    page_box = box if source is None else tuple(2 * v for v in box)
    example = _example(image=_marked(100, 300, box), boxes=(page_box,), page_size=source)
    batch = collator(family, scr_grounding=0.3, max_tiles=tiles)([example])
    page = {"internvl": -1, "llava": 0}.get(family)
    tile = batch["pixel_values"][0, 0] if page is None else batch["pixel_values"][page]  # the one with the whole page
    height, width = batch["page_sizes"][0].tolist()
    (left, top, right, bottom) = batch["evidence_boxes"][0][0]
    expected = [left / width, top / height, right / width, bottom / height]
    assert _dark(tile) == pytest.approx(expected, abs=0.03)


def test_evidence_of_qwen_is_a_mask_over_its_tokens(collator, processors):
    box = (112, 28, 168, 56)
    examples = [
        _example(image=_marked(112, 280, box), boxes=(box,)),
        _example(image=_picture(56, 84)),
        _example(image=_marked(56, 84, (28, 0, 56, 28)), boxes=((28, 0, 56, 28),)),
    ]
    batch = collator("qwen2_5_vl", scr_grounding=0.3)(examples)
    mask = batch["evidence_mask"]
    counts = batch["image_grid_thw"].prod(1) // 4
    assert mask.shape == (3, int(counts.max()))
    assert mask[1].sum() == 0
    # Four patches of `pixel_values` after the other are one token, which is dark where the mask says so.
    tokens = batch["pixel_values"].mean(1).unflatten(0, (-1, 4)).mean(1).split(counts.tolist())
    for row in (0, 2):
        dark = tokens[row] < tokens[row].mean()
        assert torch.equal(mask[row, : counts[row]] > 0.5, dark)
        assert mask[row, counts[row] :].sum() == 0
    assert torch.equal(mask[2, :6], boxes_to_tokens([(28, 0, 56, 28)], (56, 84), (2, 3)))


@every_family
def test_the_grounding_term_takes_the_evidence(collator, models, family):
    batch = collator(family, scr_grounding=0.3)([_example(image=_picture(100, 290), boxes=((10, 10, 90, 90),))] * 2)
    inputs = _for_model(batch)
    evidence = {n: batch[n] for n in ("evidence_boxes", "evidence_mask", "page_sizes") if n in batch}
    scr = SCRLoss(models[family], SCRConfig(grounding=0.3, warmup_steps=0, entropy=0, stability=0))
    with scr.watch():
        outputs = models[family](**inputs)
    penalty, terms = scr(outputs, inputs, **evidence)
    assert terms["grounding_used"] == 2
    assert penalty.item() > 0


@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "llava"])
def test_without_boxes_the_density_of_text_is_left_to_decide(collator, family):
    assert "evidence_boxes" not in collator(family, scr_grounding=0.3)([_example()])
    assert "evidence_boxes" not in collator(family)([_example(boxes=((0, 0, 9, 9),))])
    assert "evidence_boxes" not in collator(family, False, scr_grounding=0.3)([_example(boxes=((0, 0, 9, 9),))])


def test_qwen_cannot_ground_what_no_data_set_tells(collator, tmp_path):
    with pytest.raises(RecipeError, match=r"HuggingFaceM4/ChartQA does not say.*scr_grounding=0"):
        collator("qwen2_5_vl", scr_grounding=0.3, data="HuggingFaceM4/ChartQA")
    collator("qwen2_5_vl", scr_grounding=0.3, data=str(tmp_path))


# -- the rest ---------------------------------------------------------------------------------------------------------


class _Rows(list):
    """Rows in memory, of which the second has no image."""


def test_batches_come_from_workers_with_what_was_skipped(collator):
    rows = _Rows(Row(f"r{n}", _picture(40 + n, 60), f"q{n}", (str(n),)) for n in range(5))
    rows[1] = Row("r1", b"nothing", "q", ("1",))
    questions, make = Questions(rows), collator("qwen2_5_vl")
    loaders = [DataLoader(questions, batch_size=2, collate_fn=make, num_workers=n) for n in (0, 2)]
    for one, two in zip(*loaders, strict=True):
        assert one.keys() == two.keys()
        assert one["row_ids"] == two["row_ids"]
        assert [skipped.id for skipped in one["skipped"]] == [skipped.id for skipped in two["skipped"]]
        assert all(torch.equal(one[n], two[n]) for n in _for_model(one))
    first = next(iter(loaders[0]))
    assert first["row_ids"] == ["r0", "r2"]
    assert [skipped.id for skipped in first["skipped"]] == ["r1"]


@every_family
def test_it_can_be_pickled(collator, family):
    make = collator(family)
    one, two = make(_two()), pickle.loads(pickle.dumps(make))(_two())
    assert all(torch.equal(one[n], two[n]) for n in _for_model(one))


def test_rows_without_answers_can_be_asked_but_not_trained_on(collator):
    assert "labels" not in collator("llava", train=False)([_example(answers=())])
    with pytest.raises(DataError, match="r1: the question has no answer"):
        collator("llava")([_example(answers=())])


def test_an_image_that_a_processor_refuses_is_named(collator):
    with pytest.raises(DataError, match=r"r1: the processor cannot take the image, 1000 x 2 \(absolute aspect ratio"):
        collator("qwen2_5_vl")([_example(image=_picture(2, 1000))])


def test_a_processor_without_its_parts_is_refused(processors):
    recipe = Recipe(name="x", model="m", family="llava")
    with pytest.raises(RecipeError, match="has no tokenizer"):
        Collator(SimpleNamespace(), HOSTS["llava"], recipe)  # pyright: ignore[reportArgumentType]
    bare = copy.copy(processors["llava"])
    bare.image_processor = None
    with pytest.raises(RecipeError, match="has no image processor"):
        Collator(bare, HOSTS["llava"], recipe)
