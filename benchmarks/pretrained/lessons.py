"""Which pictures and questions a training step and an evaluation see."""

from collections.abc import Callable
from functools import cache, partial
from typing import Literal, get_args

import numpy as np

from benchmarks.embedded_model.scenes import (
    CORNERS,
    TASKS,
    Picture,
    Question,
    Rng,
    Split,
    Studio,
    Thing,
    ask,
)
from benchmarks.pretrained.packing import Prompt
from benchmarks.pretrained.scenes import ClutteredStudio

Part = Literal["look", "ask"]
GRIDS = ((8, 8), (8, 10), (10, 8), (10, 10), (12, 12), (12, 12), (8, 12), (12, 8), (12, 16))
SQUARE = (12, 12)
KINDS: dict[str, Callable[[Split], Studio]] = {
    "plain": Studio,
    "cluttered": ClutteredStudio,
    # One shape: nothing has to be told apart, which SmolLM2 untrained cannot do in text either.
    "single": partial(ClutteredStudio, shapes=(1, 1)),
}
KIND_SHARES = {"plain": 0.3, "cluttered": 0.45, "single": 0.25}
TASK_WEIGHTS = {
    "color": 2.0,
    "shape": 2.0,
    "count": 1.5,
    "number": 1.0,
    "handwritten": 1.0,
    "relation": 2.0,
    "exist": 2.0,
    "position": 1.5,
}
QUESTIONS = 10  # of these tasks, about one picture; two more say what is where
HELD_OUT_SEED = 777


@cache
def studio(kind: str, split: Split) -> Studio:
    """The studio of a kind of picture; loading its photographs takes a second."""
    return KINDS[kind](split)


def lesson(step: tuple[int, int, int], part: Part, size: int) -> list[Prompt]:
    """The prompts of a part of a step (seed, stage, number), always the same ones.

    Nothing is asked about pictures that are only looked at.
    """
    rng = np.random.default_rng((*step, get_args(Part).index(part)))
    grid = GRIDS[rng.integers(len(GRIDS))]
    return [_prompt(rng, grid, part == "ask") for _ in range(size)]


def exam(kind: str, first: int, size: int, grid: tuple[int, int] = SQUARE) -> list[Prompt]:
    """Held-out prompts `first` to `first + size`: one question of every task about each."""
    prompts = []
    for i in range(first, first + size):
        rng = np.random.default_rng((HELD_OUT_SEED, list(KINDS).index(kind), i))
        picture = studio(kind, "test").picture(rng, grid)
        prompts.append(Prompt(picture, ask_each(rng, picture)))
    return prompts


def ask_about(rng: Rng, picture: Picture, task: str) -> Question | None:
    """A random question of one task, or None where the picture allows none."""
    shapes = sum(bool(thing.shape) for thing in picture.things)
    return None if task == "relation" and shapes < 2 else ask(rng, picture, task)


def ask_each(rng: Rng, picture: Picture, attempts: int = 10) -> list[Question]:
    """One question of every task that the picture allows."""
    questions = []
    for task in TASKS:
        tries = (ask_about(rng, picture, task) for _ in range(attempts))
        questions += [question for question in tries if question is not None][:1]
    return questions


def ask_all(picture: Picture) -> Question:
    """What there is, from left to right. Only training asks this: it has much to answer."""
    things = sorted(picture.things, key=lambda thing: thing.center[1])
    answer = ", ".join(_called(thing) for thing in things)
    return Question("all", "list everything from left to right.", answer, (), ())


def ask_corner(rng: Rng, picture: Picture) -> Question:
    """What there is in one quarter of the picture, from left to right. Only training asks this."""
    corner = int(rng.integers(len(CORNERS)))
    middle = np.array(picture.grid) / 2
    inside = [
        thing
        for thing in sorted(picture.things, key=lambda thing: thing.center[1])
        if 2 * (thing.center[0] > middle[0]) + (thing.center[1] > middle[1]) == corner
    ]
    answer = ", ".join(_called(thing) for thing in inside) or "nothing"
    return Question("corner", f"what is {CORNERS[corner]}?", answer, (), ())


def _prompt(rng: Rng, grid: tuple[int, int], questioned: bool) -> Prompt:
    kind = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    picture = studio(kind, "train").picture(rng, grid)
    if not questioned:
        return Prompt(picture, [])
    questions = {q.text: q for q in (ask_all(picture), ask_corner(rng, picture))}
    weights = np.array(list(TASK_WEIGHTS.values()))
    for task in rng.choice(list(TASK_WEIGHTS), 2 * QUESTIONS, p=weights / weights.sum()):
        question = ask_about(rng, picture, str(task))
        if question and len(questions) < QUESTIONS + 2:
            questions.setdefault(question.text, question)
    return Prompt(picture, list(questions.values()))


def _called(thing: Thing) -> str:
    if thing.shape:
        return thing.name
    return f"number {thing.number}" if thing.number else f"digit {thing.digit}"


assert set(TASK_WEIGHTS) == set(TASKS)
