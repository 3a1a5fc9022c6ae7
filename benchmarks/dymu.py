"""DyMU: time and memory of a merging tower, and accuracy of the nano host with it. Nothing is trained.

    python -m benchmarks.dymu                            # 5 minutes on 2 idle cores

Time: a CLIP-L/336 tower with random weights, cut to six layers, fp32, two rendered pages; thresholds calibrated on
these pages. Accuracy: the pretrained nano host (LLaVA-OneVision, 144 patches) on charts of unseen tables; thresholds
calibrated on charts of training tables. `tower only` leaves the language model as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.common import compare, write_result
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.evaluate import evaluate, paired_difference
from sfa_adapters.recipes.nano.models import load_nano
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples
from sfa_adapters.recipes.synthetic.pages import text_page
from sfa_adapters.reduction.dymu.calibrate import calibrate_dymu
from sfa_adapters.reduction.dymu.config import DyMUConfig
from sfa_adapters.reduction.dymu.inject import dymu_state, eject_dymu, inject_dymu

LAYERS = 6


def main() -> None:
    """Measures, prints and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--charts", type=int, default=200)
    args = parser.parse_args()
    body = [*time_table(args.rounds), "", *accuracy_table(args.charts)]
    console = Console()
    console.print("\n".join(body), markup=False)
    command = f"python -m benchmarks.dymu {' '.join(sys.argv[1:])}".strip()
    console.print(f"written: {write_result('dymu', torch.device('cpu'), command, body)}")


def pages(count: int, side: int) -> Tensor:
    """Rendered pages, `[count, 3, side, side]` in -1..1."""
    drawn = [torch.from_numpy(text_page(12, seed).image).permute(2, 0, 1)[None].float() for seed in range(count)]
    small = [torch.nn.functional.interpolate(page, (side, side), mode="area") for page in drawn]
    return torch.cat(small) / 127.5 - 1


def time_table(rounds: int) -> list[str]:
    """Time and memory of the tower, with and without merging."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=LAYERS, image_size=336,
        patch_size=14,
    )  # fmt: skip
    tower, images = CLIPVisionModel(config).eval(), pages(2, 336)

    def candidate(thresholds: DyMUConfig | None) -> Callable[[], object]:
        clip_tower = CLIPVisionModel(config).eval()
        clip_tower.load_state_dict(tower.state_dict())
        if thresholds is not None:
            inject_dymu(clip_tower, thresholds)

        def run() -> None:
            with torch.no_grad():
                clip_tower(images)

        return run

    candidates = {"plain": candidate(None), "nothing merges": candidate(DyMUConfig(thresholds=0.99999))}
    for keep in (0.5, 0.25):
        candidates[f"{keep:.0%} behind the last layer"] = candidate(calibrate_dymu(tower, [images], keep=keep))
    rows = compare(candidates, rounds, torch.device("cpu"), "tower")
    head = ["| tower | ms | ratio | quartiles | peak MB |", "|---|---|---|---|---|"]
    return [*head, *(row.markdown() for row in rows)]


def accuracy_table(charts: int) -> list[str]:
    """Relaxed accuracy of the nano host, by tokens left and by what the language model does with them."""
    host = load_nano()
    samples = chart_samples("test", charts)
    training = chart_samples("train", 128, seed=1)
    batches = [encode(host, [s.image for s in part], [s.question for s in part]) for part in (training,)]
    arms: list[tuple[float, str]] = [(keep, "logical_rope") for keep in (0.85, 0.7, 0.5, 0.3)]
    arms += [(keep, "vtu") for keep in (0.7, 0.5, 0.3)] + [(0.5, "off")]
    plain = evaluate(host, samples)
    rows = [
        "| tokens left | language model | relaxed accuracy % | minus the untouched host |", "|---|---|---|---|",
        f"| 144.0 | untouched | {100 * plain.accuracy.value:.1f} | |",
    ]  # fmt: skip
    for keep, language in track(arms, description="accuracy", transient=True):
        config = calibrate_dymu(host.model, batches, keep=keep, config=DyMUConfig(language=language))  # pyright: ignore[reportArgumentType]
        inject_dymu(host.model, config)
        counted: list[int] = []

        def count(*_: object, counted: list[int] = counted) -> None:
            tokens = dymu_state(host.model).tokens
            if tokens is not None and tokens.history:
                final = tokens.history[-1]
                counted.extend(tokens.lengths if final is None else final.lengths)

        handle = host.model.get_submodule("model.vision_tower").register_forward_hook(count)
        evaluation = evaluate(host, samples)
        handle.remove()
        eject_dymu(host.model)
        lost = paired_difference(plain, evaluation)
        name = {"off": "tower only"}.get(language, language)
        rows.append(
            f"| {sum(counted) / len(counted):.1f} | {name} | {100 * evaluation.accuracy.value:.1f} | "
            f"{100 * lost.value:+.1f} [{100 * lost.low:+.1f}, {100 * lost.high:+.1f}] |"
        )
    return rows


if __name__ == "__main__":
    main()
