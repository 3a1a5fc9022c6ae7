"""Real servers of vLLM on a CPU, asked by a real client: `scripts/test-serving`, in an environment of its own.

Answers are greedy, in fp32: equal to those of transformers with the same adapter, token by token. Where two tokens are
nearly level, two programs may choose differently; such answers are compared up to there.
"""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from benchmarks.engine_server import Server, ask, page, reference_answers
from sfa_adapters.recipes.nano.served import write_served
from sfa_adapters.serving.kept_groups import written_page

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-serving")
pytestmark = [pytest.mark.serving, pytest.mark.timeout(3000)]

FAMILIES = ("internvl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
LEVEL = 1e-3  # logits
IMAGES = 10


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[str, tuple[Path, Path]] = {}

    def write(family: str) -> tuple[Path, Path]:
        if family not in done:
            done[family] = write_served(family, tmp_path_factory.mktemp(family))
        return done[family]

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(family: str, written: Any, tmp_path: Path) -> None:
    host, adapter = written(family)
    from openai import APIConnectionError, BadRequestError  # pyright: ignore[reportMissingImports]

    images = [page(seed) for seed in range(IMAGES)]
    expected = reference_answers(host, adapter, images)
    plain = reference_answers(host, None, images)
    # The option lets a request ask for images of other sizes.
    with Server(host, tmp_path / "log", adapter, ("--trust-request-mm-kwargs",)) as server:
        assert server.ready(), server.text()[-3000:]
        assert re.search(r"acts in (\d) of \1 layers", server.text())
        answers = [ask(server.client(), image) for image in images]
        if family == "qwen2_5_vl":
            large = {"size": {"shortest_edge": 56**2, "longest_edge": 2000**2}}
            with pytest.raises(BadRequestError, match="1024"):  # one line, and the server lives on
                ask(server.client(), page(0, 1600, 1200), mm_processor_kwargs=large)
            assert ask(server.client(), images[0]) == answers[0]
        if family == "internvl":
            server.kill()
            with pytest.raises(APIConnectionError):
                ask(server.client(), images[0])
    for answer, (tokens, lead) in zip(answers, expected, strict=True):
        assert answer == tokens or lead < LEVEL
    assert sum(answer == tokens for answer, (tokens, _) in zip(answers, expected, strict=True)) >= IMAGES - 1
    assert sum(answer == tokens for answer, (tokens, _) in zip(answers, plain, strict=True)) < IMAGES / 2
    if family == "internvl":
        with Server(host, tmp_path / "again", adapter) as server:
            assert server.ready(), server.text()[-3000:]
            assert [ask(server.client(), image) for image in images[:3]] == answers[:3]


def test_two_processes_share_the_heads(written: Any, tmp_path: Path) -> None:
    """Tensor parallelism: each process has the scalars of its heads, and its self-check says so."""
    host, adapter = written("qwen2_5_vl")
    images = [page(seed) for seed in range(IMAGES)]
    expected = reference_answers(host, adapter, images)
    plain = reference_answers(host, None, images)
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with Server(host, tmp_path / "log", adapter, ("--tensor-parallel-size", "2"), cores) as server:
        assert server.ready(), server.text()[-3000:]
        assert len(re.findall(r"acts in 3 of 3 layers", server.text())) == 2
        answers = [ask(server.client(), image) for image in images]
    for answer, (tokens, lead) in zip(answers, expected, strict=True):
        assert answer == tokens or lead < LEVEL
    assert sum(answer == tokens for answer, (tokens, _) in zip(answers, expected, strict=True)) >= IMAGES - 1
    assert sum(answer == tokens for answer, (tokens, _) in zip(answers, plain, strict=True)) < IMAGES / 2


def test_fewer_image_tokens(written: Any, tmp_path: Path) -> None:
    host, adapter = written("qwen2_5_vl")
    images = [page(seed) for seed in range(IMAGES)]
    expected = reference_answers(host, adapter, images, fewer_tokens=0.5)
    whole = reference_answers(host, adapter, images)
    with Server(host, tmp_path / "log", adapter, environment={"SFA_IMAGE_TOKENS": "0.5"}) as server:
        assert server.ready(), server.text()[-3000:]
        answers = [ask(server.client(), image) for image in images]
        assert "gets 12 of 24 tokens of the first image" in server.text()
    for answer, (tokens, lead) in zip(answers, expected, strict=True):
        assert answer == tokens or lead < LEVEL
    assert sum(answer == tokens for answer, (tokens, _) in zip(answers, expected, strict=True)) >= IMAGES - 1
    assert sum(answer == tokens for answer, (tokens, _) in zip(answers, whole, strict=True)) < IMAGES / 2


def _half_written(seed: int) -> Image.Image:
    """Letters on coloured boxes in two of six columns of groups, white paper in the others."""
    boxes, letters = np.array(page(seed, 168, 112)), np.array(written_page(168, 112))
    sheet = Image.fromarray(np.minimum(boxes, letters))
    left = 56 * (seed % 2)
    ImageDraw.Draw(sheet).rectangle((left, 0, left + 111, 112), fill="white")
    return sheet


@pytest.mark.parametrize("rule", ["blank", "duplicates"])
def test_groups_left_out_before_the_tower(rule: str, written: Any, tmp_path: Path) -> None:
    """With the bias: the answers are those of transformers, and others than of whole pages, or without the bias."""
    host, adapter = written("qwen2_5_vl")
    folder = shutil.copytree(host, tmp_path / "host")
    settings = json.loads((folder / "processor_config.json").read_text())
    # `drop_blank_groups` reads pixels as the processor of the whole model normalises them.
    settings["image_processor"].update(image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    images = [_half_written(seed) for seed in range(IMAGES)]
    expected = reference_answers(folder, adapter, images, left_out=rule)
    whole = reference_answers(folder, adapter, images)
    plain = reference_answers(folder, None, images, left_out=rule)
    with Server(folder, tmp_path / "log", adapter, environment={"SFA_IMAGE_TOKENS": rule}) as server:
        assert server.ready(), server.text()[-3000:]
        client = server.client()
        with ThreadPoolExecutor(5) as pool:  # so that the tower gets several pages at once
            answers = list(pool.map(lambda image: ask(client, image), images))
        text = server.text()
    assert re.search(r"gets \d+ of 24 tokens of the first image", text), text[-3000:]
    for answer, (tokens, lead) in zip(answers, expected, strict=True):
        assert answer == tokens or lead < LEVEL
    assert sum(answer == tokens for answer, (tokens, _) in zip(answers, expected, strict=True)) >= IMAGES - 1
    for others in (whole, plain):
        assert sum(answer == tokens for answer, (tokens, _) in zip(answers, others, strict=True)) < IMAGES / 2


def test_positions_of_two_images_have_the_gaps_of_the_whole_prompt(written: Any) -> None:
    """vLLM's own function on the shortened prompt, against transformers' on the whole one."""
    import torch
    from vllm.model_executor.models.qwen2_5_vl import (  # pyright: ignore[reportMissingImports]
        Qwen2_5_VLForConditionalGeneration,
    )
    from vllm.multimodal.inputs import (  # pyright: ignore[reportMissingImports]
        MultiModalFeatureSpec,
        PlaceholderRange,
    )

    from sfa_adapters.serving.adapter import model_without_weights
    from sfa_adapters.serving.image_tokens import KEPT, kept_positions

    host = model_without_weights(str(written("qwen2_5_vl")[0]), None)
    image, grids = host.config.image_token_id, torch.tensor([[1, 4, 6], [1, 8, 4]])
    counts = [int(grid.prod()) // 4 for grid in grids]
    whole = torch.tensor([[5, 6, *[image] * counts[0], 7, *[image] * counts[1], 8, 9]])
    expected, delta = host.model.get_rope_index(
        whole, (whole == image).int(), image_grid_thw=grids, attention_mask=torch.ones_like(whole)
    )
    kept = [torch.arange(counts[0]) % 3 == 1, torch.arange(counts[1]) % 2 == 0]
    tokens, features = [5, 6], []
    for grid, keep, after in zip(grids, kept, ([7], [8, 9]), strict=True):
        data: Any = {KEPT: SimpleNamespace(data=keep), "image_grid_thw": SimpleNamespace(data=grid)}
        place = PlaceholderRange(offset=len(tokens), length=int(keep.sum()))
        features.append(MultiModalFeatureSpec(data=data, modality="image", identifier="", mm_position=place))
        tokens += [image] * int(keep.sum()) + after
    model = Qwen2_5_VLForConditionalGeneration.__new__(Qwen2_5_VLForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.config = host.config
    positions, ahead = kept_positions(model.get_mrope_input_positions, tokens, features)
    one = torch.ones(1, dtype=torch.bool)
    stays = torch.cat([one, one, kept[0], one, kept[1], one, one])
    assert torch.equal(positions, expected[:, 0, stays])
    assert ahead + len(tokens) == int(delta) + whole.shape[1] == int(positions.max()) + 1


def test_fewer_image_tokens_where_a_model_cannot(written: Any, tmp_path: Path) -> None:
    host, _ = written("internvl")
    with Server(host, tmp_path / "log", environment={"SFA_IMAGE_TOKENS": "0.5"}) as server:
        assert "the model is a InternVLForConditionalGeneration" in _refusal(server, "leave out image tokens")


def _refusal(server: Server, what: str = "serve the adapter") -> str:
    """The line with which a server that does not start says why."""
    assert not server.ready()
    assert server.process is not None
    assert server.process.returncode != 0
    lines = [line for line in server.text().splitlines() if f"sfa-adapters cannot {what}" in line]
    assert lines, server.text()[-3000:]
    return lines[0]


def test_an_adapter_of_another_tower(written: Any, tmp_path: Path) -> None:
    host, _ = written("qwen2_5_vl")
    _, other = written("llava_onevision")
    with Server(host, tmp_path / "log", other) as server:
        assert "does not fit" in _refusal(server)


def test_an_adapter_that_does_nothing(written: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    host, adapter = written("internvl")
    zero = tmp_path / "zero"
    shutil.copytree(adapter, zero)
    tensors = load_file(zero / "adapter_model.safetensors")
    save_file({k: v * 0 for k, v in tensors.items()}, zero / "adapter_model.safetensors", {"format": "pt"})
    with Server(host, tmp_path / "log", zero) as server:
        assert "changes nothing" in _refusal(server)


def test_a_tower_without_layers_of_the_engine(written: Any, tmp_path: Path) -> None:
    host, adapter = written("llava_onevision")
    with Server(host, tmp_path / "log", adapter, ("--model-impl", "transformers")) as server:
        if server.ready():  # nothing ran yet
            from openai import OpenAIError  # pyright: ignore[reportMissingImports]

            with pytest.raises(OpenAIError):
                ask(server.client(), page(0))
        assert "has no MMEncoderAttention layer" in server.text()


def test_a_wrong_folder_in_the_environment(written: Any, tmp_path: Path) -> None:
    host, _ = written("internvl")
    with Server(host, tmp_path / "log", environment={"SFA_ADAPTER": str(tmp_path / "nowhere")}) as server:
        assert not server.ready()
        last = server.text().strip().splitlines()[-1]
        assert "ServingError" in last
        assert "nowhere is no folder" in last
