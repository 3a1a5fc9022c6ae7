"""Adapters side by side: time and memory of one step of training, in the task of `sfa study pretrained`.

    python -m benchmarks.adapters                     # a minute on 2 idle cores; needs the extra `study`

The last three layers of DINOv2-small, 8 pictures of 65 tokens. `plain` trains the linear heads alone; the others train
what their name says besides. Quality after equal steps is in docs/comparison.md, from the studies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import compare, write_result
from sfa_adapters.recipes.studies.pretrained import Run
from sfa_adapters.recipes.studies.settings import load_settings
from sfa_adapters.recipes.studies.training import Stepper

TRAINED: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "SFA, four terms": {"adapter": "sfa", "sfa_lr": 0.3},
    "SFA, row and col": {"adapter": "sfa", "sfa_lr": 0.3, "terms": ["row", "col"]},
    "BitFit": {"adapter": "bitfit", "lr": 0.001},
    "LoRA rank 1 on q, k": {"adapter": "lora", "lr": 0.01},
    "all weights": {"layers": "trained", "lr": 0.001},
    "all weights, SFA": {"layers": "trained", "lr": 0.001, "adapter": "sfa"},
}


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    base = {**load_settings("pretrained-frozen").train, "pool": 16, "pictures": 16, "steps": 10_000, "validation": 1}
    steps, parameters = {}, {}
    for name, options in TRAINED.items():
        run = Run({**base, **options}, seed=0)
        parameters[name] = sum(p.numel() for p in run.net.tower.parameters() if p.requires_grad)
        steps[name] = _step(run)
    device = torch.device("cpu")
    rows = compare(steps, args.rounds, device, "adapters")
    body = ["| trained | ms | time / plain | quartiles | peak MB | parameters |", "|---|---|---|---|---|---|"]
    body += [f"{row.markdown()} {parameters[row.name]:,} |" for row in rows]
    console = Console()
    console.print("\n".join(body), markup=False)
    command = f"python -m benchmarks.adapters {' '.join(sys.argv[1:])}".strip()
    console.print(f"written: {write_result('adapters', device, command, body)}")


def _step(run: Run) -> Callable[[], None]:
    """One step of the run's own training, with the optimizer's state of that run."""
    stepper = Stepper(run.groups(), 10_000, 10)
    batch = torch.arange(run.options["batch"])
    return lambda: stepper.step(run.loss(batch))


if __name__ == "__main__":
    main()
