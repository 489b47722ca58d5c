"""Time the scorers and the greedy set against what they replace, in one run.

python -m benchmarks.scorer.bench --out benchmarks/results/scorer
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import environment, heading, output, publish, ratio, table, timed
from ep_core import kernels
from ep_core.entropy import cosine_gram, matrix_entropy
from ep_core.kernels.reference import greedy_renyi2 as greedy_renyi2_torch

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


def summary(times: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Median milliseconds, and how many times faster than `base` each path is."""
    return {
        name: {
            "ms": round(statistics.median(values), 3),
            f"times faster than {base}": round(ratio(times[base], values), 2),
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
    what = f"scorers, {tokens} tokens"
    quick = timed(paths, rounds, what)
    slow = timed(
        {"primal": lambda: primal(q), "released": lambda: released(q)},
        max(1, rounds // 5),
        f"{what}, primal",
    )
    x = (q - q.mean(dim=1, keepdim=True)).double()
    covariance, gram = x.mT @ x / heads, x @ x.mT / heads
    decompositions = timed(
        {
            "primal": lambda: torch.linalg.eigvalsh(covariance),
            "dual": lambda: torch.linalg.eigvalsh(gram),
        },
        max(1, rounds // 5),
        f"{what}, eigenvalues",
    )
    reference = dual_reference(q).double()
    trace = (q.double() - q.double().mean(dim=1, keepdim=True)).square().sum(dim=(1, 2)) / heads
    unit = torch.maximum(reference.abs(), trace / math.log(heads))
    keep = tokens // 4
    return {
        "tokens": tokens,
        "paths": summary(quick, "released"),
        "primal ms": round(statistics.median(slow["primal"]), 1),
        "dual over primal, whole scorer": round(ratio(slow["primal"], slow["released"]), 1),
        "dual over primal, eigenvalues": round(
            ratio(decompositions["primal"], decompositions["dual"]), 1
        ),
        "largest error of fused, of max(|score|, tr A / ln H)": float(
            f"{float(((fused(q).double() - reference).abs() / unit).max()):.1e}"
        ),
        "kept sets equal float64's at a quarter": set(fused(q).topk(keep).indices.tolist())
        == set(reference.topk(keep).indices.tolist()),
    }


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
        f"greedy set, {tokens} tokens of width {width}",
    )
    return {
        "tokens": tokens,
        "width": width,
        "kept": keep,
        "paths": summary(times, "steps in torch"),
    }


def report(result: dict[str, Any]) -> list[str]:
    """The tables in Markdown."""
    lines = [
        *heading("Scorer and greedy set: time", result),
        f"{result['kernels']}. Queries `[N, {result['heads']}, {result['width']}]` in bfloat16, "
        f"`released` scores. Medians over {result['rounds']} rounds.",
        "",
    ]
    rows = []
    for row in result["scorer"]:
        paths = row["paths"]
        rows.append(
            [
                row["tokens"],
                f"{paths['released']['ms']:.1f}",
                f"{paths['dual reference']['ms']:.1f}",
                f"{paths['fused']['ms']:.2f}",
                f"**{paths['fused']['times faster than released']:.1f}x**",
                f"{row['primal ms']:.0f}",
                f"{row['largest error of fused, of max(|score|, tr A / ln H)']:.0e}",
            ]
        )
    header = [
        "N",
        "released, ms",
        "dual reference, ms",
        "fused, ms",
        "fused against released",
        "primal covariance, ms",
        "largest error of fused",
    ]
    lines += table(header, rows)
    lines += [
        "",
        f"The paper counts {PAPER}x for the dual decomposition of 32 heads of width 128. Measured:",
        "",
        *table(
            ["N", "eigenvalues alone", "whole scorer"],
            [
                [
                    row["tokens"],
                    f"{row['dual over primal, eigenvalues']:.1f}x",
                    f"{row['dual over primal, whole scorer']:.1f}x",
                ]
                for row in result["scorer"]
            ],
        ),
        "",
        "The greedy set of `set-entropy`:",
        "",
    ]
    rows = []
    for row in result["greedy"]:
        torch_steps, fused_steps, gram = (path["ms"] for path in row["paths"].values())
        rows.append(
            [
                row["tokens"],
                row["width"],
                row["kept"],
                f"{torch_steps:.1f}",
                f"{fused_steps:.2f}",
                f"{gram:.1f}",
            ]
        )
    header = ["N", "width", "kept", "steps in torch, ms", "steps fused, ms", "Gram matrix, ms"]
    return lines + table(header, rows)


def main() -> None:
    """Measure, print the tables, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 1024, 2880, 4096])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=output, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    found = kernels.describe("cpu")
    if found.startswith("torch"):
        parser.error(f"there are no fused kernels to measure; the CPU takes {found}")
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        **environment(["torch", "numpy"]),
        "kernels": found.partition(" (")[0],
        "heads": args.heads,
        "width": args.width,
        "rounds": args.rounds,
        "scorer": [scorers(n, args.heads, args.width, args.rounds) for n in args.tokens],
        "greedy": [
            greedy(tokens, width, keep, args.rounds)
            for tokens, width, keep in ((576, 1024, 166), (576, 4096, 166), (2880, 4096, 832))
        ],
    }
    publish(result, report(result), args.out)


if __name__ == "__main__":
    main()
