"""CPU seconds of a training step of `sfa demo`: questions packed behind their picture, against one row for each.

    OMP_NUM_THREADS=1 python benchmarks/demo_packing.py

`training/` makes one row of each question, as `sfa train` needs it. Here both ways train the same host on the same
questions, in turns, so that a busy machine slows both. What a Trainer adds to a step is left out, which favours the
rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from sfa_adapters import inject_sfa
from sfa_adapters.recipes.nano.encode import encode_packed
from sfa_adapters.recipes.nano.finetune import train_tower_and_projector
from sfa_adapters.recipes.nano.models import load_nano
from sfa_adapters.recipes.synthetic.table_pictures import TableSize, ask_all, table_pictures

PICTURES, QUESTIONS, ROUNDS = 8, 5, 5


def main() -> None:
    """Prints the seconds of every round and the median of their ratios."""
    torch.set_num_threads(1)
    host = load_nano("llava_onevision")
    torch.manual_seed(0)
    inject_sfa(host.model)
    train_tower_and_projector(host.model)
    host.model.train()
    pictures = table_pictures("train", PICTURES, 10_000, TableSize((3, 5), (2, 3)))
    pairs = [[(one.text, one.answer) for one in about] for about in ask_all(pictures, QUESTIONS, 0)]
    images = [picture.image for picture in pictures]

    def packed() -> None:
        host.model(**encode_packed(host, images, pairs), use_cache=False).loss.backward()

    def rows() -> None:
        single = [[pair] for about in pairs for pair in about]
        repeated = [image for image, about in zip(images, pairs, strict=True) for _ in about]
        host.model(**encode_packed(host, repeated, single), use_cache=False).loss.backward()

    packed()  # the first step of a process is slow
    ratios = []
    for number in range(ROUNDS):
        one, other = _seconds(packed), _seconds(rows)
        ratios.append(other / one)
        print(f"round {number}: packed {one:.2f} s, one row for each {other:.2f} s: {ratios[-1]:.2f}x", flush=True)
    print(f"median {statistics.median(ratios):.2f}x for {sum(map(len, pairs))} questions about {PICTURES} pictures")


def _seconds(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


if __name__ == "__main__":
    main()
