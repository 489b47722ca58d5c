"""Recordings beside each other: where engines differ, and what each of them can do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ep_conformance.recording import Outcome, Recording

Answers = Mapping[str, Mapping[str, Any]]  # of one request, by column


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Attributes:
        lines: for people, one for each difference and failure.
        tests: how many tests two recordings or more have answers of.
        failed: how many outcomes are failures.
    """

    lines: list[str]
    tests: int
    failed: int


def columns(recordings: Sequence[Recording]) -> list[str]:
    """A name for each recording: the engine, its version and the device.

    Raises:
        ValueError: two recordings have the same.
    """
    names = []
    for recording in recordings:
        under = recording.conditions
        where = under.device.upper() if under.device == "cpu" else under.hardware
        names.append(
            f"{under.backend} {under.versions.get(under.backend, '')}".strip() + f", {where}"
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]!r} was recorded twice; compare it once")
    return names


def compare(recordings: Sequence[Recording]) -> Compared:
    """Set the recordings beside each other, test by test.

    An engine's own run says whether a difference is within the noise of the scores: it compared
    each answer with the oracle's. What differs between engines is listed in any case.
    """
    names = columns(recordings)
    lines: list[str] = []
    tests = failed = 0
    for test in _tests(recordings):
        ended = {
            name: recording.outcomes[test]
            for name, recording in zip(names, recordings, strict=True)
            if test in recording.outcomes
        }
        for name, outcome in ended.items():
            if outcome.outcome == "failed":
                failed += 1
                lines.append(f"{test}: {name} failed")
        answers = {
            name: outcome.answers
            for name, outcome in ended.items()
            if outcome.answers and outcome.outcome != "xfailed"  # its reason is in the matrix
        }
        if len(answers) > 1:
            tests += 1
            for request, each in enumerate(zip(*answers.values(), strict=True)):
                where = f"{test}, request {request}"
                lines += _differences(where, dict(zip(answers, each, strict=True)))
    return Compared(lines, tests, failed)


def matrix(recordings: Sequence[Recording]) -> str:
    """What was tested of each engine, as a Markdown table with the reasons of what was not."""
    names = columns(recordings)
    rows: dict[str, None] = {}
    for recording in recordings:
        rows |= dict.fromkeys(outcome.row for outcome in recording.outcomes.values())
    notes: dict[str, int] = {}
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = [
            _cell([o for o in recording.outcomes.values() if o.row == row], notes)
            for recording in recordings
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    return "\n".join(lines).rstrip()


def _tests(recordings: Sequence[Recording]) -> list[str]:
    return list(dict.fromkeys(test for recording in recordings for test in recording.outcomes))


def _cell(outcomes: Sequence[Outcome], notes: dict[str, int]) -> str:
    """How many tests passed and failed, and a note for each reason why one did not run."""
    if not outcomes:
        return "not run"
    count = {
        kind: sum(outcome.outcome == kind for outcome in outcomes)
        for kind in ("passed", "failed", "xfailed", "skipped")
    }
    words = [
        f"{number} {kind}".replace("xfailed", "known to fail")
        for kind, number in count.items()
        if number and kind != "skipped"
    ]
    reasons = dict.fromkeys(o.reason for o in outcomes if o.outcome in ("skipped", "xfailed"))
    marks = [str(notes.setdefault(reason or "no reason", len(notes) + 1)) for reason in reasons]
    if marks:
        words.append(f"{'' if words else '- '}({', '.join(marks)})")
    return " ".join(words)


def _differences(where: str, answers: Answers) -> Iterator[str]:
    """How the answers of one request differ."""
    shapes = {
        name: [(span["start"], span["stop"]) for span in answer["spans"]]
        for name, answer in answers.items()
    }
    if len({str(shape) for shape in shapes.values()}) > 1:
        yield f"{where}: pictures are at {shapes}"
        return
    first = next(iter(answers.values()))
    same = True
    for picture, span in enumerate(first["spans"]):
        kept = {name: set(answer["spans"][picture]["kept"]) for name, answer in answers.items()}
        union, common = set.union(*kept.values()), set.intersection(*kept.values())
        scores = first["scores"] and first["scores"][picture]
        for token in sorted(union - common):
            same = False
            by = [name for name, tokens in kept.items() if token in tokens]
            yield (
                f"{where}, picture {picture} [{span['start']}, {span['stop']}): token {token} is "
                f"kept by {' and '.join(by)} only; {_miss(scores, token, len(span['kept']))}"
            )
    said = {name: answer.get("output_ids") for name, answer in answers.items()}
    if same and len({str(ids) for ids in said.values()}) > 1:
        yield f"{where}: the same tokens are kept, but the answers are {said}"


def _miss(scores: Sequence[float | None] | None, token: int, keep: int) -> str:
    """How far a token's score is from the least score that stays."""
    if scores is None:
        return "a set selection has no scores"
    ranked = sorted((-math.inf if s is None else s for s in scores), reverse=True)
    score = scores[token]
    if score is None:
        return "its score is not finite"
    return f"its score {score:.7g} is {abs(score - ranked[keep - 1]):.1e} from the threshold"
