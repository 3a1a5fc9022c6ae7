"""`sfa density train`: trains the density estimator on real pages, on rendered pages, or on folders of images.

    sfa density train --out runs/density

made the weights of the package: 3,000 rendered pages, true boxes as labels, and 2,000 steps (13 minutes)
on two busy CPU cores; validation loss 0.002329, the mean squared error over 200 pages of other seeds.

    sfa density pages --out real-pages
    sfa density train --real real-pages --batch 24 --steps 4000 --out runs/real

trains on crops of real pages instead.

Training is a pure function of the options: step k draws its pages from the seed (seed, k), so a run that was killed
goes on from its newest checkpoint to the same weights, bit for bit, on the same machine with the same threads.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.adat.density import STRIDE, DensityEstimator
from sfa_adapters.errors import WeightsError
from sfa_adapters.recipes.density.labelled_pages import GRID, PageSet, image_folder, rendered
from sfa_adapters.recipes.density.options import TrainConfig

__all__ = ["TrainConfig", "Trained", "train_density", "validate"]

Batch = tuple[Tensor, Tensor, Tensor]  # pictures, densities, and how much each cell counts

CROP = 16  # cells along a side; about a third of a page, so that a batch has many pages


@dataclass
class Trained:
    """Result of a run: the best weights, their validation loss (mean squared error), and all validations."""

    path: Path
    loss: float
    history: list[tuple[int, float]] = field(default_factory=list)


def _batch(pages: PageSet, config: TrainConfig, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops along cell borders with random augmentations: float `[B, 3, 256, 256]`, twice `[B, 16, 16]`."""
    rng = np.random.default_rng((config.seed, step))
    pictures, targets = [], []
    for i in rng.integers(0, len(pages), config.batch):
        y, x = rng.integers(0, GRID[0] - CROP + 1, 2)
        area = np.s_[y * STRIDE : (y + CROP) * STRIDE, x * STRIDE : (x + CROP) * STRIDE]
        picture = np.asarray(pages.images[i][area], dtype=np.float32) / 255
        target = pages.labels[i][y : y + CROP, x : x + CROP]
        if rng.random() < 0.5:
            picture, target = picture[:, ::-1], target[:, ::-1]
        if rng.random() < 0.5:
            picture, target = picture[::-1], target[::-1]
        if rng.random() < 0.1:
            picture = 1 - picture
        if rng.random() < 0.2:
            picture = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
        if rng.random() < 0.3:
            picture = np.clip((picture - 0.5) * rng.uniform(0.6, 1.2) + 0.5 + rng.uniform(-0.15, 0.15), 0, 1)
        pictures.append(picture.transpose(2, 0, 1))
        targets.append(target)
    target = torch.from_numpy(np.stack(targets).astype(np.float32))
    return torch.from_numpy(np.stack(pictures).astype(np.float32)), target, torch.ones_like(target)


@torch.no_grad()
def validate(model: DensityEstimator, pages: PageSet) -> float:
    """Mean squared error over whole pages.

    Args:
        model: The estimator; it keeps its mode.
        pages: Pages with labels.
    """
    training = model.training
    model.eval()
    total = 0.0
    for i in range(0, len(pages), 8):
        images = torch.from_numpy(np.array(pages.images[i : i + 8])).permute(0, 3, 1, 2).float() / 255
        target = torch.from_numpy(np.array(pages.labels[i : i + 8], dtype=np.float32))
        total += float(F.mse_loss(model.logits(images).sigmoid(), target, reduction="sum"))
    model.train(training)
    return total / pages.labels.size


def _data(config: TrainConfig, step: int) -> tuple[Iterator[Batch], Callable[[DensityEstimator], float]]:
    """The batches from `step` on, and the validation."""
    if config.real is not None:
        from torch.utils.data import DataLoader

        from sfa_adapters.recipes.density.batches import CropBatches
        from sfa_adapters.recipes.density.checks import RealCheck

        crops = CropBatches(config.real, config.batch, config.seed, config.figures)
        # One process draws crops while the other core trains.
        loader = DataLoader(crops, batch_size=None, sampler=range(step, config.steps), num_workers=1, prefetch_factor=8)  # pyright: ignore[reportArgumentType]
        return iter(loader), RealCheck(config.real)
    if config.images:
        pages, held = image_folder(config.images, "ocr" if config.label_source == "ocr" else "edges", config.out)
    else:
        pages = rendered(config.out / "train", "train", config.pages, config.label_source, config.workers)
        held = rendered(config.out / "val", "val", max(1, config.pages // 15), config.label_source, config.workers)
    return (_batch(pages, config, k) for k in range(step, config.steps)), lambda model: validate(model, held)


def _fingerprint(config: TrainConfig) -> dict[str, object]:
    """The options that the weights depend on."""
    kept = {k: v for k, v in asdict(config).items() if k not in ("out", "every", "workers")}
    kept["labels"] = config.label_source
    return json.loads(json.dumps(kept, default=str))


def _tensors(model: DensityEstimator) -> dict[str, Tensor]:
    """The weights as contiguous tensors for safetensors; in training they are stored channels last."""
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _save(
    config: TrainConfig, model: DensityEstimator, optimizer: torch.optim.Optimizer, state: dict[str, object]
) -> None:
    """Writes a checkpoint beside the last one; `progress.json`, replaced in one step, names the valid one."""
    from safetensors.torch import save_file

    folder = config.out / f"step-{state['step']:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(model), folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    part = config.out / "progress.part"
    part.write_text(json.dumps({**state, "options": _fingerprint(config)}))
    part.replace(config.out / "progress.json")
    for old in config.out.glob("step-*"):
        if old != folder:
            shutil.rmtree(old)


def _resume(
    config: TrainConfig, model: DensityEstimator, optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[tuple[int, float]]]:
    """Loads the newest checkpoint, where there is one: the step, the best loss and all losses so far."""
    from safetensors.torch import load_file

    progress = config.out / "progress.json"
    if not progress.is_file():
        return 0, math.inf, []
    state = json.loads(progress.read_text())
    changed = [k for k, v in _fingerprint(config).items() if state["options"].get(k) != v]
    if changed:
        raise WeightsError(
            f"{config.out} holds a run with other options ({', '.join(changed)}). Use another --out, or delete it."
        )
    folder = config.out / f"step-{state['step']:06d}"
    model.load_state_dict(load_file(folder / "model.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return state["step"], state["best"], [(step, loss) for step, loss in state["history"]]


def train_density(config: TrainConfig) -> Trained:
    """Trains, or resumes training, and keeps the weights with the lowest validation loss.

    Args:
        config: options.

    Returns:
        The best weights and the validation losses.

    Raises:
        DataError: no usable images.
        WeightsError: `config.out` holds a run with other options.
    """
    from rich.progress import Progress
    from safetensors.torch import save_file

    torch.manual_seed(config.seed)
    model = DensityEstimator()
    if config.start is not None:
        model.load_state_dict(DensityEstimator.pretrained(config.start).state_dict())
    model = model.to(memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.rate)
    step, best, history = _resume(config, model, optimizer)
    config.out.mkdir(parents=True, exist_ok=True)
    batches, check = _data(config, step)
    model.train()
    with Progress(transient=True) as bar:
        task = bar.add_task("training", total=config.steps, completed=step)
        while step < config.steps:
            share = step / config.steps
            for group in optimizer.param_groups:
                group["lr"] = config.rate * min(1.0, (step + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * share))
            images, target, weight = next(batches)
            # Not in bf16: processors without instructions for it take five times as long.
            logits = model.logits(images)
            loss = F.binary_cross_entropy_with_logits(logits, target, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            bar.advance(task)
            if step % config.every == 0 or step == config.steps:
                validation = check(model)
                history.append((step, validation))
                if validation < best:
                    best = validation
                    save_file(_tensors(model), config.out / "best.part")
                    (config.out / "best.part").replace(config.out / "best.safetensors")
                _save(config, model, optimizer, {"step": step, "best": best, "history": history})
                bar.console.print(f"step {step}/{config.steps}: validation loss {validation:.6f}, best {best:.6f}")
    return Trained(config.out / "best.safetensors", best, history)
