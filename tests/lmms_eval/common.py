"""What the tests of the harness share: the command, the bundled questions, answers without it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ep_core import demo
from ep_core.backend import Request
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

EXAMPLE = Path(__file__).parents[2] / "examples/eval_task"
POLICY = "layer=2,keep=0.25,method=set-entropy"
QUESTIONS = [
    (demo.PICTURES / picture["image"], question["question"], question["answer"])
    for picture in json.loads((demo.PICTURES / "samples.json").read_text())
    for question in picture["questions"]
]


def entropyprune(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command; the harness keeps its data where HF_HOME says."""
    return subprocess.run(
        [Path(sys.executable).with_name("entropyprune"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, **environment},
    )


def evaluate_here(
    folder: Path, task: str, tasks: Path = EXAMPLE, **settings: object
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command's own process does, in this one: what it measured, and what it counted."""
    from ep_backends.lmms_eval.__main__ import run

    model = {"model": str(demo.MODEL), "backend": "transformers", "policy": None, "dtype": None}
    common = {"tasks": [task], "batch_size": 1, "limit": None, "log_samples": True}
    common |= {"out": str(folder), "arguments": ["--include_path", str(tasks)]}
    read, write = os.pipe()
    try:
        measured = run(common | ({} if "endpoint" in settings else model) | settings, write)
    finally:
        os.close(write)
        with os.fdopen(read) as channel:
            messages = [json.loads(line) for line in channel]
    return measured, messages[-1]["counts"]


def answers_without_harness(policy: str | None, questions=QUESTIONS) -> list[str]:
    """The engine asked directly, one question at a time."""
    pruning = None if policy is None else PruningPolicy.parse(policy)
    with registry().backend("transformers").load().open(demo.MODEL, pruning) as session:
        return [
            session.generate([Request((picture, question), 8)])[0].text
            for picture, question, _ in questions
        ]


def share_correct(answers: list[str], questions=QUESTIONS) -> float:
    """Of answers that are the expected one, but for case; the bundled ones hold no punctuation."""
    pairs = zip(answers, questions, strict=True)
    return sum(said.lower() == expected for said, (_, _, expected) in pairs) / len(questions)


def logged_answers(folder: Path) -> list[str]:
    """What lmms-eval scored, from the log that it wrote under a run's folder."""
    (log,) = folder.rglob("*samples_demo_pictures.jsonl")
    samples = map(json.loads, log.read_text().splitlines())
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in ordered]
