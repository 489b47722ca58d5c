"""A padded batch as one prefill pass: what its rows keep, and cutting its columns.

A batch has B rows of N columns; a row is a prompt with padding in front, behind, or both. The rows
are the requests of one `Pass` over the B*N flattened columns. Layers >= K compute `[B, M]` columns:
what stays of each row, padded on the left to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ep_core.compaction import Pass, PassUnit
from ep_core.family import Placeholder
from ep_core.plan import Reason, RequestPlan, Run, Unprunable
from ep_core.report import RequestRecord
from ep_core.settings import Settings

Grid = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One prompt of a batch.

    Attributes:
        plan: of its new tokens; the plan's position 0 is the column `first`.
        first: the first column that is no padding.
        before: tokens of earlier turns.
    """

    plan: RequestPlan
    first: int = 0
    before: int = 0

    @property
    def stop(self) -> int:
        """The column behind its last token."""
        return self.first + self.plan.prompt_tokens

    def may_lack(self, column: int) -> bool:
        """May layers >= K leave a column out: as padding, or as a token that is dropped?"""
        if not self.first <= column < self.stop:
            return True
        runs = [run for planned in self.plan.pruned for run in planned.unit.runs]
        return any(run.start <= column - self.first < run.stop for run in runs)


def plan_rows(
    settings: Settings, inputs: torch.Tensor, real: torch.Tensor, cached: int, grids: Sequence[Grid]
) -> list[Row]:
    """Plan each row of a prefill, on the host.

    Columns that the mask hides between two tokens of a row count as text.

    Args:
        settings: of the model.
        inputs: `[B, N]` token ids, or `[B, N, d]` embeddings without them.
        real: `[B, cached + N]` bool, false where the mask hides a column.
        cached: columns of earlier passes.
        grids: of the pictures, in the order of the rows, as far as the caller named them.

    Raises:
        BudgetError: the budget does not fit a picture.
    """
    prompts = inputs.tolist() if inputs.ndim == 2 else [None] * len(inputs)
    found = _with_grids([_find(settings, token_ids) for token_ids in prompts], grids)
    rows = []
    for pictures, shown in zip(found, real.tolist(), strict=True):
        new = shown[cached:]
        columns = [column for column, flag in enumerate(new) if flag]
        if not columns:
            rows.append(Row(RequestPlan.whole((), 0, Reason.NO_PICTURES)))
            continue
        first, tokens = columns[0], columns[-1] + 1 - columns[0]
        plan = _plan(settings, pictures, new, first, tokens)
        rows.append(Row(plan, first, before=sum(shown[:cached])))
    return rows


def _find(settings: Settings, token_ids: list[int] | None) -> list[Placeholder] | Unprunable:
    """The pictures of a row, in its columns."""
    if token_ids is None:
        return Unprunable(Reason.EMBEDDINGS)
    try:
        return settings.family.find(settings.config, token_ids)
    except Unprunable as error:
        return error


def _with_grids(
    found: list[list[Placeholder] | Unprunable], grids: Sequence[Grid]
) -> list[list[Placeholder] | Unprunable]:
    """The same with a grid for each picture, unless the grids are of other pictures too."""
    pictures = [one for own in found if isinstance(own, list) for one in own]
    if [rows * columns for rows, columns in grids] != [len(one.run) for one in pictures]:
        return found
    grid = iter(grids)
    return [
        [replace(one, grid=next(grid)) for one in own] if isinstance(own, list) else own
        for own in found
    ]


def _plan(
    settings: Settings,
    pictures: list[Placeholder] | Unprunable,
    shown: list[bool],
    first: int,
    tokens: int,
) -> RequestPlan:
    """Plan the row whose tokens lie in the columns `[first, first + tokens)`."""
    if isinstance(pictures, Unprunable):
        return RequestPlan.whole((), tokens, pictures.reason, pictures.detail)
    seen = [sum(shown[one.run.start : one.run.stop]) for one in pictures]
    visible = [
        replace(one, run=Run(one.run.start - first, one.run.stop - first))
        for one, n in zip(pictures, seen, strict=True)
        if n == len(one.run)
    ]
    units = settings.family.units(settings.config, visible)
    if any(0 < n < len(one.run) for one, n in zip(pictures, seen, strict=True)):
        return RequestPlan.whole(units, tokens, Reason.HIDDEN)
    return settings.plan(units, tokens)  # a picture that is hidden whole is padding


@dataclass
class PaddedPass(Pass):
    """One prefill pass of a batch.

    Attributes:
        rows: B prompts.
        columns: N.
    """

    rows: Sequence[Row] = ()
    columns: int = 0

    def __post_init__(self) -> None:
        self.tokens = len(self.rows) * self.columns
        for b, row in enumerate(self.rows):
            # of a row that is all padding one column goes on, for each row has a length
            new = max(1, row.plan.prompt_tokens)
            self.add(row.plan, new, first=b * self.columns + row.first)

    def records(self) -> list[RequestRecord]:
        """What was kept of each row; waits for the device."""
        kept: list[list[list[int]]] = [[] for _ in self.rows]
        for unit in self.units:
            kept[unit.request].append(unit.chosen.tolist())
        return [
            RequestRecord.of(row.plan, own, row.before)
            for row, own in zip(self.rows, kept, strict=True)
        ]

    def attention_of(self, ranked: PassUnit, maps: torch.Tensor) -> torch.Tensor:
        """`[H, t, n]` of a unit's n tokens and the t tokens behind it, of maps `[B, H, N, N]`."""
        row, unit = self.rows[ranked.request], ranked.unit
        start, stop = row.first + unit.start, row.first + unit.stop
        window = maps[ranked.request, :, stop : row.stop, start:stop]
        if len(unit.runs) == 1:
            return window
        return window.index_select(2, ranked.offsets(torch.arange(len(unit), device=maps.device)))

    @property
    def uneven(self) -> bool:
        """Do rows keep different numbers of columns, so that shorter ones are padded?"""
        return len(set(self.lengths)) > 1

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """What stays, `[B, M, d]`, of `[B or 1, N, d]` values by column."""
        # layers may be spread over devices
        rows = values.to(self.index.device).expand(len(self.rows), -1, -1).flatten(0, 1)
        return self._pad(self.take(rows), 0)

    def kept_columns(self, cached: int) -> torch.Tensor:
        """`[B, M]` int64: which columns stay, counted behind the cached ones; -1 for padding."""
        return self._pad(self.index % self.columns + cached, -1)

    def spread_columns(self, output: torch.Tensor) -> torch.Tensor:
        """The output of the last layer, `[B, M, d]`, at its columns of `[B, N, d]`.

        Columns that were left out have no answer: they read NaN.
        """
        rows = output.flatten(0, 1)
        if self.uneven:
            rows = rows.index_select(0, self._places.to(rows.device))
        return self.spread(rows, math.nan).view(len(self.rows), self.columns, -1)

    def _pad(self, rows: torch.Tensor, fill: int) -> torch.Tensor:
        """`[B, M, ...]` of the rows of all prompts, one prompt after the other."""
        shape = (len(self.rows), max(self.lengths), *rows.shape[1:])
        if not self.uneven:
            return rows.view(shape)
        padded = rows.new_full((shape[0] * shape[1], *shape[2:]), fill)
        return padded.index_copy_(0, self._places, rows).view(shape)

    @cached_property
    def _places(self) -> torch.Tensor:
        """Of each row that goes on, its place in the flattened `[B, M]`."""
        lengths = self.lengths
        width = max(lengths)
        places = [(b + 1) * width - n + i for b, n in enumerate(lengths) for i in range(n)]
        return torch.tensor(places, device="cpu").to(self.index.device, non_blocking=True)


@dataclass
class ForwardPass:
    """One pass through the decoder.

    Attributes:
        shown: `[B, cached + N]` bool, false where the mask hides a column of layers < K.
        cached: columns of earlier passes.
        continues: the cache holds a pruned prompt.
        prefill: what is planned; None for a pass of one new token, which is decode.
        queries: `[B*N, H, D]` of layer K-1, until the tokens are chosen.
        attention: `[B, H, N, N]` of layer K-1, until the tokens are chosen.
        later_inputs: by name, what layers >= K get in the place of the decoder's own.
        steps: hooks of layers >= K that ran so far.
    """

    shown: torch.Tensor
    cached: int = 0
    continues: bool = False
    prefill: PaddedPass | None = None
    queries: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    later_inputs: dict[str, Any] = field(default_factory=dict)
    steps: int = 0

    @property
    def shortened(self) -> PaddedPass | None:
        """The prefill, if layers >= K compute fewer columns in it."""
        return self.prefill if self.prefill is not None and self.prefill.shortens else None

    @property
    def acts(self) -> bool:
        """Do layers >= K get other inputs than the decoder's own?"""
        return self.continues or self.shortened is not None
