"""Random conversations over one cache against each prompt alone, pruned from scratch.

Every turn pads each row at random on both sides, mixes rows with and without pictures, may mask the
tail of the turn before (what `generate` does to rows that ended early), and may reorder, repeat or
drop rows of the cache between turns. Nothing of that may change a row's last logits.
"""

import random
from dataclasses import dataclass, field

import pytest
import torch
from transformers import DynamicCache

from ep_backends.transformers import enable

TOLERANCE = 1e-4
PICTURE_TOKENS = 64


@dataclass
class Row:
    """One conversation: its real tokens and pictures, and its columns in the batch."""

    ids: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)

    def copy(self) -> "Row":
        return Row(list(self.ids), list(self.pictures), list(self.mask))


@pytest.fixture(scope="module")
def llava(lab):
    return lab("llava").model()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(6, 3, 112, 112, generator=torch.Generator().manual_seed(0))


def alone(model, row, pixels):
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([row.ids]),
            pixel_values=pixels[row.pictures] if row.pictures else None,
            use_cache=False,
        )
    return output.logits[0, -1]


def take_turn(model, rows, cache, pixels, rng):
    """One forward pass over all rows; logits of each row's last new token."""
    image = model.config.image_token_id
    turns = []
    for _ in rows:
        new = [rng.randrange(10, 200) for _ in range(rng.randrange(1, 9))]
        pictures = [rng.randrange(len(pixels)) for _ in range(rng.choice((0, 0, 1, 2)))]
        at = rng.randrange(len(new))  # never after the last token; two pictures touch
        new[at:at] = [image] * (PICTURE_TOKENS * len(pictures))
        tail = rng.randrange(3)
        turns.append((new, pictures, tail))
    width = max(len(new) + tail for new, _, tail in turns) + rng.randrange(3)
    ids, last = [], []
    for row, (new, pictures, tail) in zip(rows, turns, strict=True):
        pad = width - len(new) - tail
        ids.append([0] * pad + new + [0] * tail)
        row.ids += new
        row.pictures += pictures
        row.mask += [0] * pad + [1] * len(new) + [0] * tail
        last.append(pad + len(new) - 1)
    mask = torch.tensor([row.mask for row in rows])
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -width:]
    shown = [picture for _, pictures, _ in turns for picture in pictures]
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids),
            attention_mask=mask,
            position_ids=positions,
            pixel_values=pixels[shown] if shown else None,
            past_key_values=cache,
            use_cache=True,
        )
    return [output.logits[b, column] for b, column in enumerate(last)]


def shuffle_rows(rows, cache, rng):
    """A batch operation on the cache between two turns, as a caller may do."""
    operation = rng.choice(("none", "reorder", "repeat", "select"))
    if operation == "reorder":
        order = rng.sample(range(len(rows)), len(rows))
        cache.reorder_cache(torch.tensor(order))
    elif operation == "repeat":
        order = [b for b in range(len(rows)) for _ in range(2)]
        cache.batch_repeat_interleave(2)
    elif operation == "select":
        order = sorted(rng.sample(range(len(rows)), rng.randrange(1, len(rows) + 1)))
        cache.batch_select_indices(torch.tensor(order))
    else:
        order = list(range(len(rows)))
    return [rows[b].copy() for b in order]


@pytest.mark.parametrize("method", ["released", "set-entropy"])
@pytest.mark.parametrize("seed", range(12))
def test_conversations_over_one_cache(llava, pixels, seed, method):
    rng = random.Random(seed)
    layer = rng.choice((1, 2, 3))
    cache = DynamicCache(config=llava.get_decoder().config) if seed % 3 else DynamicCache()
    rows = [Row() for _ in range(rng.randrange(1, 4))]
    with enable(llava, f"layer={layer},keep=0.3,method={method}"):
        for turn in range(3):
            answers = take_turn(llava, rows, cache, pixels, rng)
            for b, (row, answer) in enumerate(zip(rows, answers, strict=True)):
                worst = float((answer - alone(llava, row, pixels)).abs().max())
                assert worst <= TOLERANCE, f"turn {turn}, row {b}: logits off by {worst:.2e}"
            rows = shuffle_rows(rows, cache, rng)


def test_a_row_that_ended_early_is_padded_in_the_next_turn(llava, pixels):
    """The tail that `generate` appended to a finished row becomes padding of the next turn."""
    rng = random.Random(5)
    cache = DynamicCache(config=llava.get_decoder().config)
    rows = [Row(), Row()]
    with enable(llava, "layer=2,keep=0.3"):
        while not (rows[0].pictures and rows[1].pictures):
            rows, cache = [Row(), Row()], DynamicCache(config=llava.get_decoder().config)
            take_turn(llava, rows, cache, pixels, rng)
        for _ in range(3):  # row 0 has ended: it is fed padding whose mask is still 1
            tokens = [0, rng.randrange(10, 200)]
            mask = torch.tensor([[*row.mask, 1] for row in rows])
            positions = mask.cumsum(dim=1)[:, -1:] - 1
            with torch.no_grad():
                llava(
                    input_ids=torch.tensor(tokens)[:, None],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
            rows[0].mask.append(1)
            rows[1].mask.append(1)
            rows[1].ids.append(tokens[1])
        rows[0].mask[-3:] = [0, 0, 0]
        answers = take_turn(llava, rows, cache, pixels, rng)
        for b, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            worst = float((answer - alone(llava, row, pixels)).abs().max())
            assert worst <= TOLERANCE, f"row {b}: logits off by {worst:.2e}"
