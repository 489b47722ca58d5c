"""Pruned against unpruned servers under load: requests a second, waiting time, KV memory.

python -m benchmarks.serving.bench --backend sglang --out benchmarks/results/serving-sglang
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import environment, heading, output, progress, publish, table
from benchmarks.serving.kv import LAYERS, PICTURE, capacity
from benchmarks.serving.load import Reply, body, counters, load
from benchmarks.serving.servers import THREADS, Server, memory, serving
from ep_conformance.checkpoints import make_picture, tiny_qwen2_5_vl
from ep_core.policy import PruningPolicy

LEVELS = {1: 4, 4: 8, 16: 16, 32: 32}  # clients at once: requests that are measured
NAMES = ("unpruned", "pruned")


@dataclass(frozen=True)
class Scene:
    """A model and how much KV memory there is.

    Attributes:
        name: of the model.
        heads, kv_heads, head_dim, layers: of a random Qwen2.5-VL.
        tokens: slots in each layer of the unpruned server.
        rounds: how often each level is measured.
        why: what it shows.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    tokens: int
    rounds: int
    why: str


SCENES = (
    Scene(
        *("tiny", 6, 2, 16, 4, 10240, 3),
        "Memory for all requests at once, and next to nothing to save: what pruning costs.",
    ),
    Scene(
        *("mid-size", 8, 2, 64, 28, 2048, 2),
        "Memory for a few unpruned requests at once: what pruning gains.",
    ),
)


def measure(scene: Scene, backend: str, policy: PruningPolicy, answer: int) -> dict[str, Any]:
    """Both servers side by side; each level goes to one and then to the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_qwen2_5_vl(
            folder / "model",
            heads=scene.heads,
            kv_heads=scene.kv_heads,
            head_dim=scene.head_dim,
            layers=scene.layers,
        )
        policies = dict(zip(NAMES, (None, policy), strict=True))
        memories = {
            which: memory(backend, own, scene.layers, scene.tokens)
            for which, own in policies.items()
        }
        servers = {
            which: Server(backend, model, own, memories[which].arguments, folder / f"{which}.log")
            for which, own in policies.items()
        }
        runs: dict[int, dict[str, list[list[Reply]]]] = {
            level: {which: [] for which in NAMES} for level in LEVELS
        }
        with serving(list(servers.values())):
            requests = _requests(model, folder / "picture.png", answer)
            order = [(round_, level) for round_ in range(scene.rounds) for level in LEVELS]
            for round_, level in progress(order, f"{backend}, {scene.name} model"):
                warm = list(islice(requests, max(1, level // 8)))
                asked = list(islice(requests, LEVELS[level]))
                for which in NAMES[:: 1 if round_ % 2 else -1]:
                    address = servers[which].address
                    load(address, warm, answer, level)
                    runs[level][which].append(load(address, asked, answer, level))
            counted = counters(servers["pruned"].address)
    return {
        "name": scene.name,
        "why": scene.why,
        "hidden": scene.heads * scene.head_dim,
        "layers": scene.layers,
        "visual tokens": {
            which: counted[f"visual_tokens_{which}_total"] for which in ("seen", "kept")
        },
        "levels": [_level(level, runs[level]) for level in LEVELS],
    }


def _requests(model: Path, picture: Path, answer: int) -> Iterator[bytes]:
    """Requests without end, each about another picture: nothing is cached by accident."""
    seed = 0
    while True:
        yield body(model, make_picture(picture, seed, PICTURE), answer)
        seed += 1


def _level(level: int, runs: dict[str, list[list[Reply]]]) -> dict[str, Any]:
    """What a level came to; waiting times over the requests of all rounds."""
    result: dict[str, Any] = {"clients": level, "requests": LEVELS[level]}
    for which in NAMES:
        waits = [1e3 * (reply.first - reply.sent) for run in runs[which] for reply in run]
        half, most = np.percentile(waits, [50, 99])
        result[which] = {
            "requests/s": [round(_throughput(run), 3) for run in runs[which]],
            "ttft p50, ms": round(float(half), 1),
            "ttft p99, ms": round(float(most), 1),
        }
    pairs = zip(result["pruned"]["requests/s"], result["unpruned"]["requests/s"], strict=True)
    result["pruned over unpruned"] = [round(pruned / unpruned, 3) for pruned, unpruned in pairs]
    return result


def _throughput(replies: Sequence[Reply]) -> float:
    """Requests a second."""
    start, end = min(reply.sent for reply in replies), max(reply.last for reply in replies)
    return len(replies) / (end - start)


def report(result: dict[str, Any]) -> list[str]:
    """The tables in Markdown."""
    title = f"{result['name']}: pruned and unpruned under load"
    lines = [
        *heading(title, result),
        f"`{result['policy']}`. Real servers over HTTP in bfloat16, on one machine with their "
        f"client; streamed answers of {result['answer']} tokens, a picture of 256 visual tokens in "
        "each request and none twice, KV memory of the same bytes. With as many requests as "
        "clients it is one burst. Waiting is from sending a "
        "request to its first token: 50 % and 99 % over all rounds. Levels alternate between the "
        "two servers; requests/s and the ratio are medians over rounds, the ratio with the "
        "smallest and the largest.",
        "",
    ]
    if result["name"] == "LMDeploy":
        lines += [
            "LMDeploy's kernels are replaced by a stand-in for checks on a CPU: its speed says "
            "little about a GPU.",
            "",
        ]
    for scene in result["scenes"]:
        rounds = len(scene["levels"][0]["pruned over unpruned"])
        lines += [
            f"## {scene['name'].capitalize()} model",
            "",
            f"Qwen2.5-VL of {scene['layers']} layers, {scene['hidden']} wide, random weights. "
            f"{scene['why']} {rounds} rounds.",
            "",
            *table(
                [
                    *("clients", "requests", "unpruned, requests/s", "pruned, requests/s"),
                    *("pruned over unpruned", "unpruned, ms to first token", "pruned, ms"),
                ],
                [_row(level) for level in scene["levels"]],
            ),
            "",
        ]
    lines += [
        "## KV memory",
        "",
        f"A tiny model of {LAYERS} layers, KV memory of the same bytes: slots in each layer below "
        "the policy's and in each from there on, and the most requests that the engine ran at "
        "once, by its own count.",
        "",
    ]
    rows = [[which, *(f"{n:,}" for n in row.values())] for which, row in result["kv"].items()]
    return lines + table(["", "slots below", "slots from the layer", "requests at once"], rows)


def _row(level: dict[str, Any]) -> list[object]:
    ratios = level["pruned over unpruned"]
    speeds = [f"{statistics.median(level[which]['requests/s']):.2f}" for which in NAMES]
    waits = [
        f"{level[which]['ttft p50, ms']:,.0f} / {level[which]['ttft p99, ms']:,.0f}"
        for which in NAMES
    ]
    spread = f"({min(ratios):.2f} - {max(ratios):.2f})"
    middle = f"**{statistics.median(ratios):.2f}x** {spread}"
    return [level["clients"], level["requests"], *speeds, middle, *waits]


def main() -> None:
    """Measure, print the tables, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=["sglang", "lmdeploy"], required=True)
    parser.add_argument("--policy", default="layer=2,keep=0.11,method=set-entropy")
    parser.add_argument("--answer", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--scenes", nargs="+", default=[scene.name for scene in SCENES])
    parser.add_argument("--out", type=output, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    policy = PruningPolicy.parse(args.policy)
    if not isinstance(policy.layer, int):
        parser.error("KV memory is sized for a layer by number, such as layer=2")
    names = {"sglang": "SGLang", "lmdeploy": "LMDeploy"}
    torch.set_num_threads(THREADS)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # for engines that this process starts
    # first: a stand-in for LMDeploy's device layer would show an accelerator
    found = environment([args.backend, "torch", "transformers"])
    result: dict[str, Any] = {
        **found,
        "name": names[args.backend],
        "policy": str(policy),
        "answer": args.answer,
        "scenes": [
            measure(scene, args.backend, policy, args.answer)
            for scene in SCENES
            if scene.name in args.scenes
        ],
        "kv": capacity(args.backend, policy),
    }
    publish(result, report(result), args.out)


if __name__ == "__main__":
    main()
