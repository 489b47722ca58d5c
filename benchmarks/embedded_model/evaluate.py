"""Measure a checkpoint on held-out pictures: accuracy of every task, with 95 % Wilson intervals.

    python -m benchmarks.embedded_model.evaluate ep_core/demo/model \\
        --out benchmarks/results/embedded_model

benchmarks/accuracy asks the same questions with visual tokens pruned.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.embedded_model.inference import Answerer
from benchmarks.embedded_model.prompts import Prompt, question_text
from benchmarks.embedded_model.scenes import TASKS, Question, Studio, ask_each
from benchmarks.embedded_model.train import LARGE, SMALL, SQUARE
from benchmarks.report import environment, heading, output, progress, publish, table

SEED = 777
PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "scikit-image", "scikit-learn")


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


class Tally:
    """Counts of the answers that are right, word for word."""

    def __init__(self) -> None:
        self._right: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()

    def add(self, questions: Iterable[Question], answers: Iterable[str]) -> None:
        """Count answers to as many questions, for their tasks and for "all"."""
        for question, answer in zip(questions, answers, strict=True):
            for name in (question.task, "all"):
                self._asked[name] += 1
                self._right[name] += answer.strip() == question.answer

    def tasks(self) -> dict[str, Any]:
        """Counts, accuracy and its interval of every task that was asked, and of "all"."""
        return {
            task: {
                "right": self._right[task],
                "asked": self._asked[task],
                "accuracy": round(self._right[task] / self._asked[task], 4),
                "interval": [round(end, 4) for end in wilson(self._right[task], self._asked[task])],
            }
            for task in (*TASKS, "all")
            if self._asked[task]
        }


def measure(answerer: Answerer, prompts: Iterator[Prompt], count: int, what: str) -> dict[str, Any]:
    """Ask everything and count."""
    tally = Tally()
    for prompt in progress(prompts, what, total=count):
        seen = answerer.look([Image.fromarray(picture.pixels) for picture in prompt.pictures])
        texts = [question_text(prompt, which, question) for which, question in prompt.questions]
        tally.add((question for _, question in prompt.questions), answerer.answer(seen, texts))
    return {"prompts": count, "tasks": tally.tasks()}


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    p, spread = right / asked, z * z / asked
    middle = (p + spread / 2) / (1 + spread)
    half = z * (p * (1 - p) / asked + spread / asked / 4) ** 0.5 / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def report(result: dict[str, Any]) -> list[str]:
    """A row for every task, a column for every set of pictures, in Markdown."""
    results = result["results"]
    rows = []
    for task in (*TASKS, "all"):
        cells = [measured["tasks"].get(task) for measured in results.values()]
        counts = [f"{percent(c)} ({c['right']}/{c['asked']})" if c else "-" for c in cells]
        rows.append([task, *counts])
    return [*heading("The demonstration model, unpruned", result), *table(["task", *results], rows)]


def percent(cell: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = (100 * end for end in cell["interval"])
    return f"{100 * cell['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"


def main() -> None:
    """Parse the command line, measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the exported checkpoint")
    parser.add_argument("--pictures", type=int, default=250, help="prompts of the main set")
    parser.add_argument("--others", type=int, default=60, help="prompts of each of the other sets")
    parser.add_argument("--out", type=output, help="write OUT.json and OUT.md")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    answerer, studio = Answerer(args.model), Studio("test")
    sets = {
        "144 visual tokens": (square, args.pictures),
        "64 to 192 tokens": (sizes, args.others),
        "two pictures": (pairs, args.others),
    }
    result = {
        **environment(PACKAGES),
        "seed": SEED,
        "results": {
            name: measure(answerer, draw(studio, count), count, name)
            for name, (draw, count) in sets.items()
            if count
        },
    }
    publish(result, report(result), args.out)


if __name__ == "__main__":
    main()
