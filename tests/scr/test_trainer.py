"""SCR on whole models: in a plain training loop and in a `transformers.Trainer`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sfa_adapters import SFAConfig, inject_sfa, observe
from sfa_adapters.adat import AdaptiveTokenizer, PatchPolicy, inject_adat
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import DataError, InjectionError, NoMatchingBackboneError, ObservationError
from sfa_adapters.readers import RowEntropy
from sfa_adapters.recipes.nano.encode import encode_packed
from sfa_adapters.recipes.nano.models import build_nano
from sfa_adapters.scr import SCRConfig, SCRLoss, SCRTrainerMixin
from sfa_adapters.scr.augment import change_pixels
from sfa_adapters.scr.targets import packed_evidence
from sfa_adapters.tower_search import find_tower
from tests.support.compare import assert_close, strong_config
from tests.support.hosts import HOSTS, HostCase

NAMES = ("llava", "llava_onevision", "internvl")  # one page; a page and one tile; four patches to a token
BY_NAME = {host.name: host for host in HOSTS}
OFF: dict[str, Any] = {"entropy": 0.0, "grounding": 0.0, "stability": 0.0}
BOXES = [[(0.0, 0.0, 28.0, 28.0)], [(28.0, 28.0, 56.0, 56.0)]]  # a quarter of a page of 56 px
every_host = pytest.mark.parametrize("name", NAMES)


def left_half(images: Tensor) -> Tensor:
    """A scorer: print on the left half of every page."""
    return torch.tensor([1.0, 0.0]).expand(len(images), 1, 2)


def config(**options: Any) -> SCRConfig:
    fixed: dict[str, Any] = {"scorer": left_half, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    return SCRConfig(**{**fixed, **options})


def batch_of(host: HostCase, seed: int = 0) -> dict[str, Any]:
    """Two samples with three answer tokens each, and pages that a processor could have made."""
    inputs = host.inputs(seed)
    inputs["pixel_values"] = inputs["pixel_values"].clamp(-1, 1)
    inputs["labels"] = torch.where(
        torch.arange(inputs["input_ids"].shape[1]) < inputs["input_ids"].shape[1] - 3, -100, 1
    )
    inputs["labels"] = torch.where(inputs["labels"] == -100, -100, inputs["input_ids"])
    return inputs


def set_checkpointing(model: Any, reentrant: bool | None) -> None:
    """On (or off, with None); transformers renamed the methods between the supported versions."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if reentrant is None:
        getattr(model, f"{prefix}_checkpointing_disable")()
    else:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": reentrant})


def penalty_of(model: nn.Module, settings: SCRConfig, inputs: dict[str, Any], **evidence: Any) -> Any:
    scr = SCRLoss(model, settings)
    with scr.watch():
        outputs = model(**inputs)
    return scr(outputs, inputs, **evidence)


def gradients_of(model: nn.Module, settings: SCRConfig, inputs: dict[str, Any], **evidence: Any) -> dict[str, Tensor]:
    model.zero_grad()
    penalty_of(model, settings, inputs, **evidence)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert first.keys() == second.keys()
    scale = max(value.abs().max().item() for value in second.values())
    assert scale > 1e-5, "nothing has a gradient"
    for name in first:
        assert (first[name] - second[name]).abs().max().item() <= tolerance * scale, name


# -- one's own loop ---------------------------------------------------------------------------------------------------


@every_host
def test_the_terms_of_a_host(name: str) -> None:
    host = BY_NAME[name]
    model, inputs = host.build(), batch_of(host)
    penalty, terms = penalty_of(model, config(entropy=1.0, grounding=2.0, stability=3.0), inputs, evidence_boxes=BOXES)
    assert penalty.item() == pytest.approx(terms["entropy"] + 2 * terms["grounding"] + 3 * terms["stability"])
    tiles = 4 if name == "llava_onevision" else 2
    assert (terms["entropy_used"], terms["entropy_rows"]) == (tiles, tiles * 8)  # the left half of 16 patches
    for term in ("grounding", "stability"):
        assert (terms[f"{term}_used"], terms[f"{term}_skipped"], terms[f"{term}_rows"]) == (2, 0, 6)
    assert 0 < terms["grounding_mass"] < 1
    assert 0 < terms["entropy_level"] < 1
    penalty.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert any("vision" in name for name in names)
    assert any("language" in name for name in names)


@every_host
def test_the_level_of_the_entropy_is_that_of_dense_patches(name: str) -> None:
    host = BY_NAME[name]
    model, inputs = host.build(), batch_of(host)
    terms = penalty_of(model, config(**{**OFF, "entropy": 1.0}), inputs)[1]
    reader = RowEntropy(normalize=True)
    with torch.no_grad(), observe(model, reader, modules="vision"):
        model(**inputs)
    located = find_tower(model)
    layer = located.attentions[located.used_layers - 1][0]
    patches = reader.results[layer][0][..., located.backbone.geometry(located.tower).prefix_tokens :]
    dense = patches[..., (torch.arange(16) % 4) < 2]
    assert terms["entropy_level"] == pytest.approx(dense.mean().item(), abs=1e-6)
    assert terms["entropy"] == pytest.approx((dense - dense.clamp(0.3, 0.7)).square().mean().item(), abs=1e-6)


@every_host
def test_stability_compares_answers_on_the_page_and_on_the_changed_page(name: str) -> None:
    host = BY_NAME[name]
    model, inputs = host.build(), batch_of(host)
    inputs["labels"][0, -2] = -100  # rows of different samples are not the same
    settings = config(**{**OFF, "stability": 1.0, "seed": 5})
    penalty, terms = penalty_of(model, settings, inputs)
    statistics = ((0.5,) * 3, (0.5,) * 3)
    changed = change_pixels(inputs["pixel_values"], statistics, settings, torch.Generator().manual_seed(5))
    first, second = (
        model(**{**inputs, "pixel_values": pixels}).logits.log_softmax(-1)
        for pixels in (inputs["pixel_values"], changed)
    )
    both = ((first.exp() - second.exp()) * (first - second)).sum(-1) / 2
    length = both.shape[1]
    expected = (both[0, [length - 4, length - 2]].mean() + both[1, length - 4 : length - 1].mean()) / 2
    assert terms["stability_rows"] == 5
    assert expected.item() > 1e-6
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-3)


@every_host
def test_evidence_means_the_tokens_under_the_boxes(name: str) -> None:
    """Boxes are the same as a mask over the tokens of the page, and of all tokens where there are no others."""
    host = BY_NAME[name]
    model, inputs = host.build(), batch_of(host)
    side = 2 if name == "internvl" else 4
    rows, columns = torch.arange(side * side) // side, torch.arange(side * side) % side
    mask = torch.stack(((rows < side // 2) & (columns < side // 2), (rows >= side // 2) & (columns >= side // 2)))
    settings = config(**{**OFF, "grounding": 1.0})
    by_boxes = penalty_of(model, settings, inputs, evidence_boxes=BOXES)[1]
    by_mask = penalty_of(model, settings, inputs, evidence_mask=mask)[1]
    per_label = torch.zeros(2, inputs["labels"].shape[1], side * side)
    per_label[:, -3:] = mask[:, None].float()
    by_label = penalty_of(model, settings, inputs, evidence_mask=per_label)[1]
    larger = penalty_of(model, settings, inputs, evidence_boxes=(torch.tensor(BOXES) * 2), page_sizes=[(112, 112)] * 2)[
        1
    ]
    assert by_boxes == by_mask == by_label == larger
    per_label[:, -3:-1] = 0  # evidence for the last label alone belongs to the query before it
    assert penalty_of(model, settings, inputs, evidence_mask=per_label)[1]["grounding_rows"] == 2
    by_density = penalty_of(model, settings, inputs)[1]
    assert by_density == penalty_of(model, settings, inputs, evidence_mask=(columns < side // 2).expand(2, -1))[1]
    assert by_density != by_boxes


def test_tiles_of_internvl_have_their_page_behind_them() -> None:
    host = BY_NAME["internvl"]
    model, inputs = host.build(), batch_of(host)
    ids = inputs["input_ids"]
    image = (ids[0] == 60).nonzero().flatten()
    extra = ids[:, image]
    for name, filler in (("input_ids", extra), ("attention_mask", torch.ones_like(extra)), ("labels", extra * 0 - 100)):
        inputs[name] = torch.cat((inputs[name][:, : image[0]], filler, inputs[name][:, image[0] :]), 1)
    inputs["pixel_values"] = torch.cat((inputs["pixel_values"],) * 2)
    last = torch.zeros(2, 8)
    last[:, 4] = 1
    on_page = penalty_of(model, config(**{**OFF, "grounding": 1.0}), inputs, evidence_boxes=[[(0, 0, 28, 28)]] * 2)[1]
    whole = penalty_of(model, config(**{**OFF, "grounding": 1.0}), inputs, evidence_mask=last)[1]
    assert on_page["grounding"] < whole["grounding"]  # of the page alone, its first token has a larger share
    assert penalty_of(model, config(**{**OFF, "grounding": 1.0}), inputs)[1]["grounding_used"] == 2


@every_host
@pytest.mark.parametrize("with_sfa", [False, True], ids=["plain", "sfa"])
def test_checkpointing_and_eager_attention_change_no_gradient(name: str, with_sfa: bool) -> None:
    host = BY_NAME[name]
    model: Any = host.build()
    if with_sfa:
        torch.manual_seed(3)
        inject_sfa(model, strong_config())
    inputs = batch_of(host)
    model.train()
    settings = config(entropy=1.0, grounding=1.0, stability=1.0, block_bytes=1000)
    plain = gradients_of(model, settings, inputs, evidence_boxes=BOXES)
    assert any(".sfa_" in name for name in plain) == with_sfa
    set_checkpointing(model, reentrant=False)
    assert_same(gradients_of(model, settings, inputs, evidence_boxes=BOXES), plain)
    set_checkpointing(model, None)
    model.set_attn_implementation("eager")
    assert_same(gradients_of(model, settings, inputs, evidence_boxes=BOXES), plain, 1e-4)


def test_the_watched_forward_is_the_unwatched_one() -> None:
    host = BY_NAME["llava_onevision"]
    model, inputs = host.build(), batch_of(host)
    scr = SCRLoss(model, config())
    with scr.watch():
        watched = model(**inputs)
    assert torch.equal(watched.logits, model(**inputs).logits)
    assert torch.equal(watched.loss, model(**inputs).loss)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
@pytest.mark.parametrize(
    ("options", "quantity", "direction"),
    [
        ({"entropy": 1.0, "entropy_band": (0.0, 0.6)}, "entropy_level", -1),
        ({"entropy": 1.0, "entropy_band": (0.99, 1.0)}, "entropy_level", 1),
        ({"grounding": 1.0}, "grounding_mass", 1),
        ({"grounding": 1.0, "grounding_kind": "mass"}, "grounding_mass", 1),
        ({"stability": 1.0}, "stability", -1),
    ],
    ids=["entropy down", "entropy up", "grounding", "grounding mass", "stability"],
)
def test_each_term_alone_moves_what_it_is_about(
    name: str, options: dict[str, Any], quantity: str, direction: int
) -> None:
    host = BY_NAME[name]
    model, inputs = host.build(), batch_of(host)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    settings = config(**{**OFF, **options})
    before = penalty_of(model, settings, inputs, evidence_boxes=BOXES)[1]
    for _ in range(12):
        optimizer.zero_grad()
        # The same changes at each step: the stability term then falls for certain.
        penalty_of(model, settings, inputs, evidence_boxes=BOXES)[0].backward()
        optimizer.step()
    after = penalty_of(model, settings, inputs, evidence_boxes=BOXES)[1]
    assert (after[quantity] - before[quantity]) * direction > 0.02 * before[quantity]
    assert after[next(iter(options))] < before[next(iter(options))]


def test_packed_questions_have_their_own_evidence() -> None:
    host = build_nano("llava_onevision")
    torch.manual_seed(0)
    pictures = [torch.randint(0, 256, (144, 144, 3)).to(torch.uint8).numpy() for _ in range(2)]
    questions = [[("What is the value of a?", "12"), ("What is the value of b?", "345")], [("?", "6")]]
    batch = encode_packed(host, pictures, questions)
    boxes = [[[(0, 0, 12, 12)], []], [[(132, 132, 144, 144)]]]
    evidence = packed_evidence(batch["labels"], boxes, (144, 144), (12, 12))
    settings = SCRConfig(stability=0, entropy=0, image_mean=(1,) * 3, image_std=(0.5,) * 3, language_layers=[-1])
    penalty, terms = penalty_of(host.model, settings, batch, evidence_mask=evidence)
    assert (terms["grounding_used"], terms["grounding_rows"]) == (2, 3 + 2)  # "12", "6" and their end tokens
    # The questions of a sample cannot see each other: alone they say the same.
    alone = encode_packed(host, pictures, [questions[0][:1], questions[1]])
    evidence = packed_evidence(alone["labels"], [boxes[0][:1], boxes[1]], (144, 144), (12, 12))
    assert_close(penalty, penalty_of(host.model, settings, alone, evidence_mask=evidence)[0], 1e-5)


def test_peft_wrappers_are_looked_through() -> None:
    host = BY_NAME["llava"]
    model, inputs = get_peft_model(host.build(), SFAConfig(init_std=0.5, terms=list(TERMS))), batch_of(host)  # pyright: ignore[reportArgumentType]
    grads = gradients_of(model, config(), inputs, evidence_boxes=BOXES)
    assert grads
    assert all(".sfa_" in name for name in grads)


# -- what cannot be measured ------------------------------------------------------------------------------------------


def test_samples_without_evidence_are_skipped_and_counted() -> None:
    host = BY_NAME["llava"]
    model, inputs = host.build(), batch_of(host)
    settings = config(**{**OFF, "grounding": 1.0})
    one = penalty_of(model, settings, inputs, evidence_boxes=[BOXES[0], []])[1]
    assert (one["grounding_used"], one["grounding_skipped"], one["grounding_rows"]) == (1, 1, 3)
    alone = {name: value[:1] for name, value in inputs.items()}
    assert one["grounding"] == pytest.approx(
        penalty_of(model, settings, alone, evidence_boxes=BOXES[:1])[1]["grounding"]
    )


@pytest.mark.parametrize("boxes", [[[], []], None], ids=["no boxes", "no density"])
def test_a_batch_of_which_nothing_can_be_said_gives_a_zero_that_can_be_differentiated(boxes: Any) -> None:
    host = BY_NAME["llava_onevision"]
    model, inputs = host.build(), batch_of(host)
    labels = inputs["labels"]
    blank = SCRLoss(model, config(scorer=lambda images: torch.zeros(len(images), 1, 1)))
    for no_answer in (False, True):
        inputs["labels"] = torch.full_like(labels, -100)
        with blank.watch():
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if not no_answer:
            inputs["labels"] = labels
        penalty, terms = blank(outputs, inputs, evidence_boxes=boxes)
        assert (terms["entropy"], terms["grounding"]) == (0, 0)
        assert (terms["entropy_skipped"], terms["grounding_skipped"]) == (4, 2)
        assert (terms["entropy_used"], terms["grounding_used"]) == (0, 0)
    assert (terms["stability"], terms["stability_used"], terms["stability_skipped"]) == (0, 0, 2)
    assert penalty.item() == 0
    penalty.backward()
    assert all(p.grad is None for p in model.parameters())


def test_text_only_samples_are_skipped_by_the_grounding_term() -> None:
    host = BY_NAME["llava"]
    model, inputs = host.build(), batch_of(host)
    inputs["input_ids"][1] = inputs["input_ids"][1].masked_fill(inputs["input_ids"][1] == 60, 5)
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    for evidence in ({"evidence_boxes": BOXES}, {}):
        parts = penalty_of(model, config(**{**OFF, "grounding": 1.0}), inputs, **evidence)[1]
        assert (parts["grounding_used"], parts["grounding_skipped"]) == (1, 1)


def test_evidence_behind_the_attention_mask_is_no_evidence() -> None:
    host = BY_NAME["llava"]
    model, inputs = host.build(), batch_of(host)
    first = int((inputs["input_ids"][0] == 60).nonzero()[0])
    inputs["attention_mask"][0, first] = 0
    mask = (torch.arange(16) == 0).expand(2, -1)
    parts = penalty_of(model, config(**{**OFF, "grounding": 1.0}), inputs, evidence_mask=mask)[1]
    assert (parts["grounding_used"], parts["grounding_skipped"], parts["grounding_rows"]) == (1, 1, 3)


def test_nan_weights_are_an_error_of_the_reader() -> None:
    host = BY_NAME["llava"]
    model, inputs = host.build(), batch_of(host)
    with torch.no_grad():
        model.get_submodule("model.language_model.layers.1.self_attn.q_proj").weight.fill_(float("nan"))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ObservationError, match=r"layers\.1\.self_attn"):
        penalty_of(model, config(), inputs, evidence_boxes=BOXES)


def test_misuse_is_named() -> None:
    host = BY_NAME["llava"]
    model, inputs = host.build(), batch_of(host)
    scr = SCRLoss(model, config())
    outputs = model(**inputs)
    with pytest.raises(ObservationError, match="No forward was watched"):
        scr(outputs, inputs)
    with pytest.raises(ObservationError, match="twice"), scr.watch():
        assert model(**inputs).logits is not model(**inputs).logits
    with pytest.raises(ObservationError, match="never ran"), scr.watch():
        pass
    for evidence, message in (
        ({"evidence_boxes": BOXES[:1]}, "evidence_boxes has 1 entries for 2 samples"),
        ({"evidence_boxes": [BOXES[0], [(3, 0, 1, 1)]]}, r"Sample 1: boxes\[0\]"),
        ({"evidence_mask": torch.ones(2, 5)}, r"evidence_mask \(2, 5\)"),
        ({"evidence_mask": torch.full((2, 16), -1.0)}, "below 0"),
        ({"evidence_mask": torch.ones(2, 16), "evidence_boxes": BOXES}, "not both"),
    ):
        with pytest.raises(DataError, match=message):
            penalty_of(model, config(), inputs, **evidence)
    with pytest.raises(DataError, match="'labels'"):
        penalty_of(model, config(), {k: v for k, v in inputs.items() if k != "labels"})
    with pytest.raises(InjectionError, match=r"vision_layers=\[2\]: there is no layer 2, the model has 2"):
        SCRLoss(model, config(vision_layers=[2]))  # the third layer is one that LLaVA never reads
    with pytest.raises(InjectionError, match="image_token_id"):
        SCRLoss(nn.Linear(2, 2), config())
    with pytest.raises(ObservationError, match="no fixed grid"):
        SCRLoss(BY_NAME["qwen2_5_vl"].build(), config())


def test_reentrant_checkpointing_is_refused() -> None:
    host = BY_NAME["llava"]
    model: Any = host.build()
    model.train()
    set_checkpointing(model, reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(ObservationError, match="use_reentrant"):
        penalty_of(model, config(), batch_of(host))


def test_adaptive_tokens_are_refused_by_the_entropy_term() -> None:
    host = BY_NAME["llava"]
    model, inputs = host.build(), batch_of(host)
    policy = PatchPolicy(levels=[(0.5, 7), (0.0, 28)], scorer=left_half)
    inject_adat(model, AdaptiveTokenizer(policy=policy, image_mean=(0.5,) * 3, image_std=(0.5,) * 3))
    with pytest.raises(ObservationError, match="adaptive"):
        penalty_of(model, config(**{**OFF, "entropy": 1.0}), inputs)


def test_a_term_behind_frozen_layers_warns_once() -> None:
    host = BY_NAME["llava"]
    model, inputs = host.build(), batch_of(host)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language" in name)
    scr = SCRLoss(model, config(**{**OFF, "entropy": 1.0}))
    for again in (False, True):
        with scr.watch():
            outputs = model(**inputs)
        if again:
            scr(outputs, inputs)
        else:
            with pytest.warns(UserWarning, match="entropy term has no gradient"):
                scr(outputs, inputs)
    with torch.no_grad(), scr.watch():
        outputs = model(**inputs)
    with torch.no_grad():
        assert not scr(outputs, inputs)[0].requires_grad


# -- Trainer ----------------------------------------------------------------------------------------------------------


class SCRTrainer(SCRTrainerMixin, Trainer):
    """What a user writes."""


HOST = BY_NAME["llava_onevision"]


def samples(count: int) -> list[dict[str, Any]]:
    """Single samples; each has boxes."""
    rows = []
    for seed in range(count):
        batch = batch_of(HOST, seed)
        sample = {name: value[seed % 2] for name, value in batch.items()}
        rows.append({**sample, "evidence_boxes": BOXES[seed % 2]})
    return rows


def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {k: torch.stack([f[k] for f in features]) for k in features[0] if k != "evidence_boxes"}
    boxes = [f["evidence_boxes"] for f in features if "evidence_boxes" in f]
    return {**made, "evidence_boxes": boxes} if boxes else made


def trained(
    kind: type[Trainer], folder: Path, data: list[dict[str, Any]], given: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "optim": "sgd"}
    fixed: dict[str, Any] = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0}
    arguments = TrainingArguments(str(folder), **{**defaults, **fixed, "learning_rate": 1e-2, **options})
    trainer = kind(
        model=HOST.build(),  # pyright: ignore[reportArgumentType]
        args=arguments,
        train_dataset=data,  # pyright: ignore[reportArgumentType]
        eval_dataset=data,  # pyright: ignore[reportArgumentType]
        data_collator=collate,
        **(given or {}),
    )
    trainer.train()
    return trainer, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}  # pyright: ignore[reportOptionalMemberAccess]


def without_boxes(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in sample.items() if k != "evidence_boxes"} for sample in data]


def test_weights_of_zero_train_bit_for_bit_as_a_plain_trainer(tmp_path: Path) -> None:
    _, plain = trained(Trainer, tmp_path, without_boxes(samples(4)))
    _, ours = trained(SCRTrainer, tmp_path, samples(4), {"scr_config": config(**OFF)})
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    _, moved = trained(SCRTrainer, tmp_path, samples(4), {"scr_config": config(grounding=1.0)})
    assert any(not torch.equal(plain[name], moved[name]) for name in plain)


def test_terms_are_logged_and_evaluation_is_plain(tmp_path: Path) -> None:
    settings = config(entropy=1.0, grounding=1.0, stability=1.0, warmup_steps=2)
    names = ("activation_checkpointing", "gradient_checkpointing")
    checkpointing = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    options = {"logging_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2, checkpointing: True}
    trainer, _ = trained(SCRTrainer, tmp_path, samples(4), {"scr_config": settings}, **options)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        assert all(entry[f"scr/{term}"] > 0 for term in ("entropy", "grounding", "stability"))
        assert (entry["scr/grounding_used"], entry["scr/grounding_skipped"]) == (2, 0)
        assert 0 < entry["scr/grounding_mass"] < 1
        assert 0 < entry["scr/entropy_level"] < 1
    metrics = trainer.evaluate()
    assert not any(name.startswith("scr/") for name in metrics)
    plain = Trainer(
        model=trainer.model,
        args=trainer.args,
        eval_dataset=without_boxes(samples(4)),  # pyright: ignore[reportArgumentType]
        data_collator=collate,
    )
    assert metrics["eval_loss"] == plain.evaluate()["eval_loss"]
    trainer.label_names = ["absent"]
    seen: set[str] = set()
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    # A batch without labels goes to the model directly. The outputs of the tower, which newer hosts return, hold None,
    # and any Trainer fails to gather it.
    trainer.predict(samples(2), ignore_keys=["image_outputs"])
    assert "pixel_values" in seen
    assert "evidence_boxes" not in seen


def test_the_training_loss_is_the_plain_one_plus_the_warmed_up_terms(tmp_path: Path) -> None:
    settings = config(**{**OFF, "grounding": 2.0, "warmup_steps": 3})
    data = samples(2)
    data[1]["evidence_boxes"] = []
    trainer, _ = trained(SCRTrainer, tmp_path, data, {"scr_config": settings}, max_steps=1)
    plain, _ = trained(Trainer, tmp_path, without_boxes(samples(2)), max_steps=1)
    with_terms, without = (t.state.log_history[0] for t in (trainer, plain))
    assert (with_terms["scr/grounding_used"], with_terms["scr/grounding_skipped"]) == (1, 1)
    assert with_terms["loss"] == pytest.approx(without["loss"] + 2 * with_terms["scr/grounding"] / 4, rel=1e-4)


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    settings = {"scr_config": config(entropy=5.0, grounding=5.0, stability=0)}
    data = samples(2)
    _, whole = trained(SCRTrainer, tmp_path, data, settings, max_steps=1)
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    _, parts = trained(SCRTrainer, tmp_path, data, settings, max_steps=1, **small)
    start = dict(HOST.build().named_parameters())
    assert_same({n: parts[n] - start[n] for n in start}, {n: whole[n] - start[n] for n in start}, 1e-4)


def test_evidence_masks_are_columns_too_and_labels_may_be_smoothed(tmp_path: Path) -> None:
    data = [
        {**sample, "evidence_mask": (torch.arange(16) < 4).float()}
        for sample in without_boxes(copy.deepcopy(samples(2)))
    ]
    settings = {"scr_config": config(**{**OFF, "grounding": 1.0})}
    trainer, _ = trained(SCRTrainer, tmp_path, data, settings, label_smoothing_factor=0.1, max_steps=1)
    assert trainer.state.log_history[0]["scr/grounding_used"] == 2


def test_a_model_without_a_known_tower_says_so() -> None:
    host = BY_NAME["llava"]
    model: Any = host.build()
    model.model.vision_tower = nn.Identity()
    with pytest.raises(NoMatchingBackboneError):
        SCRLoss(model, config())
    SCRLoss(model, config(entropy=0))  # grounding from a mask needs no tower
