"""Prompts as tensors: image patches, M-RoPE positions, and packed batches for training."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.embedded_model.scenes import COLORS, DRAWN, SCALE, SHAPES, Picture, Pixels, Question
from benchmarks.embedded_model.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    PROMPT_END,
    PROMPT_START,
    build_tokenizer,
    token_id,
    visual_span,
)

PATCH, MERGE, FRAMES = 14, 2, 2  # pixels a patch, patches a visual token, copies of a still picture
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
UNIT = 6  # visual tokens in one unit of the places that the training-only heads predict

assert PATCH * MERGE == DRAWN * SCALE


@dataclass
class Prompt:
    """Pictures, and questions about them that training packs behind the same visual tokens."""

    pictures: list[Picture]
    questions: list[tuple[int, Question]]  # which picture, and what is asked of it


@dataclass
class Pack:
    """The questions of one prompt, one behind the other. `*_at` count from the first token."""

    ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)  # 1, 1, .., 2, 2, ..: the question of a token
    offsets: list[int] = field(default_factory=list)  # 0, 1, .., 0, 1, ..: its place in there
    target_at: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)  # the token that follows
    tasks: list[str] = field(default_factory=list)  # of each question
    look_at: list[int] = field(default_factory=list)
    looks: list[tuple[int, int | None]] = field(default_factory=list)  # picture and thing, if any
    look_shares: list[float] = field(default_factory=list)
    single_at: list[int] = field(default_factory=list)
    singles: list[NDArray[Any]] = field(default_factory=list)
    direction_at: list[int] = field(default_factory=list)
    directions: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Batch:
    """Prompts whose pictures have the same grids. `*_at` index the flattened [B * L] tokens."""

    patches: Tensor  # [patches, 1176]
    grids: Tensor  # [pictures, 3]: frames, rows and columns of patches
    labels: Tensor  # [visual tokens, heads], see token_labels
    places: Tensor  # [visual tokens, 2]: row and column, in UNITs
    ids: Tensor  # [B, L]
    is_visual: Tensor  # [B, L]
    segments: Tensor  # [B, L]: 0 for the pictures, n for the nth question, -1 for padding
    positions: Tensor  # [3, B, L]
    mask: Tensor  # [B, 1, L, L]: added to the attention scores
    target_at: Tensor
    targets: Tensor
    tasks: list[str]  # of each question
    question: Tensor  # of each target: the index of its question in `tasks`
    look_at: Tensor  # the tokens that should attend to something
    looks: Tensor  # [looks, L]: 1 for what that is, else 0
    look_shares: Tensor  # [looks]: the part of the attention that it should get
    single_at: Tensor  # the tokens that end the mention of a single thing
    singles: Tensor  # [singles, 2]: the place of that thing from the picture's centre
    direction_at: Tensor
    directions: Tensor  # [directions, 2]


def patchify(pixels: Pixels) -> Tensor:
    """[H, W, 3] -> [patches, 1176], in the order and scale of the Qwen2-VL image processor."""
    image = (torch.from_numpy(pixels) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    height, width, channels = image.shape
    blocks = image.view(
        height // (PATCH * MERGE), MERGE, PATCH, width // (PATCH * MERGE), MERGE, PATCH, channels
    )
    # rows, columns, row in block, column in block, channel, y, x
    blocks = blocks.permute(0, 3, 1, 4, 6, 2, 5)[..., None, :, :]
    frames = blocks.expand(-1, -1, -1, -1, -1, FRAMES, -1, -1)
    return frames.reshape(-1, channels * FRAMES * PATCH * PATCH)


def token_labels(picture: Picture) -> Tensor:
    """[rows * columns, 6]: shape, colour, tens, ones, handwritten digit and "is the centre of a
    thing" of each visual token; 0 is none."""
    labels = np.zeros((*picture.grid, 6), np.int64)
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
        row, column = thing.center.astype(int)
        labels[row, column, 5] = 1
    return torch.from_numpy(labels).flatten(0, 1)


def token_places(picture: Picture) -> Tensor:
    """[rows * columns, 2]: the row and column of each visual token, in UNITs."""
    rows, columns = (torch.arange(n) / UNIT for n in picture.grid)
    return torch.cartesian_prod(rows, columns)


def mrope_positions(ids: list[int], grids: list[tuple[int, int]]) -> tuple[Tensor, int]:
    """Positions [3, L] (frame, row, column) of a prompt, and the position that comes next."""
    pieces, following, at, remaining = [], 0, 0, list(grids)
    while at < len(ids):
        if ids[at] == token_id(IMAGE_PAD):
            rows, columns = remaining.pop(0)
            place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
            pieces.append(following + torch.cat([torch.zeros_like(place[:1]), place]))
            following += max(rows, columns)
            at += rows * columns
        else:
            pieces.append(torch.full((3, 1), following))
            following += 1
            at += 1
    return torch.cat(pieces, 1), following


def question_text(prompt: Prompt, picture: int, question: Question) -> str:
    """With more than one picture, a question says which one it is about."""
    return f"{_about(prompt, picture)}{question.text}"


def pack(prompt: Prompt, budget: int) -> Pack:
    """As many of the prompt's questions, with their answers, as fit into `budget` tokens."""
    encode = build_tokenizer().encode
    packed = Pack()
    for which, question in prompt.questions:
        asked = encode(question_text(prompt, which, question) + PROMPT_END)
        answer = encode(question.answer + IM_END).ids
        start, length = len(packed.ids), len(asked.ids) + len(answer)
        if start + length > budget:
            break
        last = start + len(asked.ids) - 1  # the token whose successor is the answer
        packed.ids += asked.ids + answer
        packed.tasks.append(question.task)
        packed.segments += [len(packed.tasks)] * length
        packed.offsets += range(length)
        packed.target_at += range(last, last + len(answer))
        packed.targets += answer
        for mention in question.mentions:
            token = asked.char_to_token(len(_about(prompt, which)) + mention.end - 1)
            assert token is not None
            looks: list[int | None] = list(mention.things)
            if mention.counted or not looks:
                looks.append(None)
            packed.look_at += [start + token] * len(looks)
            packed.looks += [(which, thing) for thing in looks]
            packed.look_shares += [1 / len(looks)] * len(looks)
            if len(mention.things) == 1 and not mention.counted:
                picture = prompt.pictures[which]
                place = picture.things[mention.things[0]].center - np.array(picture.grid) / 2
                packed.single_at.append(start + token)
                packed.singles.append(place)
        if question.direction:
            packed.direction_at.append(last)
            packed.directions.append(question.direction)
    return packed


def collate(prompts: list[Prompt], budget: int) -> Batch:
    """Put `budget` tokens of questions behind the pictures of each prompt.

    A question attends to the pictures and to itself, and its positions follow the pictures
    directly: each one sees what it would see alone.
    """
    grids = [picture.grid for picture in prompts[0].pictures]
    start = PROMPT_START + "".join(visual_span(rows * columns) for rows, columns in grids)
    prefix = build_tokenizer().encode(start).ids
    prefix_positions, following = mrope_positions(prefix, grids)
    size, length = len(prompts), len(prefix) + budget
    ids = torch.full((size, length), token_id(END_OF_TEXT))
    segments = torch.full((size, length), -1)
    positions = torch.zeros(3, size, length, dtype=torch.long)
    ids[:, : len(prefix)] = torch.tensor(prefix)
    segments[:, : len(prefix)] = 0
    positions[:, :, : len(prefix)] = prefix_positions[:, None]

    packs = [pack(prompt, budget) for prompt in prompts]
    for row, one in enumerate(packs):
        here = slice(len(prefix), len(prefix) + len(one.ids))
        ids[row, here] = torch.tensor(one.ids, dtype=torch.long)
        segments[row, here] = torch.tensor(one.segments, dtype=torch.long)
        positions[:, row, here] = following + torch.tensor(one.offsets, dtype=torch.long)

    def flat(places: list[list[int]]) -> Tensor:
        """Places in each pack -> places in the flattened batch."""
        starts = [row * length + len(prefix) for row in range(size)]
        both = zip(starts, places, strict=True)
        return torch.tensor([start + at for start, row in both for at in row], dtype=torch.long)

    def vectors(rows: list[Any]) -> Tensor:
        return torch.tensor(np.reshape(rows, (-1, 2)), dtype=torch.float32) / UNIT

    is_visual = ids.eq(token_id(IMAGE_PAD))
    target_at = flat([one.target_at for one in packs])
    tasks_before = np.cumsum([0, *(len(one.tasks) for one in packs)])[:-1]
    before = torch.from_numpy(tasks_before).repeat_interleave(
        torch.tensor([len(one.targets) for one in packs])
    )
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    return Batch(
        patches=torch.cat([patchify(picture.pixels) for picture in pictures]).bfloat16(),
        grids=torch.tensor([[1, MERGE * rows, MERGE * columns] for rows, columns in grids] * size),
        labels=torch.cat([token_labels(picture) for picture in pictures]),
        places=torch.cat([token_places(picture) for picture in pictures]),
        ids=ids,
        is_visual=is_visual,
        segments=segments,
        positions=positions,
        mask=_mask(segments),
        target_at=target_at,
        targets=torch.tensor([token for one in packs for token in one.targets], dtype=torch.long),
        tasks=[task for one in packs for task in one.tasks],
        question=before + segments.flatten()[target_at] - 1,
        look_at=flat([one.look_at for one in packs]),
        looks=torch.cat([_looks(*row) for row in zip(prompts, packs, is_visual, strict=True)]),
        look_shares=torch.tensor([share for one in packs for share in one.look_shares]),
        single_at=flat([one.single_at for one in packs]),
        singles=vectors([place for one in packs for place in one.singles]),
        direction_at=flat([one.direction_at for one in packs]),
        directions=vectors([direction for one in packs for direction in one.directions]),
    )


def _looks(prompt: Prompt, packed: Pack, is_visual: Tensor) -> Tensor:
    """[looks, L]: 1 for what each look should meet, else 0.

    That is the visual tokens on a thing, or, for "nothing", the first token of the prompt: an
    attention head has to put its attention somewhere.
    """
    result = torch.zeros(len(packed.looks), len(is_visual))
    for row, (which, thing) in zip(result, packed.looks, strict=True):
        if thing is None:
            row[0] = 1
        else:
            on_it = [
                (picture.owner == thing) & (i == which) for i, picture in enumerate(prompt.pictures)
            ]
            row[is_visual] = torch.from_numpy(np.concatenate([on.ravel() for on in on_it])).float()
    return result


def _mask(segments: Tensor) -> Tensor:
    """[B, L] -> [B, 1, L, L]: what to add to the attention scores."""
    asking, asked = segments[:, :, None], segments[:, None, :]
    visible = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    visible = visible & ((asked == 0) | (asked == asking))
    return torch.zeros(visible.shape).bfloat16().masked_fill(~visible, -1e4)[:, None]


def _about(prompt: Prompt, picture: int) -> str:
    return f"picture {picture + 1}: " if len(prompt.pictures) > 1 else ""
