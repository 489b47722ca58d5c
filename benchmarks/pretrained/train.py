"""Train the model: the vision side alone, then through the frozen decoder, then a tuned decoder.

    python -m benchmarks.pretrained.train --out FOLDER

Three stages, each of which starts from what the one before has learnt:

* `vision`: tower and merger learn to tell what lies on every visual token, in words of the decoder;
* `frozen`: tower and merger learn from answers, through the frozen decoder (the first variant);
* `tuned`: low-rank updates of the decoder learn as well (the second variant).

The batches of a step depend only on (seed, stage, step). A stage ends after its steps or its share
of `--hours`, whichever comes first, and its learning rate falls accordingly. Hours are CPU time:
beside other work a training takes longer, not fewer steps. The folder gets a checkpoint of each
stage, snapshots along the way, a log, and each variant as a checkpoint folder. Called again, the
command goes on from the last checkpoints, to the end of longer `--hours` if these are given.
"""

import argparse
import fcntl
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pretrained.export import export
from benchmarks.pretrained.lessons import KINDS, Part, exam, lesson
from benchmarks.pretrained.model import Student, add_updates, build_model, build_tokenizer
from benchmarks.pretrained.packing import Batch, collate

WARM_UP, LAST_RATE = 30, 0.03  # steps; the part of the peak rate at the end
REPORT, CHECKPOINT, EXAM = 25, 25, 100  # steps between lines of the log, checkpoints and exams
EXAM_PICTURES, EXAM_BATCH = 12, 4  # of each kind
LAST_EXAM_PICTURES = 80


@dataclass(frozen=True)
class Stage:
    """What decides the result of a stage, with the weights it starts from."""

    name: str
    steps: int
    share: float  # of the CPU time
    asked_about: int  # pictures in a step: behind some, questions are packed
    looked_at: int  # others only train the heads that tell what lies where, at a tenth of the cost
    label_weight: float  # of the losses of these heads
    word_weight: float  # of the likeness of visual tokens to words
    vision_rate: float  # peak learning rates
    decoder_rate: float


STAGES = (
    Stage("vision", 1800, 0.15, 0, 8, 1.0, 1.0, 2e-3, 0.0),
    Stage("frozen", 1400, 0.30, 2, 4, 0.3, 0.0, 1e-3, 0.0),
    Stage("tuned", 2400, 0.55, 2, 4, 0.3, 0.0, 5e-4, 1e-3),
)
SNAPSHOTS = (0, 50, 100, 200, 400, 800, 1600)  # steps whose weights are kept


class Training:
    """One stage of a run, and its files in the folder `out`."""

    def __init__(self, out: Path, index: int, student: Student, tokenizer: Tokenizer) -> None:
        self.out, self.index, self.stage = out, index, STAGES[index]
        self.student, self.tokenizer = student, tokenizer
        self.path = out / f"{self.stage.name}.pt"
        decoder = [p for n, p in student.named_parameters() if n.endswith((".up", ".down"))]
        known = {id(p) for p in decoder}
        vision = [p for p in student.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": vision, "peak": self.stage.vision_rate}]
        if decoder:
            groups.append({"params": decoder, "peak": self.stage.decoder_rate})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.seconds = 0, 0.0  # seconds of CPU time
        before = out / f"{STAGES[index - 1].name}.pt"
        if self.path.exists():
            checkpoint = torch.load(self.path)
            student.take(checkpoint["student"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        elif index:
            if not before.exists():
                raise SystemExit(f"{before} is missing: train {STAGES[index - 1].name} first")
            student.take(torch.load(before)["student"])

    def run(self, hours: float, seed: int) -> None:
        """Take the steps that are left, and write what the stage has to show."""
        limit = 3600 * hours * self.stage.share
        first = self.step
        record: dict[str, list[float]] = defaultdict(list)
        last = time.process_time()
        while (progress := max(self.step / self.stage.steps, self.seconds / limit)) < 1:
            if self.step in SNAPSHOTS:
                self._snapshot()
            for name, value in self.learn(seed, progress).items():
                record[name].append(value)
            self.step += 1
            now = time.process_time()
            self.seconds, last = self.seconds + now - last, now
            if self.step % REPORT == 0:
                self._log({name: round(float(np.mean(x)), 3) for name, x in record.items()})
                record.clear()
            if self.stage.asked_about and self.step % EXAM == 0:
                self._log(examine(self.student, self.tokenizer, EXAM_PICTURES))
            if self.step % CHECKPOINT == 0:
                self._save()
        folder = self.out / self.stage.name
        if self.stage.asked_about and (self.step > first or not folder.exists()):
            self._log(examine(self.student, self.tokenizer, LAST_EXAM_PICTURES))
            export(self.student.model, self.tokenizer, folder)
        self._save()

    def learn(self, seed: int, progress: float) -> dict[str, float]:
        """Take one step -> losses and accuracies, for the log."""
        stage, student = self.stage, self.student
        rate = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate * min(1, (self.step + 1) / WARM_UP)
        report: dict[str, float] = {}
        with torch.autocast("cpu", torch.bfloat16):
            batch = self._batch(seed, "look", stage.looked_at)
            visual = student.see(batch)
            labels = student.label_losses(batch, visual)
            words = student.word_loss(batch, visual)
            loss = stage.label_weight * torch.stack(list(labels.values())).sum()
            loss = loss + stage.word_weight * words
            report |= {name: part.item() for name, part in labels.items()} | {"words": words.item()}
            if stage.asked_about:
                batch = self._batch(seed, "ask", stage.asked_about)
                scores = student.answer(batch, student.see(batch))
                answers = F.cross_entropy(scores, batch.targets)
                loss = loss + answers
                report["answers"] = answers.item()
                for task, right in right_answers(batch, scores).items():
                    report[f"right: {task}"] = float(np.mean(right))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return report

    def _batch(self, seed: int, part: Part, size: int) -> Batch:
        return collate(lesson((seed, self.index, self.step), part, size), self.tokenizer)

    def _log(self, values: dict[str, Any]) -> None:
        where = {"stage": self.stage.name, "step": self.step, "seconds": round(self.seconds)}
        line = json.dumps(where | values)
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "student": self.student.trained(),
            "optimizer": self.optimizer.state_dict(),
        }
        save(state, self.path)

    def _snapshot(self) -> None:
        path = self.out / "snapshots" / f"{self.stage.name}-{self.step:05d}.pt"
        path.parent.mkdir(exist_ok=True)
        save({"student": self.student.trained()}, path)


def right_answers(batch: Batch, scores: Tensor) -> dict[str, list[bool]]:
    """For each task, whether each of its answers is right in every token, its end included."""
    wrong = torch.zeros(len(batch.tasks)).index_add(
        0, batch.question, (scores.argmax(-1) != batch.targets).float()
    )
    found: dict[str, list[bool]] = defaultdict(list)
    for task, errors in zip(batch.tasks, wrong.tolist(), strict=True):
        found[task].append(errors == 0)
    return found


@torch.no_grad()
def examine(student: Student, tokenizer: Tokenizer, pictures: int) -> dict[str, Any]:
    """Held-out accuracy of every task on each kind of picture, and how many were asked."""
    results: dict[str, Any] = {}
    for kind in KINDS:
        found: dict[str, list[bool]] = defaultdict(list)
        for batch in exam_batches(kind, pictures, tokenizer):
            with torch.autocast("cpu", torch.bfloat16):
                scores = student.answer(batch, student.see(batch))
            for task, right in right_answers(batch, scores).items():
                found[task] += right
                found["mean"] += right
        results[kind] = {task: round(float(np.mean(x)), 3) for task, x in found.items()}
        results[kind]["asked"] = len(found["mean"])
    return {"held out": results}


def exam_batches(kind: str, pictures: int, tokenizer: Tokenizer) -> Iterator[Batch]:
    """The first held-out pictures of a kind, a few at a time."""
    for first in range(0, pictures, EXAM_BATCH):
        yield collate(exam(kind, first, min(EXAM_BATCH, pictures - first)), tokenizer)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a file that is complete whenever it exists."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def main() -> None:
    """Parse the command line and go through the stages."""
    parser = argparse.ArgumentParser(description="Train both variants, or go on with it.")
    parser.add_argument("--out", type=Path, required=True, help="folder; resumed if it exists")
    parser.add_argument("--hours", type=float, default=2.3, help="bound on the CPU time")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"{args.out}: another training writes to this folder")
        tokenizer = build_tokenizer()
        student = Student(build_model(tokenizer))
        for index, stage in enumerate(STAGES):
            if stage.decoder_rate:
                add_updates(student.model)
            if stage.name in args.stages:
                Training(args.out, index, student, tokenizer).run(args.hours, args.seed)


if __name__ == "__main__":
    main()
