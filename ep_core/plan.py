"""The plan of one prompt: which visual tokens it has and how many of them stay.

Everything here is decided on host integers, before anything is computed. A *visual item* (a
picture) owns one or more *units*; a unit is what one selection ranks. Its tokens lie in one or more
*runs* of the prompt; what stands between two runs of a unit, such as a row's separator, is text and
always stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from ep_core.errors import EntropyPruneError, UnsupportedError


class Reason(StrEnum):
    """Why nothing is pruned in a prompt; the text is what users and counters see."""

    NO_POLICY = "no policy is set"
    NO_PICTURES = "the prompt has no visual tokens"
    OFF = "switched off by the request"
    KEEPS_ALL = "the budget keeps every token"
    DOES_NOT_FIT = "the server's budget does not fit the picture"
    ENDS_INSIDE = "the prompt ends inside a picture, and its last token must stay"
    HIDDEN = "the attention mask hides a part of a picture"
    LAYOUT = "the pictures cannot be told apart"
    NOT_FOUND = "the engine does not say where the pictures are in the prompt"
    OTHER_MEDIA = "video and audio prompts are not pruned yet"
    EMBEDDINGS = "inputs_embeds were given without input_ids"
    PROMPT_LOGPROBS = "the request asks for logprobs of its prompt"
    PERPLEXITY = "the request asks for the perplexity of its prompt"
    HIDDEN_STATES = "the request asks for hidden states"
    SESSION = "the request belongs to a session"
    BEAM_SEARCH = "beam search was never tested with pruning"


class Unprunable(UnsupportedError):
    """A prompt that runs unpruned, and why."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, order=True)
class Run:
    """Neighbouring tokens `[start, stop)` of a prompt."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise EntropyPruneError(
                f"run [{self.start}, {self.stop}): a run holds at least one token"
            )

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Unit:
    """What one selection ranks: all tokens of a picture, or of one frame.

    Attributes:
        runs: where its tokens are, ascending, none touching the next.
        item: number of the visual item that it belongs to, in the order of the prompt.
        grid: `(rows, columns)` of its tokens, row by row, where the host knows it.
        frame: number of the frame of a video, or None for a picture.
    """

    runs: tuple[Run, ...]
    item: int = 0
    grid: tuple[int, int] | None = None
    frame: int | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise EntropyPruneError("a unit has at least one run of tokens")
        for before, after in pairwise(self.runs):
            if before.stop >= after.start:
                raise EntropyPruneError(f"{before} and {after} of one unit touch or cross")
        if self.grid is not None and self.grid[0] * self.grid[1] != len(self):
            raise EntropyPruneError(
                f"a grid of {self.grid[0]} x {self.grid[1]} does not hold {len(self)} tokens"
            )

    @property
    def start(self) -> int:
        """Prompt position of the first token."""
        return self.runs[0].start

    @property
    def stop(self) -> int:
        """Prompt position behind the last token."""
        return self.runs[-1].stop

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    @property
    def offsets(self) -> list[int]:
        """Of each token, its distance from `start`."""
        return [at - self.start for run in self.runs for at in range(run.start, run.stop)]

    @property
    def separators(self) -> list[int]:
        """Of each token between two runs, its distance from `start`."""
        return [
            at - self.start
            for before, after in pairwise(self.runs)
            for at in range(before.stop, after.start)
        ]


def runs_of(token_ids: Sequence[int], token: int) -> list[Run]:
    """The maximal runs of `token` in a prompt, in order."""
    runs = []
    start = None
    for position, token_id in enumerate(token_ids):
        if token_id == token and start is None:
            start = position
        elif token_id != token and start is not None:
            runs.append(Run(start, position))
            start = None
    if start is not None:
        runs.append(Run(start, len(token_ids)))
    return runs


@dataclass(frozen=True)
class PlannedUnit:
    """A unit and how many of its tokens stay."""

    unit: Unit
    keep: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= len(self.unit):
            raise EntropyPruneError(
                f"cannot keep {self.keep} of the {len(self.unit)} tokens of a unit"
            )

    @property
    def dropped(self) -> int:
        """Tokens that layers >= K do not see."""
        return len(self.unit) - self.keep


@dataclass(frozen=True)
class RequestPlan:
    """What one prompt keeps. Engines wrap a plan with their own state; nobody changes it.

    Attributes:
        units: in the order of the prompt.
        prompt_tokens: length of the prompt, text included.
        reason: why nothing is dropped, or None.
        detail: what a reason leaves open, for a person to read; "" for nothing.
    """

    units: tuple[PlannedUnit, ...]
    prompt_tokens: int
    reason: Reason | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.reason is None) != (self.dropped > 0):
            raise EntropyPruneError(f"a plan drops tokens or says why not: {self}")
        units = [planned.unit for planned in self.units]
        for before, after in pairwise(units):
            if before.stop > after.start:
                raise EntropyPruneError(f"{before} and {after} cross, or are not in order")
        if units and units[-1].stop > self.prompt_tokens:
            raise EntropyPruneError(f"{units[-1]} ends behind a prompt of {self.prompt_tokens}")

    @classmethod
    def of(
        cls,
        units: Sequence[PlannedUnit],
        prompt_tokens: int,
        whole: Reason = Reason.KEEPS_ALL,
    ) -> RequestPlan:
        """The plan of these units; `whole` is why, if all of their tokens stay."""
        drops = any(planned.dropped for planned in units)
        return cls(tuple(units), prompt_tokens, None if drops else whole)

    @classmethod
    def whole(
        cls, units: Sequence[Unit], prompt_tokens: int, reason: Reason, detail: str = ""
    ) -> RequestPlan:
        """The plan that drops nothing, and why."""
        planned = tuple(PlannedUnit(unit, len(unit)) for unit in units)
        return cls(planned, prompt_tokens, reason, detail)

    @property
    def why(self) -> str | None:
        """The reason with its detail, as a person reads it; None where tokens are dropped."""
        if self.reason is None:
            return None
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)

    @property
    def visual_tokens(self) -> int:
        """Tokens of all units."""
        return sum(len(planned.unit) for planned in self.units)

    @property
    def dropped(self) -> int:
        """Tokens that layers >= K do not see."""
        return sum(planned.dropped for planned in self.units)

    @property
    def pruned(self) -> Iterator[PlannedUnit]:
        """The units that lose tokens, in the order of the prompt."""
        return (planned for planned in self.units if planned.dropped)

    def dropped_before(self, position: int) -> int:
        """Tokens dropped from the units that end at or before a prompt position."""
        return sum(planned.dropped for planned in self.units if planned.unit.stop <= position)

    def unit_at(self, position: int) -> PlannedUnit | None:
        """The unit that loses tokens and has some on both sides of a prompt position."""
        for planned in self.pruned:
            if planned.unit.start < position < planned.unit.stop:
                return planned
        return None

    def kept_length(self, position: int) -> int:
        """Tokens that layers >= K hold once they have seen the prompt up to a position.

        A unit that the position cuts waits, and so does what stands between its runs: its tokens
        are ranked together.
        """
        if (cut := self.unit_at(position)) is not None:
            position = cut.unit.start
        return position - self.dropped_before(position)
