"""Pretrains a nano host on rendered charts, without any structural bias.

    python -m sfa_adapters.recipes.nano.pretrain --host llava_onevision

The weights of `llava_onevision` that come with the package went through these three stages, but in several runs while
the stages below were being chosen: their settings changed in between, so the command makes weights like them, not the
same file. The last run was the `answer` stage below (from step 500 on, 55 minutes on two CPU cores with other work
on them, 20 to 30 pictures/s): 56.0% [50.3, 61.7] of the validation questions. Up to step 300 of that stage the text
model had rotary embeddings of base 10,000; with a base of 1,000,000 (`models.py`) it finds names among the image tokens
much sooner.

Three stages, each starting from the end of the last one (an interrupted run goes on from its newest checkpoint):

1. `pages`: pages full of text, cut out of charts. Only the tower is trained, to read (see `legible.py`).
2. `read`: charts as well. From each number the tower must predict its name and its series, from each name its number.
3. `answer`: the whole model answers packed questions about charts; reading remains as an auxiliary task.

The reading tasks are needed: on answers alone the same host learned nothing in 10,000 charts.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.recipes.nano.encode import EOS, IGNORE, encode_packed, pixel_values
from sfa_adapters.recipes.nano.evaluate import evaluate
from sfa_adapters.recipes.nano.models import HOSTS, PATCH, PIXELS, WIDTH, NanoHost, build_nano, weights_path
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, chart_samples
from sfa_adapters.recipes.synthetic.legible import Cuttings, ReadingHeads, mark_patches, reading_targets
from sfa_adapters.recipes.synthetic.questions import Question, pick_questions
from sfa_adapters.recipes.synthetic.rendering import Level, Shard, render_shard, shifted
from sfa_adapters.recipes.synthetic.tables import Table

Shards = Mapping[str, tuple[Level, int, int]]
SHARDS: Shards = {  # name -> level, charts, seed
    "easy-1": ("easy", 8_000, 1),
    "full-2": ("full", 16_000, 2),
    "full-4": ("full", 16_000, 4),
    "real-3": ("real", 6_000, 3),
}
SHIFT = 3  # pixels by which a training chart may be moved
VALIDATION = 300  # questions
READING = 0.5  # weight of the reading losses beside the answers
LOOKING, LOOKING_WEIGHT = 2, 0.5  # the text layer whose attention is supervised, and the weight of that loss


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum.

    Attributes:
        name: its name in the log.
        steps: optimizer steps.
        batch: pictures per step.
        pages: share of the steps that read pages instead of charts.
        shards: weight of each shard.
        questions: mean number of value, difference and largest questions per chart; None trains the tower alone.
        rate: learning rate after the warm-up and at the end (cosine in between).
    """

    name: str
    steps: int
    batch: int
    pages: float
    shards: dict[str, float]
    questions: tuple[float, float, float] | None
    rate: tuple[float, float]


STAGES = (
    Stage("pages", 1000, 16, 1.0, {"easy-1": 1}, None, (1e-3, 1e-3)),
    Stage("read", 6000, 32, 0.2, {"easy-1": 1, "full-2": 2, "full-4": 2}, None, (1e-3, 1e-3)),
    Stage("answer", 3200, 16, 0.0, {"easy-1": 1, "full-2": 3, "full-4": 3, "real-3": 2}, (4.0, 1.0, 1.2), (1e-3, 5e-5)),
)


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, None]:
    """Attention in fp32 under autocast: on a CPU the backward pass of bf16 attention is several times slower."""
    with torch.autocast("cpu", enabled=False):
        mask = None if attention_mask is None else attention_mask.float()
        out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask, scale=scaling)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


class Trainer:
    """Training of a nano host: model, reading heads, optimizer, data and checkpoint."""

    def __init__(self, host: NanoHost, data: Path, run: Path, seed: int = 0, shards: Shards = SHARDS) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register("exact_fp32", self._attend)
        self.host, self.run = host, run
        self.rng = np.random.default_rng(seed)
        self.heads = ReadingHeads(WIDTH)
        self.shards = {name: render_shard(data / name, *settings) for name, settings in shards.items()}
        first = next(iter(self.shards.values()))
        self.cuttings = Cuttings(first.images[:3000], first.texts[:3000])
        self.validation: list[ChartSample] = []
        parameters = [*host.model.parameters(), *self.heads.parameters()]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.stage, self.step = 0, 0
        self.seen: list[Tensor] = []  # the tower's patches in the newest forward
        self.looked: list[tuple[Tensor, Tensor]] = []  # queries and keys of the supervised layer
        core: Any = host.model.model
        self.looking: nn.Module = core.language_model.layers[LOOKING].self_attn
        if host.name == "internvl":
            core.vision_tower.register_forward_hook(lambda _m, _i, out: self.seen.append(out.last_hidden_state[:, 1:]))
        else:
            core.multi_modal_projector.register_forward_pre_hook(lambda _m, inputs: self.seen.append(inputs[0]))

    def save(self) -> None:
        """Writes the checkpoint; the progress file comes last and makes it valid."""
        from safetensors.torch import save_file

        self.run.mkdir(parents=True, exist_ok=True)
        tensors = {n: p.detach() for n, p in self.host.model.named_parameters()}
        tensors |= {f"reading.{n}": p.detach() for n, p in self.heads.named_parameters()}
        save_file(tensors, self.run / "model.part")
        torch.save(self.optimizer.state_dict(), self.run / "optimizer.part")
        (self.run / "model.part").replace(self.run / "model.safetensors")
        (self.run / "optimizer.part").replace(self.run / "optimizer.pt")
        (self.run / "progress.json").write_text(json.dumps({"stage": self.stage, "step": self.step}))

    def resume(self) -> None:
        """Loads the checkpoint in the run's folder, if there is one."""
        from safetensors.torch import load_file

        if not (self.run / "progress.json").is_file():
            return
        progress = json.loads((self.run / "progress.json").read_text())
        self.stage, self.step = progress["stage"], progress["step"]
        tensors = load_file(self.run / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.host.model.named_parameters():
                parameter.copy_(tensors[name])
            for name, parameter in self.heads.named_parameters():
                parameter.copy_(tensors[f"reading.{name}"])
        if (self.run / "optimizer.pt").is_file():  # a checkpoint that was passed on has weights only
            self.optimizer.load_state_dict(torch.load(self.run / "optimizer.pt", weights_only=True))
        self.rng = np.random.default_rng((self.stage, self.step))

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if module is self.looking and self.host.model.training:
            self.looked.append((query[:, :2] * (scaling or 1.0), key[:, :2, : self.host.image_tokens]))
        return exact_attention(query, key, value, attention_mask, scaling)

    def _looking_loss(self, labels: Tensor, wanted: Sequence[Sequence[np.ndarray]]) -> Tensor:
        """Supervises the attention of two heads of one layer: to the marks of the question, at the answer tokens.

        Args:
            labels: [B, L].
            wanted: for each picture and question, bool [2, image tokens], the target of each head.

        Returns:
            The mean negative logarithm of the attention to the target, among all image tokens.
        """
        query, key = self.looked[-1]
        with torch.autocast("cpu", enabled=False):
            picture, place = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
            ended = (labels[:, 1:] == EOS).cumsum(1)
            question = ended[picture, place] - (labels[picture, place + 1] == EOS).long()
            target = torch.from_numpy(
                np.stack([wanted[p][q] for p, q in zip(picture.tolist(), question.tolist(), strict=True)])
            )
            scores = torch.einsum("nhd,nhtd->nht", query[picture, :, place].float(), key[picture].float())
            scores = scores[..., : target.shape[-1]]
            there = scores.masked_fill(~target, -1e4).logsumexp(-1) - scores.logsumexp(-1)
            return -there[target.any(-1)].mean()

    def losses(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """One forward: losses of answers and of attention (0 in stages of the tower alone), and four of reading.

        Args:
            stage: the stage of the curriculum.
        """
        rng, images, records, shifts = self.rng, [], [], []
        pairs: list[list[tuple[str, str]]] = []
        wanted: list[list[np.ndarray]] = []
        page = rng.random() < stage.pages
        weights = np.array(list(stage.shards.values()), dtype=np.float64)
        names = rng.choice(list(stage.shards), stage.batch, p=weights / weights.sum())
        for name in names:
            if page:
                image, record = self.cuttings.page(rng, PIXELS)
                shift = (0, 0)
            else:
                shard: Shard = self.shards[name]
                i = int(rng.integers(len(shard)))
                shift = (int(rng.integers(-SHIFT, SHIFT + 1)), int(rng.integers(-SHIFT, SHIFT + 1)))
                image, record = shifted(np.asarray(shard.images[i]), *shift), shard.texts[i]
                if stage.questions is not None:
                    picked = pick_questions(shard.tables[i], stage.questions, rng)
                    pairs.append([(q.text, q.answer) for q in picked])
                    wanted.append([self._where(shard.tables[i], record, q, shift) for q in picked])
            images.append(image)
            records.append(record)
            shifts.append(shift)
        self.seen.clear()
        model: Any = self.host.model
        if pairs:
            batch = encode_packed(self.host, images, pairs)
            self.looked.clear()
            answer = model(**batch, use_cache=False).loss
            looking = self._looking_loss(batch["labels"], wanted)
        else:
            sizes = {"image_sizes": torch.full((stage.batch, 2), PIXELS)} if self.host.name == "llava_onevision" else {}
            model.model.get_image_features(pixel_values(images, PIXELS), **sizes)
            answer = looking = torch.zeros(())
        return answer, looking, self.heads(self.seen[0], reading_targets(records, shifts, PIXELS // PATCH, PATCH))

    def _where(self, table: Table, record: np.ndarray, question: Question, shift: tuple[int, int]) -> np.ndarray:
        """Targets of the two supervised heads for one question: bool [2, image tokens]."""
        side = PIXELS // PATCH
        places = []
        for mark in (question.marks[0], question.marks[-1]):
            number, name = mark_patches(table, record, mark, shift, side, PATCH)
            place = number | name if question.type == "largest" else number
            if self.host.name == "internvl":  # pixel shuffle: four patches become one token
                place = place.reshape(side // 2, 2, side // 2, 2).any((1, 3)).ravel()
            places.append(place)
        return np.stack(places)

    def train(self, every: int, stages: Sequence[Stage] = STAGES) -> None:
        """Runs the remaining stages.

        Args:
            every: steps between two checkpoints, each with a validation.
            stages: the stages of the curriculum.
        """
        from rich.progress import Progress

        model = self.host.model
        model.train()
        while self.stage < len(stages):
            stage = stages[self.stage]
            recent: list[list[float]] = []
            with Progress(transient=True) as bar:
                task = bar.add_task(stage.name, total=stage.steps, completed=self.step)
                began = time.perf_counter()
                while self.step < stage.steps:
                    high, low = stage.rate
                    rate = low + (high - low) * 0.5 * (1 + math.cos(math.pi * self.step / stage.steps))
                    for group in self.optimizer.param_groups:
                        group["lr"] = rate * min(1.0, (self.step + 1) / 100)
                    model.set_attn_implementation("exact_fp32")
                    with torch.autocast("cpu", torch.bfloat16):
                        answer, looking, reading = self.losses(stage)
                    self.optimizer.zero_grad()
                    loss = (
                        reading.sum()
                        if stage.questions is None
                        else answer + LOOKING_WEIGHT * looking + READING * reading.sum()
                    )
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_([*model.parameters(), *self.heads.parameters()], 1.0)
                    self.optimizer.step()
                    self.step += 1
                    bar.advance(task)
                    recent.append([answer.item(), looking.item(), *reading.tolist()])
                    if self.step % every == 0 or self.step == stage.steps:
                        per_second = len(recent) * stage.batch / (time.perf_counter() - began)
                        means = " ".join(f"{v:.3f}" for v in np.mean(recent, 0))
                        done = f"{time.strftime('%H:%M:%S')} {stage.name} {self.step}/{stage.steps}"
                        bar.console.print(
                            f"{done} {per_second:.0f} images/s; answer, looking, letters, text, partner, series "
                            f"{means}"
                            f"{self._validate(stage)}"
                        )
                        self.save()
                        recent, began = [], time.perf_counter()
            self.stage, self.step = self.stage + 1, 0
            self.save()

    def _validate(self, stage: Stage) -> str:
        if stage.questions is None:
            return ""
        self.host.model.set_attn_implementation("sdpa")
        self.validation = self.validation or chart_samples("val", VALIDATION)
        result = evaluate(self.host, self.validation)
        self.seen.clear()
        parts = [f"{name} {value.value:.3f}" for name, value in (result.by_type() | result.by_kind()).items()]
        return f"; validation {result.accuracy} ({', '.join(parts)})"


def ship(model: nn.Module, path: Path) -> str:
    """Stores the weights in fp16 and returns the sha256 of the file.

    Args:
        model: the trained model.
        path: the file to write.
    """
    from safetensors.torch import save_file

    save_file({n: p.detach().half().contiguous() for n, p in model.named_parameters()}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description="Pretrain a nano host on rendered charts.")
    parser.add_argument("--host", default="llava_onevision", choices=HOSTS)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where rendered charts are kept")
    parser.add_argument("--run", type=Path, help="where checkpoints are kept (runs/pretrain-HOST)")
    parser.add_argument("--out", type=Path, help="where the weights go (into the package)")
    parser.add_argument("--every", type=int, default=250, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    host = build_nano(options.host, options.seed)
    trainer = Trainer(host, options.data, options.run or Path(f"runs/pretrain-{options.host}"), options.seed)
    trainer.resume()
    trainer.train(options.every)
    out = options.out or weights_path(options.host)
    Console().print(f"{out}: sha256 {ship(host.model, out)}")


if __name__ == "__main__":
    main()
