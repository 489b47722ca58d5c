"""Accuracy of every method, layer and budget on the demonstration model's held-out questions.

    python -m benchmarks.accuracy.bench --out benchmarks/results/accuracy

Methods are asked the same questions in the same engine (transformers, eager attention, which some
of them read), through the same hook. Plots go beside the report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from PIL import Image

from benchmarks.accuracy.plots import plot_budgets, plot_layers
from benchmarks.embedded_model.evaluate import PACKAGES, SEED, Tally, square
from benchmarks.embedded_model.inference import Answerer, Seen
from benchmarks.embedded_model.prompts import question_text
from benchmarks.embedded_model.scenes import TASKS, Question, Studio
from benchmarks.report import environment, heading, output, progress, publish, table, timed
from ep_backends.transformers import enable
from ep_core import SpanInputs, demo
from ep_core.ecl import EntropyProfile, find_collapse_layer
from ep_core.entropy import layer_entropy
from ep_core.plugins import registry
from ep_peers.tower import received_attention
from ep_peers.visionzip import looking_at

METHODS = (
    "set-entropy",
    "released",
    "rows",
    "trace",
    "max-volume",
    "divprune",
    "dart",
    "fastv",
    "sparsevlm-style",
    "visionzip-style",
    "query-norm-small",
    "query-norm-large",
    "hidden-norm-small",
    "hidden-norm-large",
    "random",
)
LAYERS = (1, 2)
SHARES = (0.5, 0.33, 0.22, 0.11, 0.05)
BY_LAYER = ("set-entropy", "released", "random")  # measured at every layer
BY_LAYER_SHARE = 0.11  # and by task


@dataclass(frozen=True)
class Case:
    """One picture and what is asked about it.

    Attributes:
        seen: the picture, through the vision tower.
        received: `[N]` attention that its tokens receive there.
        questions: their tasks and answers.
        texts: the questions as they are asked.
    """

    seen: Seen
    received: torch.Tensor
    questions: list[Question]
    texts: list[str]


def cases(answerer: Answerer, count: int) -> list[Case]:
    """The held-out pictures, seen once for all methods."""
    found = []
    for prompt in square(Studio("test"), count):
        seen = answerer.look([Image.fromarray(prompt.pictures[0].pixels)])
        found.append(
            Case(
                seen,
                received_attention(answerer.model, seen.patches, seen.grids),
                [question for _, question in prompt.questions],
                [question_text(prompt, which, question) for which, question in prompt.questions],
            )
        )
    return found


class Worker:
    """One process of several: a model and the cases, on one thread.

    Small matrices gain little from a second thread, and lose much on a busy machine.
    """

    def __init__(self, pictures: int) -> None:
        torch.set_num_threads(1)
        self.answerer = Answerer(demo.MODEL, attention="eager")
        self.cases = cases(self.answerer, pictures)

    def accuracy(self, policy: str | None) -> dict[str, Any]:
        """Counts of right answers by task, with a policy or without."""
        tally = Tally()
        with enable(self.answerer.model, policy) if policy else contextlib.nullcontext():
            for case in self.cases:
                with looking_at(case.received):
                    tally.add(case.questions, self.answerer.answer(case.seen, case.texts))
        return tally.tasks()


_worker: Worker | None = None  # of this process


def start_worker(pictures: int) -> None:
    """Run in each process before its first policy."""
    global _worker
    _worker = Worker(pictures)


def accuracy(policy: str | None) -> dict[str, Any]:
    """`Worker.accuracy` in whichever process is free."""
    assert _worker is not None
    return _worker.accuracy(policy)


@torch.inference_mode()
def profile(worker: Worker) -> EntropyProfile:
    """Matrix entropy of each picture's tokens entering each layer, unpruned."""
    entropies = []
    for case in progress(worker.cases, "layer entropies"):
        inputs = worker.answerer.inputs(case.seen, case.texts[:1])
        states = worker.answerer.model(**inputs, output_hidden_states=True).hidden_states
        tokens = inputs["mm_token_type_ids"][0].bool()
        # the last state comes after the final norm and is no layer's input
        entropies.append(tuple(layer_entropy(state[0, tokens]) for state in states[:-1]))
    return EntropyProfile("demonstration model", tuple(entropies))


def selection_times(tokens: int, keep: int, rounds: int) -> dict[str, float]:
    """Milliseconds of one selection at the sizes of LLaVA-1.5-7B, in bfloat16, medians."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    everything = {
        "queries": normal(tokens, 32, 128),
        "hidden": normal(tokens, 4096),
        "attention": normal(32, 64, tokens).softmax(dim=-1),  # 64 tokens of text
    }

    def select(method: str) -> torch.Tensor:
        selector = registry().selector(method)
        return selector(SpanInputs(**{need: everything[need] for need in selector.needs}), keep)

    with looking_at(torch.rand(tokens, generator=generator)):
        paths = {method: lambda method=method: select(method) for method in METHODS}
        times = timed(paths, rounds, "selection")
    return {method: round(statistics.median(own), 2) for method, own in times.items()}


def by_budget(result: dict[str, Any]) -> list[str]:
    """A table for each layer: methods and budgets."""
    whole = result["unpruned"]["all"]
    lines = [
        f"Unpruned {cell(whole)} of {whole['asked']} questions about {result['pictures']} "
        f"pictures. In brackets 95 % Wilson intervals. {result['processes']} processes.",
        "",
        "This model's vision tower was told in training what lies on every token, and some of its "
        "attention heads where to look: that flatters methods that read attention (`fastv`, "
        "`sparsevlm-style`, `visionzip-style`). Its queries started equal to its keys, so objects "
        "end with large ones: that breaks `released` and `query-norm-small`. Nothing here carries "
        "over to a large model without a measurement there.",
    ]
    for layer in LAYERS:
        rows = []
        for method in METHODS:
            cells = [result["pruned"][policy(layer, share, method)]["all"] for share in SHARES]
            rows.append([f"`{method}`", *map(cell, cells)])
        lines += ["", f"## Pruned at layer {layer}", ""]
        lines += table(["method", *(f"{share:.0%} kept" for share in SHARES)], rows)
    return lines


def by_task(result: dict[str, Any]) -> list[str]:
    """The tasks apart, for one policy of each method."""
    layer, share = LAYERS[-1], BY_LAYER_SHARE
    rows = [["unpruned", *(percent(result["unpruned"][task]) for task in TASKS)]]
    for method in METHODS:
        tasks = result["pruned"][policy(layer, share, method)]
        rows.append([f"`{method}`", *(percent(tasks[task]) for task in TASKS)])
    return ["", f"## By task, layer {layer}, {share:.0%} kept", "", *table(["", *TASKS], rows)]


def by_layer(result: dict[str, Any]) -> list[str]:
    """Entropy entering each layer, and accuracy when pruned there."""
    layers, found = result["layers"], result["collapse"]
    rows = [
        [
            row["layer"],
            f"{row['entropy']:.4f}",
            f"{row['drop']:+.4f}",
            *(cell(row[method]) for method in BY_LAYER),
        ]
        for row in layers
    ]
    verdict = f"layer {found['layer']}" if found["layer"] is not None else "no collapse layer"
    return [
        "",
        f"## By layer, {BY_LAYER_SHARE:.0%} kept",
        "",
        *table(["layer", "median entropy", "drop", *(f"`{method}`" for method in BY_LAYER)], rows),
        "",
        f"The finder says: {verdict} ({found['reason']}).",
    ]


def by_time(result: dict[str, Any]) -> list[str]:
    """Milliseconds of a selection."""
    times = result["selection"]
    rows = [[f"`{method}`", f"{times['ms'][method]:.2f}"] for method in METHODS]
    return [
        "",
        "## Time of one selection",
        "",
        f"{times['keep']} of {times['tokens']} tokens at the sizes of LLaVA-1.5-7B, "
        f"{result['machine']['threads']} threads, medians of {times['rounds']} rounds. What a "
        "method reads is given: that attention maps rule out fused attention kernels is not in it.",
        "",
        *table(["method", "ms"], rows),
    ]


def cell(counts: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = (100 * end for end in counts["interval"])
    return f"{percent(counts)} [{low:.1f}, {high:.1f}]"


def percent(counts: dict[str, Any]) -> str:
    """An accuracy."""
    return f"{100 * counts['accuracy']:.1f}"


def policy(layer: int, share: float, method: str) -> str:
    """A policy as text."""
    return f"layer={layer},keep={share},method={method}"


def wanted(layers: int) -> Sequence[str]:
    """Every policy that is measured, none twice."""
    grid = [policy(k, share, m) for k in LAYERS for share in SHARES for m in METHODS]
    every = [policy(k, BY_LAYER_SHARE, m) for k in range(1, layers) for m in BY_LAYER]
    return list(dict.fromkeys(grid + every))


def main() -> None:
    """Measure everything, print the report, write it and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=15, help="of timing the selections")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=output, help="write OUT.json, OUT.md and plots")
    args = parser.parse_args()
    here = Worker(args.pictures)
    entropies = profile(here)
    collapse = find_collapse_layer(entropies)
    medians = entropies.median
    policies = wanted(len(medians))
    with ProcessPoolExecutor(
        args.processes, get_context("spawn"), start_worker, (args.pictures,)
    ) as pool:
        unpruned = pool.submit(accuracy, None)
        measured = progress(pool.map(accuracy, policies), "policies", total=len(policies))
        pruned = dict(zip(policies, measured, strict=True))
    result: dict[str, Any] = {
        **environment(PACKAGES),
        "seed": SEED,
        "pictures": args.pictures,
        "processes": args.processes,
        "unpruned": unpruned.result(),
        "pruned": pruned,
        "layers": [
            {"layer": k, "entropy": medians[k], "drop": medians[k - 1] - medians[k]}
            | {m: pruned[policy(k, BY_LAYER_SHARE, m)]["all"] for m in BY_LAYER}
            for k in range(1, len(medians))
        ],
        "collapse": {"layer": collapse.layer, "reason": collapse.reason},
        "selection": {
            "tokens": 576,
            "keep": 166,
            "rounds": args.rounds,
            "ms": selection_times(576, 166, args.rounds),
        },
    }
    lines = heading("Accuracy of pruning methods on the demonstration model", result)
    lines += by_budget(result) + by_task(result) + by_layer(result) + by_time(result)
    publish(result, lines, args.out)
    if args.out is not None:
        plot_budgets(result, args.out.with_name(f"{args.out.name}-budgets.png"))
        plot_layers(result, BY_LAYER, args.out.with_name(f"{args.out.name}-layers.png"))


if __name__ == "__main__":
    main()
