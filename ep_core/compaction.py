"""One prefill pass of several requests: which tokens layers >= K compute, and how to pick them.

A pass is planned on host integers (`Pass.add`), one request after the other in the order of the
batch. Between layers K-1 and K the engine lets it rank the units that are complete (`choose`), and
takes the surviving rows of every tensor that has one row for each token (`take`). After the last
layer the output is spread back to all rows (`spread`). Nothing here waits for the device.

A prefill chunk may end inside a unit. The part that is there waits at layer K, with all that comes
behind the unit's first token, and goes on with the chunk that brings the rest: the answer is that
of the whole prompt at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ep_core.errors import EntropyPruneError
from ep_core.plan import PlannedUnit, RequestPlan, Unit
from ep_core.selection import Selector, SpanInputs

HIDDEN = "hidden"
QUERIES = "queries"


class Ranks(Protocol):
    """Tensor-parallel ranks, each with some of the query heads."""

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors, joined along `dim` in the order of the ranks."""

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """Overwrite the tensor with that of the first rank."""


@dataclass
class Waiting:
    """The beginning of a unit, which earlier chunks brought as far as layer K.

    Attributes:
        unit: it has more tokens than are here.
        stop: prompt position behind the last token here; the first is at `unit.start`.
        rows: by name, the rows of these tokens in each tensor that the pass takes.
    """

    unit: Unit
    stop: int
    rows: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.stop - self.unit.start


@dataclass
class PassUnit:
    """A unit whose last token is in this pass: it is ranked now.

    Attributes:
        planned: the unit and how many of its tokens stay.
        request: number of its request in the pass.
        first: row of the pass of its first token that is new.
        waited: its tokens of earlier chunks, or None.
        queries: `[N, H, D]` of its tokens, from `Pass.copy_queries` until `Pass.choose`.
        kept: once chosen, `[keep]` int64 indices among its tokens, ascending.
    """

    planned: PlannedUnit
    request: int
    first: int
    waited: Waiting | None
    queries: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    @property
    def unit(self) -> Unit:
        """Where its tokens are in the prompt."""
        return self.planned.unit

    @property
    def new(self) -> int:
        """Rows of this pass that it takes, separators included."""
        return self.unit.stop - self.unit.start - (0 if self.waited is None else len(self.waited))

    @property
    def staying(self) -> int:
        """Rows that go on, separators included."""
        return self.planned.keep + len(self.unit.separators)

    def offsets(self, indices: torch.Tensor) -> torch.Tensor:
        """Distances from the unit's start of some of its tokens.

        Args:
            indices: `[n]` indices among its tokens.
        """
        if len(self.unit.runs) == 1:
            return indices
        return _on_device(self.unit.offsets, indices.device)[indices]

    @property
    def gone(self) -> torch.Tensor:
        """`[N - keep]` distances from the unit's start of the tokens that were dropped."""
        n = len(self.unit)
        stays = torch.zeros(n, dtype=torch.int8, device=self.chosen.device)
        stays.index_fill_(0, self.chosen, 1)  # assigning a number would wait for the device
        return self.offsets(stays.argsort(stable=True)[: n - self.planned.keep])

    @property
    def chosen(self) -> torch.Tensor:
        """`kept`, which there is once `Pass.choose` has run."""
        if self.kept is None:
            raise EntropyPruneError("the pass has not chosen its tokens yet")
        return self.kept

    def stay(self) -> torch.Tensor:
        """`[staying]` distances from the unit's start of the rows that go on, ascending."""
        kept = self.offsets(self.chosen)
        if len(self.unit.runs) == 1:
            return kept
        separators = _on_device(self.unit.separators, kept.device)
        return torch.cat([kept, separators]).sort().values


@dataclass
class PassRequest:
    """One request's part of a pass, for the layers from K on.

    Attributes:
        prefix: tokens that they hold already.
        length: rows that they compute now; at least 1, for kernels want a token of each request.
        stop: prompt position behind the last token that they will have seen.
        stands_in: all of its tokens wait, and the first one is computed in vain.
        waiting: what waits after this pass, or None.
    """

    prefix: int
    length: int
    stop: int
    stands_in: bool
    waiting: Waiting | None

    @property
    def held(self) -> int:
        """Tokens that layers >= K hold after the pass."""
        return self.prefix + (0 if self.stands_in else self.length)


@dataclass
class Pass:
    """One prefill pass.

    Attributes:
        tokens: rows of the pass, T, so far.
        requests: in the order of the batch.
        units: those that are ranked now, in the order of the batch.
    """

    tokens: int = 0
    requests: list[PassRequest] = field(default_factory=list)
    units: list[PassUnit] = field(default_factory=list)
    # in order, what layers >= K compute: rows [first, stop) of the pass, or a unit
    _runs: list[tuple[int, int] | PassUnit] = field(default_factory=list)
    _waiting: list[tuple[Waiting, int, int, Waiting | None]] = field(default_factory=list)
    _index: torch.Tensor | None = None

    def add(
        self,
        plan: RequestPlan | None,
        new: int,
        *,
        prefix: int = 0,
        first: int | None = None,
        waiting: Waiting | None = None,
    ) -> PassRequest:
        """Add a request's new tokens, the prompt positions `[prefix, prefix + new)`.

        Args:
            plan: of the whole prompt; None for one without visual tokens.
            new: how many tokens come, at least 1.
            prefix: how many tokens came before.
            first: row of the first one; None puts it behind the last request's.
            waiting: what its earlier chunks left waiting.

        Raises:
            EntropyPruneError: the prefix ends inside a unit whose first part is not there.
        """
        first = self.tokens if first is None else first
        self.tokens = max(self.tokens, first + new)
        stop = prefix + new
        held = prefix if plan is None else plan.kept_length(prefix)
        at, length = prefix, 0  # up to where it is planned; rows that layers >= K compute
        waits: Waiting | None = None

        def run_to(position: int) -> int:
            if position > at:
                self._runs.append((first + at - prefix, first + position - prefix))
            return max(0, position - at)

        for planned in plan.pruned if plan is not None else ():
            unit = planned.unit
            if unit.stop <= prefix or unit.start >= stop:
                continue
            waited = None
            if unit.start < prefix:
                if waiting is None or (waiting.unit, waiting.stop) != (unit, prefix):
                    raise EntropyPruneError(
                        f"a prefix of {prefix} tokens ends inside the visual tokens "
                        f"[{unit.start}, {unit.stop}), whose first part is not there; please "
                        "report it"
                    )
                waited = waiting
            begin = max(unit.start, prefix)
            length += run_to(begin)
            row = first + begin - prefix
            if unit.stop > stop:
                waits = Waiting(unit, stop)
                self._waiting.append((waits, row, first + new, waited))
                at, stop = stop, unit.start
                break
            ranked = PassUnit(planned, len(self.requests), row, waited)
            self.units.append(ranked)
            self._runs.append(ranked)
            length += ranked.staying
            at = unit.stop
        length += run_to(stop)
        if not length:
            self._runs.append((first, first + 1))
        request = PassRequest(held, max(1, length), stop, not length, waits)
        self.requests.append(request)
        return request

    @property
    def shortens(self) -> bool:
        """Do layers >= K compute other rows than the layers below?"""
        return bool(self.units or self._waiting)

    @property
    def lengths(self) -> list[int]:
        """Of each request, the rows that layers >= K compute."""
        return [request.length for request in self.requests]

    @property
    def prefixes(self) -> list[int]:
        """Of each request, the tokens that layers >= K hold before the pass."""
        return [request.prefix for request in self.requests]

    @property
    def index(self) -> torch.Tensor:
        """`[T']` int64, the rows that layers >= K compute, in their order.

        Row `T + i` is the i-th row that waited, over all units of the pass.
        """
        if self._index is None:
            raise EntropyPruneError("the pass has not chosen its tokens yet")
        return self._index

    def copy_queries(self, queries: torch.Tensor) -> None:
        """Keep the queries of the tokens that are ranked, for an engine that overwrites them.

        RoPE may rotate queries in place before layer K is reached; only units are copied.

        Args:
            queries: as `choose` takes them, instead of giving them there.
        """
        for ranked in self.units:
            ranked.queries = self._unit_rows(ranked, QUERIES, queries).clone()
        self._keep_waiting(QUERIES, queries, 0)

    @torch.no_grad()
    def choose(
        self,
        selector: Selector,
        hidden: torch.Tensor,
        queries: torch.Tensor | None = None,
        *,
        attention: Callable[[PassUnit], torch.Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Rank each unit that is complete, alone among its own tokens; keep what waits waiting.

        Args:
            selector: a registered selector.
            hidden: `[T, d]` hidden states entering layer K.
            queries: `[T, H, D]` query states of layer K-1 before RoPE, of this rank's heads, where
                the selector needs them and `copy_queries` has not taken them already.
            attention: gives `[H, t, N]` attention probabilities of a unit, where the selector needs
                them; see `SpanInputs`.
            ranks: those that decide together, or None for one alone.
        """
        for ranked in self.units:
            own, ranked.queries = ranked.queries, None
            if queries is not None:
                own = self._unit_rows(ranked, QUERIES, queries)
            if own is not None and ranks is not None:
                own = ranks.all_gather(own.contiguous(), dim=1)
            reads_hidden = "hidden" in selector.needs
            inputs = SpanInputs(
                queries=own,
                hidden=self._unit_rows(ranked, HIDDEN, hidden) if reads_hidden else None,
                attention=None if attention is None else attention(ranked),
            )
            ranked.kept = selector(inputs, ranked.planned.keep)
            if ranks is not None:
                # equal inputs on equal devices give equal answers; nothing may depend on that
                ranks.broadcast(ranked.kept)
        if queries is not None:
            self._keep_waiting(QUERIES, queries, 0)
        self._index = self._build_index(hidden.device)

    def take(self, tensor: torch.Tensor, name: str = "", dim: int = 0) -> torch.Tensor:
        """The rows of a tensor that layers >= K compute, those that waited among them.

        Args:
            tensor: `T` rows along `dim`.
            name: tells this tensor from others whose rows wait for a later chunk: `HIDDEN` for the
                hidden states, any other for what else enters the decoder with a row for each token.
                "" for an engine that never cuts a unit.
            dim: the dimension of rows.
        """
        waited = [unit.waited.rows[name] for unit in self.units if unit.waited is not None]
        self._keep_waiting(name, tensor, dim)
        if waited:
            tensor = torch.cat([tensor, *waited], dim=dim)
        return tensor.index_select(dim, self.index.to(tensor.device))

    def spread(self, output: torch.Tensor, fill: float) -> torch.Tensor:
        """Give an output `[T', d]` back to the T rows of the pass.

        Args:
            output: a row for each token that layers >= K computed.
            fill: what rows read that they did not compute.

        Returns:
            `[T, d]`. Rows that waited belong to no row of this pass and are left out.
        """
        rows = output.new_full((self.tokens + 1, *output.shape[1:]), fill)
        target = self.index.to(output.device).clamp_max(self.tokens)
        return rows.index_copy_(0, target, output)[: self.tokens]

    def _unit_rows(self, ranked: PassUnit, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """All rows of a unit's tokens, `[N, ...]`."""
        rows = tensor[ranked.first : ranked.first + ranked.new]
        if ranked.waited is not None:
            rows = torch.cat([ranked.waited.rows[name], rows])
        if len(ranked.unit.runs) == 1:
            return rows
        return rows.index_select(0, _on_device(ranked.unit.offsets, rows.device))

    def _keep_waiting(self, name: str, tensor: torch.Tensor, dim: int) -> None:
        for waits, first, stop, before in self._waiting:
            # a copy, because the tensor may be overwritten by the time that it is read
            rows = tensor.narrow(dim, first, stop - first).clone()
            if before is not None:
                rows = torch.cat([before.rows[name], rows], dim=dim)
            waits.rows[name] = rows

    def _build_index(self, device: torch.device) -> torch.Tensor:
        """One copy from the host for the text, one small kernel for each unit."""
        text: list[int] = []
        units: list[tuple[int, PassUnit]] = []
        for run in self._runs:
            if isinstance(run, PassUnit):
                units.append((len(text), run))
                text += [0] * run.staying
            else:
                text += range(*run)
        index = _on_device(text, device)
        behind = self.tokens  # row of the next unit's first token that waited
        for at, ranked in units:
            stay = ranked.stay()
            waited = 0 if ranked.waited is None else len(ranked.waited)
            rows = ranked.first - waited + stay
            if waited:
                rows = torch.where(stay < waited, behind + stay, rows)
                behind += waited
            index[at : at + len(stay)] = rows
        return index


def _on_device(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Host integers as an int64 tensor, without waiting for the device."""
    return torch.tensor(values, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
