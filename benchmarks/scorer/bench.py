"""Time the scorers and the greedy set against what they replace, in one run.

    python benchmarks/scorer/bench.py --json benchmarks/results/scorer.json

Ratios are medians over rounds of the ratio within a round; in a round every path runs once in
turn, so that what else the machine does meets all of them. The table goes to a Markdown file beside
the JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ep_core import kernels
from ep_core.entropy import cosine_gram, matrix_entropy
from ep_core.selectors import greedy_renyi2_torch

FLOOR = 1e-10
PAPER = 64  # (128 / 32)^3: the paper's ratio of the decompositions' costs


def released(q: torch.Tensor) -> torch.Tensor:
    """The released code: centred in the model's dtype, `H x H` Gram matrix, float64 eigenvalues."""
    x = (q - q.mean(dim=1, keepdim=True)).double()
    return entropy(torch.linalg.eigvalsh(x @ x.mT / q.shape[1]), q.shape[1])


def primal(q: torch.Tensor) -> torch.Tensor:
    """The same through the `D x D` covariance over the heads."""
    x = (q - q.mean(dim=1, keepdim=True)).double()
    return entropy(torch.linalg.eigvalsh(x.mT @ x / q.shape[1]), q.shape[1])


def entropy(spectrum: torch.Tensor, heads: int) -> torch.Tensor:
    """`-sum(l ln l) / ln H` of clamped eigenvalues `[N, n]`."""
    spectrum = spectrum.clamp_min(FLOOR)
    return -(spectrum * spectrum.log()).sum(dim=1) / math.log(heads)


def dual_reference(q: torch.Tensor) -> torch.Tensor:
    """This project's torch path in float64."""
    return matrix_entropy(q, "none", dtype=torch.float64)


def fused(q: torch.Tensor) -> torch.Tensor:
    """This project's default path."""
    return matrix_entropy(q, "none")


def timed(paths: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each path in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for round_ in range(rounds + 1):
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            if round_:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def summary(times: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Median milliseconds, and how many times faster than `base` each path is."""
    return {
        name: {
            "ms": round(statistics.median(values), 3),
            f"times faster than {base}": round(
                statistics.median(b / v for b, v in zip(times[base], values, strict=True)), 2
            ),
        }
        for name, values in times.items()
    }


def scorers(tokens: int, heads: int, width: int, rounds: int) -> dict[str, Any]:
    """All four scorers on the same bfloat16 queries, and the fused one's largest error."""
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, heads, width, generator=generator) * torch.linspace(1, 0.1, width)
    q = (q + torch.randn(tokens, 1, width, generator=generator)).to(torch.bfloat16)
    paths: dict[str, Callable[[], Any]] = {
        "released": lambda: released(q),
        "dual reference": lambda: dual_reference(q),
        "fused": lambda: fused(q),
    }
    quick = timed(paths, rounds)
    slow = timed(
        {"primal": lambda: primal(q), "released": lambda: released(q)}, max(1, rounds // 5)
    )
    x = (q - q.mean(dim=1, keepdim=True)).double()
    covariance, gram = x.mT @ x / heads, x @ x.mT / heads
    decompositions = timed(
        {
            "primal": lambda: torch.linalg.eigvalsh(covariance),
            "dual": lambda: torch.linalg.eigvalsh(gram),
        },
        max(1, rounds // 5),
    )
    reference = dual_reference(q).double()
    trace = (q.double() - q.double().mean(dim=1, keepdim=True)).square().sum(dim=(1, 2)) / heads
    unit = torch.maximum(reference.abs(), trace / math.log(heads))
    half = tokens // 4
    return {
        "tokens": tokens,
        "paths": summary(quick, "released"),
        "primal ms": round(statistics.median(slow["primal"]), 1),
        "dual over primal, whole scorer": ratio(slow["primal"], slow["released"]),
        "dual over primal, eigenvalues": ratio(decompositions["primal"], decompositions["dual"]),
        "largest error of fused, of max(|score|, tr A / ln H)": float(
            f"{float(((fused(q).double() - reference).abs() / unit).max()):.1e}"
        ),
        "kept sets equal float64's at a quarter": set(fused(q).topk(half).indices.tolist())
        == set(reference.topk(half).indices.tolist()),
    }


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 1)


def greedy(tokens: int, width: int, keep: int, rounds: int) -> dict[str, Any]:
    """The greedy set: its Gram matrix, and the steps after it in torch and fused."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(torch.bfloat16)
    gram = cosine_gram(hidden)
    times = timed(
        {
            "steps in torch": lambda: greedy_renyi2_torch(gram, keep),
            "steps, fused": lambda: kernels.greedy_renyi2(gram, keep),
            "Gram matrix": lambda: cosine_gram(hidden),
        },
        rounds,
    )
    return {
        "tokens": tokens,
        "width": width,
        "kept": keep,
        "paths": summary(times, "steps in torch"),
    }


def processor() -> str:
    """Its name as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    machine = result["machine"]
    lines = [
        "# Scorer and greedy set: time",
        "",
        f"{machine['processor']}; {machine['threads']} thread; {machine['kernels']}; torch "
        f"{machine['torch']}, numpy {machine['numpy']}, Python {machine['python']}.",
        "",
        f"    {result['command']}",
        "",
        f"Queries `[N, {result['heads']}, {result['width']}]` in bfloat16, `released` scores. "
        f"Medians over {result['rounds']} rounds; the machine was shared, so trust ratios more "
        "than times.",
        "",
        "| N | released, ms | dual reference, ms | fused, ms | fused against released "
        "| primal covariance, ms | largest error of fused |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["scorer"]:
        paths = row["paths"]
        lines.append(
            f"| {row['tokens']} | {paths['released']['ms']:.1f} "
            f"| {paths['dual reference']['ms']:.1f} | {paths['fused']['ms']:.2f} "
            f"| **{paths['fused']['times faster than released']:.1f}x** | {row['primal ms']:.0f} "
            f"| {row['largest error of fused, of max(|score|, tr A / ln H)']:.0e} |"
        )
    lines += [
        "",
        f"The paper counts {PAPER}x for the dual decomposition of 32 heads of width 128. Measured:",
        "",
        "| N | eigenvalues alone | whole scorer |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['tokens']} | {row['dual over primal, eigenvalues']:.1f}x "
        f"| {row['dual over primal, whole scorer']:.1f}x |"
        for row in result["scorer"]
    ]
    lines += [
        "",
        "The greedy set of `set-entropy`:",
        "",
        "| N | width | kept | steps in torch, ms | steps fused, ms | Gram matrix, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["greedy"]:
        times = [row["paths"][name]["ms"] for name in row["paths"]]
        lines.append(
            f"| {row['tokens']} | {row['width']} | {row['kept']} | {times[0]:.1f} "
            f"| {times[1]:.2f} | {times[2]:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the tables, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 1024, 2880, 4096])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            "processor": processor(),
            "threads": args.threads,
            "kernels": kernels.describe("cpu").partition(" (")[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "heads": args.heads,
        "width": args.width,
        "rounds": args.rounds,
        "scorer": [],
        "greedy": [],
    }
    for tokens in args.tokens:
        print(f"scorers, {tokens} tokens ...", file=sys.stderr)
        result["scorer"].append(scorers(tokens, args.heads, args.width, args.rounds))
    for tokens, width, keep in ((576, 1024, 166), (576, 4096, 166), (2880, 4096, 832)):
        print(f"greedy set, {tokens} tokens of width {width} ...", file=sys.stderr)
        result["greedy"].append(greedy(tokens, width, keep, args.rounds))
    print(markdown(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
