"""Training batches: pictures, many questions packed behind each, and what lies on each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.embedded_model.prompts import MERGE, patchify
from benchmarks.embedded_model.scenes import COLORS, SHAPES, Picture, Question
from benchmarks.embedded_model.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    PROMPT_END,
    PROMPT_START,
    VISION_END,
    VISION_START,
)

LABELS = {  # the classes of each column of token_labels; 0 is none
    "shape": 1 + len(SHAPES),
    "color": 1 + len(COLORS),
    "tens": 11,
    "ones": 11,
    "digit": 11,
}
DETAIL = 4  # token_pixels tells the mean colour of DETAIL x DETAIL parts of a token
PIXELS = 3 * DETAIL**2


@dataclass
class Prompt:
    """A picture and the questions that are packed behind it."""

    picture: Picture
    questions: list[Question]


@dataclass
class Batch:
    """Prompts whose pictures have the same grid. `at` indexes the flattened [B * L] tokens."""

    patches: Tensor  # [patches, 1176]
    grids: Tensor  # [B, 3]: frames, rows and columns of patches
    labels: Tensor  # [visual tokens, len(LABELS)]
    pixels: Tensor  # [visual tokens, PIXELS]
    words: Tensor  # [visual tokens, 2]: token ids that name what lies there, -1 where nothing does
    ids: Tensor  # [B, L]
    is_visual: Tensor  # [B, L]
    segments: Tensor  # [B, L]: 0 for the picture, n for the nth question, -1 for padding
    positions: Tensor  # [3, B, L]
    mask: Tensor  # [B, 1, L, L]: True where a token attends
    at: Tensor  # [targets]: the tokens that an answer's token follows
    targets: Tensor  # [targets]: that token
    question: Tensor  # [targets]: the index of its question in `tasks`
    tasks: list[str]  # of each question


def collate(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> Batch:
    """Put all questions of each prompt, with their answers, behind its picture.

    A question attends to the picture and to itself, and its positions follow the picture's
    directly: each one sees what it would see alone.
    """
    grid = prompts[0].picture.grid
    prefix, prefix_positions = picture_prefix(grid, tokenizer)
    following = int(prefix_positions.max()) + 1
    rows = [_pack(prompt.questions, tokenizer) for prompt in prompts]
    length = len(prefix) + max(len(row) for row, _ in rows)
    length += -length % 16  # few different lengths, so that kernels are found again
    size = len(prompts)
    ids = torch.full((size, length), _token(tokenizer, END_OF_TEXT))
    segments = torch.full((size, length), -1)
    positions = torch.zeros(3, size, length, dtype=torch.long)
    ids[:, : len(prefix)] = torch.tensor(prefix)
    segments[:, : len(prefix)] = 0
    positions[:, :, : len(prefix)] = prefix_positions[:, None]
    at: list[int] = []
    targets: list[int] = []
    question: list[int] = []
    tasks: list[str] = []
    for b, (row, spans) in enumerate(rows):
        ids[b, len(prefix) : len(prefix) + len(row)] = torch.tensor(row, dtype=torch.long)
        for n, (start, answer, end) in enumerate(spans, start=1):
            here = slice(len(prefix) + start, len(prefix) + end)
            segments[b, here] = n
            positions[:, b, here] = following + torch.arange(end - start)
            first = b * length + len(prefix) + answer - 1
            at += range(first, first + end - answer)
            targets += row[answer:end]
            question += [len(tasks)] * (end - answer)
            tasks.append(prompts[b].questions[n - 1].task)
    pictures = [prompt.picture for prompt in prompts]
    return Batch(
        patches=torch.cat([patchify(picture.pixels) for picture in pictures]),
        grids=torch.tensor([[1, MERGE * grid[0], MERGE * grid[1]]] * size),
        labels=torch.cat([token_labels(picture) for picture in pictures]),
        pixels=torch.cat([token_pixels(picture) for picture in pictures]),
        words=torch.cat([token_words(picture, tokenizer) for picture in pictures]),
        ids=ids,
        is_visual=ids.eq(_token(tokenizer, IMAGE_PAD)),
        segments=segments,
        positions=positions,
        mask=visibility(segments),
        at=torch.tensor(at, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        question=torch.tensor(question, dtype=torch.long),
        tasks=tasks,
    )


def picture_prefix(grid: tuple[int, int], tokenizer: Tokenizer) -> tuple[list[int], Tensor]:
    """Token ids and M-RoPE positions [3, L] (frame, row, column) of a prompt up to its question."""
    rows, columns = grid
    start = tokenizer.encode(PROMPT_START + VISION_START).ids
    pads = [_token(tokenizer, IMAGE_PAD)] * (rows * columns)
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
    positions = [
        torch.arange(len(start)).expand(3, -1),
        len(start) + torch.cat([torch.zeros_like(place[:1]), place]),
        torch.full((3, 1), len(start) + max(rows, columns)),
    ]
    return [*start, *pads, _token(tokenizer, VISION_END)], torch.cat(positions, 1)


def visibility(segments: Tensor) -> Tensor:
    """[B, L] -> [B, 1, L, L]: whether a token attends to another one."""
    asking, asked = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    return (causal & ((asked == 0) | (asked == asking)))[:, None]


def token_labels(picture: Picture) -> Tensor:
    """[rows * columns, len(LABELS)]: what lies on each visual token."""
    labels = np.zeros((*picture.grid, len(LABELS)), np.int64)
    shapes, colors = list(SHAPES), list(COLORS)
    for i, thing in enumerate(picture.things):
        mine = picture.owner == i
        if thing.shape:
            labels[mine, 0] = 1 + shapes.index(thing.shape)
            labels[mine, 1] = 1 + colors.index(thing.color)
        elif thing.number:
            labels[mine, 2], labels[mine, 3] = (1 + int(digit) for digit in thing.number)
        else:
            labels[mine, 4] = 1 + int(thing.digit)
    return torch.from_numpy(labels).flatten(0, 1)


def token_words(picture: Picture, tokenizer: Tokenizer) -> Tensor:
    """[rows * columns, 2]: two words for what lies on each visual token, -1 where nothing does.

    Of a number, the tokens on its left half show the tens and the others the ones.
    """
    words = np.full((*picture.grid, 2), -1)
    columns = np.arange(picture.grid[1]) + 0.5

    def first(text: str) -> int:
        return int(tokenizer.encode(text).ids[0])

    for i, thing in enumerate(picture.things):
        mine = picture.owner == i
        if thing.shape:
            words[mine] = first(f" {thing.color}"), first(f" {thing.shape}")
        elif thing.number:
            left = np.broadcast_to(columns < thing.center[1], mine.shape)
            words[mine & left] = first(" number"), first(thing.number[0])
            words[mine & ~left] = first(" number"), first(thing.number[1])
        else:
            words[mine] = first(" digit"), first(thing.digit)
    return torch.from_numpy(words).flatten(0, 1)


def token_pixels(picture: Picture) -> Tensor:
    """[rows * columns, PIXELS]: how each visual token looks, from -1 to 1."""
    rows, columns = picture.grid
    pixels = torch.from_numpy(picture.pixels).float() / 127.5 - 1
    part = pixels.shape[0] // (rows * DETAIL)
    coarse = pixels.view(rows, DETAIL, part, columns, DETAIL, part, 3).mean((2, 5))
    return coarse.permute(0, 2, 1, 3, 4).reshape(rows * columns, PIXELS)


def _token(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token that is known to exist."""
    found = tokenizer.token_to_id(name)
    assert found is not None, name
    return found


def _pack(
    questions: Sequence[Question], tokenizer: Tokenizer
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Token ids of all questions, and where each question, its answer and its end are."""
    ids: list[int] = []
    spans = []
    for question in questions:
        start = len(ids)
        ids += tokenizer.encode(question.text + PROMPT_END).ids
        answer = len(ids)
        ids += tokenizer.encode(question.answer + IM_END).ids
        spans.append((start, answer, len(ids)))
    return ids, spans
