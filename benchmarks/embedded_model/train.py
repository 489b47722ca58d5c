"""Train the embedded model, in two stages.

    python -m benchmarks.embedded_model.train vision \\
        --steps 1600 --batch 16 --rate 2e-3 --save runs/vision.pt
    python -m benchmarks.embedded_model.train language \\
        --steps 900 --batch 8 --rate 1e-3 --save runs/language.pt --start runs/vision.pt

`vision` teaches the vision tower what lies on each visual token; `language` teaches the whole model
to answer questions. The batch of a step depends only on (seed, stage, step): no picture is seen
twice, and a run that was stopped goes on from its last checkpoint as if it had not been.
"""

import argparse
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.embedded_model.model import Student
from benchmarks.embedded_model.prompts import Batch, Prompt, collate
from benchmarks.embedded_model.scenes import Rng, Studio, ask

STREAMS = {"vision": 6, "language": 8}  # any two numbers: each stage draws its own pictures
SQUARE = (12, 12)
SMALL = ((8, 8), (8, 10), (10, 8), (10, 10))  # as many things on fewer tokens: cheap to learn from
LARGE = ((8, 12), (12, 8), (10, 14), (14, 10), (12, 16), (16, 12))
TASK_WEIGHTS = {
    "color": 2.0,
    "shape": 1.0,
    "count": 2.0,
    "number": 2.0,
    "handwritten": 1.5,
    "relation": 2.0,
    "exist": 2.0,
    "position": 1.0,
}
QUESTIONS = 10  # asked of one prompt
TEXT_BUDGET = 128  # tokens for them
GROWN_UP = 0.5  # after this part of the language stage, pictures are large and come in pairs too
MUON_FACTOR = 4  # Muon's rate over AdamW's
WARM_UP = 50  # steps
REPORT, CHECKPOINT = 50, 100  # steps between lines of the log, and between checkpoints


@dataclass(frozen=True)
class Run:
    """What decides the result of a stage, with the weights it starts from."""

    stage: str
    steps: int
    batch: int
    rate: float
    seed: int


class Lessons(Dataset[Batch]):
    """The batch of every step of a run."""

    def __init__(self, run: Run, first: int) -> None:
        self.run, self.first = run, first
        self.studio = Studio("train")

    def __len__(self) -> int:
        return self.run.steps - self.first

    def __getitem__(self, index: int) -> Batch:
        step = self.first + index
        rng = np.random.default_rng((self.run.seed, STREAMS[self.run.stage], step))
        if self.run.stage == "vision":
            grids, questions, budget = [_pick(rng, SMALL)], 0, 0
        else:
            grids = self._grids(rng, step / self.run.steps)
            questions, budget = QUESTIONS, TEXT_BUDGET
        prompts = [self._prompt(rng, grids, questions) for _ in range(self.run.batch)]
        return collate(prompts, budget)

    def _grids(self, rng: Rng, progress: float) -> list[tuple[int, int]]:
        kind = rng.random()
        if progress < GROWN_UP:
            return [SQUARE] if kind < 0.25 else [_pick(rng, SMALL)]
        if kind < 0.1:
            return [_pick(rng, SMALL), _pick(rng, SMALL)]
        if kind < 0.25:
            return [_pick(rng, SMALL + LARGE)]
        return [SQUARE]

    def _prompt(self, rng: Rng, grids: list[tuple[int, int]], questions: int) -> Prompt:
        prompt = Prompt([self.studio.picture(rng, grid) for grid in grids], [])
        weights = np.array(list(TASK_WEIGHTS.values()))
        asked = set()
        while len(prompt.questions) < questions:
            which = int(rng.integers(len(grids)))
            task = rng.choice(list(TASK_WEIGHTS), p=weights / weights.sum())
            question = ask(rng, prompt.pictures[which], task)
            if question and (which, question.text) not in asked:
                asked.add((which, question.text))
                prompt.questions.append((which, question))
        return prompt


class Optimizers:
    """Muon for the matrices between the layers, AdamW for the rest."""

    def __init__(self, student: Student, run: Run) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in student.named_parameters():
            hidden = "visual.blocks" in name or "visual.merger" in name or ".layers." in name
            (matrices if hidden and parameter.ndim == 2 else rest).append(parameter)
        self.run = run
        self.parts = [
            torch.optim.Muon(
                matrices, lr=run.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=run.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def step(self, step: int) -> None:
        """Warm up, then a cosine down to 2 % of the rate."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.run.steps))
        rate = self.run.rate * min(1, (step + 1) / WARM_UP) * (0.02 + 0.98 * cosine)
        for part, factor in zip(self.parts, (MUON_FACTOR, 1), strict=True):
            for group in part.param_groups:
                group["lr"] = factor * rate
            part.step()
            part.zero_grad()


def train(run: Run, save: Path, start: Path | None) -> None:
    """Take all the steps that `save` does not have yet."""
    student = Student(run.seed)
    optimizers = Optimizers(student, run)
    first = 0
    if save.exists():
        checkpoint = torch.load(save)
        first = checkpoint["step"]
        student.load_state_dict(checkpoint["student"])
        for part, state in zip(optimizers.parts, checkpoint["optimizers"], strict=True):
            part.load_state_dict(state)
    elif start:
        student.take_vision(torch.load(start)["student"])
    save.parent.mkdir(parents=True, exist_ok=True)

    lessons = DataLoader(Lessons(run, first), batch_size=None, num_workers=1)
    bar = tqdm(lessons, initial=first, total=run.steps, desc=run.stage, mininterval=5)
    record: dict[str, list[float]] = defaultdict(list)
    for step, batch in enumerate(bar, start=first):
        with torch.autocast("cpu", torch.bfloat16):
            outcome = student.study(batch, run.stage)
        torch.autograd.backward(outcome.loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizers.step(step)
        for name, value in outcome.report.items():
            record[name].append(value)
        if (step + 1) % REPORT == 0:
            means = {name: round(float(np.mean(values)), 3) for name, values in record.items()}
            seconds = round(bar.format_dict["elapsed"])
            bar.write(json.dumps({"step": step + 1, "seconds": seconds} | means))
            record.clear()
        if (step + 1) % CHECKPOINT == 0 or step + 1 == run.steps:
            temporary = save.with_suffix(".tmp")
            torch.save(
                {
                    "step": step + 1,
                    "student": student.state_dict(),
                    "optimizers": [part.state_dict() for part in optimizers.parts],
                },
                temporary,
            )
            temporary.replace(save)


def _pick(rng: Rng, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    return grids[rng.integers(len(grids))]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train one stage of the embedded model.")
    parser.add_argument("stage", choices=STREAMS)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="prompts in one step")
    parser.add_argument("--rate", type=float, required=True, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, required=True, help="checkpoint; resumed if it exists")
    parser.add_argument("--start", type=Path, help="checkpoint of the vision stage to start from")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.stage, args.steps, args.batch, args.rate, args.seed)
    train(run, args.save, args.start)


if __name__ == "__main__":
    main()
