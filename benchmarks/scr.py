"""Cost of the SCR terms in a training step: forward and backward of the nano host, 16 charts a step.

    python -m benchmarks.scr                             # 2 minutes on 2 cores

Candidates: `plain`, cross-entropy alone; each term alone; all three. Memory is the peak of one step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from rich.console import Console

from benchmarks.common import compare, write_result
from sfa_adapters.recipes.analyze.attention_study import STATISTICS, unseen_charts
from sfa_adapters.recipes.nano.encode import encode_packed
from sfa_adapters.recipes.nano.finetune import evidence_mask
from sfa_adapters.recipes.nano.models import load_nano
from sfa_adapters.recipes.synthetic.questions import questions_for
from sfa_adapters.scr import SCRConfig, SCRLoss

TERMS = ("entropy", "grounding", "stability")


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    host, charts = load_nano(), unseen_charts(16)
    host.model.train()
    questions = [questions_for(chart.table)[:5] for chart in charts]
    pairs = [[(question.text, question.answer) for question in of_chart] for of_chart in questions]
    batch = encode_packed(host, [chart.image for chart in charts], pairs)
    evidence = evidence_mask(batch["labels"], charts, questions)

    def step(*terms: str) -> Callable[[], object]:
        weights = {term: 0.3 * (term in terms) for term in TERMS}
        scr = SCRLoss(host.model, SCRConfig(**weights, **STATISTICS))

        def run() -> None:
            host.model.zero_grad(set_to_none=True)
            if not terms:
                host.model(**batch, use_cache=False).loss.backward()
                return
            with scr.watch():
                outputs = host.model(**batch, use_cache=False)
            penalty, _ = scr(outputs, batch, evidence_mask=evidence)
            (outputs.loss + penalty).backward()

        return run

    candidates = {"plain": step(), **{term: step(term) for term in TERMS}, "all three": step(*TERMS)}
    rows = compare(candidates, args.rounds, torch.device("cpu"), "steps")
    body = [
        "| candidate | ms | ratio | quartiles | peak MB |",
        "|---|---|---|---|---|",
        *(row.markdown() for row in rows),
    ]
    console = Console()
    console.print("\n".join(body), markup=False)
    command = f"python -m benchmarks.scr {' '.join(sys.argv[1:])}".strip()
    console.print(f"written: {write_result('scr-nano', torch.device('cpu'), command, body)}")


if __name__ == "__main__":
    main()
