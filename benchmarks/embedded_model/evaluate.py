"""Measure a checkpoint on held-out pictures: accuracy of every task, with 95 % Wilson intervals.

    python evaluate.py ../../ep_core/demo/model --json ../results/embedded_model.json

With `--policy` (again for each of several) the main set is asked with visual tokens pruned:

    python evaluate.py ../../ep_core/demo/model --others 0 --policy layer=2,keep=0.25 \\
        --json ../results/embedded_model_pruned.json
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import Answerer
from PIL import Image
from prompts import Prompt, question_text
from scenes import TASKS, Studio, ask_each
from tqdm import tqdm
from train import LARGE, SMALL, SQUARE

from ep_backends.transformers import enable

SEED = 777


def square(studio: Studio, count: int) -> Iterator[Prompt]:
    """Pictures of 144 visual tokens, one question of every task about each: the main set."""
    for i in range(count):
        rng = np.random.default_rng((SEED, 0, i))
        picture = studio.picture(rng, SQUARE)
        yield Prompt([picture], [(0, question) for question in ask_each(rng, picture)])


def sizes(studio: Studio, count: int) -> Iterator[Prompt]:
    """Pictures of the other grids of the training, in turn."""
    grids = SMALL + LARGE
    for i in range(count):
        rng = np.random.default_rng((SEED, 1, i))
        picture = studio.picture(rng, grids[i % len(grids)])
        yield Prompt([picture], [(0, question) for question in ask_each(rng, picture)])


def pairs(studio: Studio, count: int) -> Iterator[Prompt]:
    """Two small pictures in one prompt; the tasks alternate between them."""
    for i in range(count):
        rng = np.random.default_rng((SEED, 2, i))
        pictures = [studio.picture(rng, SMALL[rng.integers(len(SMALL))]) for _ in range(2)]
        asked = [ask_each(rng, picture) for picture in pictures]
        which = {task: (i + n) % 2 for n, task in enumerate(TASKS)}
        questions = [(p, q) for p in range(2) for q in asked[p] if which[q.task] == p]
        yield Prompt(pictures, questions)


def measure(answerer: Answerer, prompts: Iterator[Prompt], count: int) -> dict[str, Any]:
    """Ask everything and count the answers that are right, word for word."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for prompt in tqdm(prompts, total=count, mininterval=5):
        images = [Image.fromarray(picture.pixels) for picture in prompt.pictures]
        texts = [question_text(prompt, which, question) for which, question in prompt.questions]
        answers = answerer.answer(images, texts)
        for (_, question), answer in zip(prompt.questions, answers, strict=True):
            for name in (question.task, "all"):
                asked[name] += 1
                right[name] += answer.strip() == question.answer
    return {
        "prompts": count,
        "tasks": {
            task: {
                "right": right[task],
                "asked": asked[task],
                "accuracy": round(right[task] / asked[task], 4),
                "interval": [round(end, 4) for end in wilson(right[task], asked[task])],
            }
            for task in (*TASKS, "all")
            if asked[task]
        },
    }


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    p, spread = right / asked, z * z / asked
    middle = (p + spread / 2) / (1 + spread)
    half = z * (p * (1 - p) / asked + spread / asked / 4) ** 0.5 / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: a row for every task, a column for every set of pictures."""
    lines = ["| task | " + " | ".join(results) + " |", "|---" * (1 + len(results)) + "|"]
    for task in (*TASKS, "all"):
        cells = []
        for result in results.values():
            cell = result["tasks"][task]
            low, high = (100 * end for end in cell["interval"])
            accuracy = f"{100 * cell['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"
            cells.append(f"{accuracy} ({cell['right']}/{cell['asked']})")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint on held-out pictures.")
    parser.add_argument("model", type=Path, help="folder of the exported checkpoint")
    parser.add_argument("--pictures", type=int, default=250, help="prompts of the main set")
    parser.add_argument("--others", type=int, default=60, help="prompts of each of the other sets")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--policy", action="append", default=[], help="also with this pruning")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    answerer, studio = Answerer(args.model), Studio("test")
    results = {"144 visual tokens": measure(answerer, square(studio, args.pictures), args.pictures)}
    if args.others:
        results["64 to 192 tokens"] = measure(answerer, sizes(studio, args.others), args.others)
        results["two pictures"] = measure(answerer, pairs(studio, args.others), args.others)
    for policy in args.policy:
        with enable(answerer.model, policy):
            results[policy] = measure(answerer, square(studio, args.pictures), args.pictures)
    print(table(results))
    if args.json:
        packages = ("torch", "transformers", "tokenizers", "pillow", "scikit-image", "scikit-learn")
        record = {
            "command": f"python {' '.join(sys.argv)}",
            "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in packages},
            "seed": SEED,
            "results": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
