"""Backends with a planted defect: the suite's own command line must fail, in the test meant for it.

Levels 1 and 2 get the transformers backend with one thing broken inside. For level 3 there is a
server to break: it answers one request after the other, and claims what engines that serve can do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ep_conformance.__main__ as suite
import ep_conformance.plugin
from ep_backends.transformers import enable, layers
from ep_backends.transformers.backend import TransformersBackend, TransformersSession
from ep_backends.transformers.batch import PaddedPass
from ep_conformance.recording import Recording
from ep_conformance.selection_cases import tf32_rounded
from ep_core import plugins
from ep_core.backend import Answer, BackendSpec, Capabilities, Request, Serving
from ep_core.compaction import Pass
from ep_core.family import Placeholder
from ep_core.plan import PlannedUnit, RequestPlan, Run, Unit
from ep_core.policy import PruningPolicy

Choose = Any
MATCHES = "test_engine_matches_oracle[{}]"


def planned(spans: Sequence[tuple[int, int]], keep: Sequence[int], tokens: int) -> RequestPlan:
    units = [PlannedUnit(Unit((Run(*span),)), k) for span, k in zip(spans, keep, strict=True)]
    return RequestPlan.of(units, tokens)


class Broken(TransformersBackend):
    """The transformers backend with a planted defect."""

    def __init__(self, defect: str | None) -> None:
        self.defect = defect

    def select(
        self,
        method: str,
        plan: RequestPlan,
        *,
        queries: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        device: str = "cpu",
    ) -> list[list[int]]:
        given = {"queries": queries, "hidden": hidden}
        spans = [planned.unit for planned in plan.pruned]
        keep = [planned.keep for planned in plan.pruned]
        tensor = queries if hidden is None else hidden
        assert tensor is not None
        if self.defect == "ties to the highest index":
            last = len(tensor) - 1
            given = {name: None if t is None else t.flip(0) for name, t in given.items()}
            mirrored = [(last + 1 - s.stop, last + 1 - s.start) for s in reversed(spans)]
            kept = super().select(method, planned(mirrored, keep[::-1], last + 1), **given)
            pairs = zip(spans, reversed(kept), strict=True)
            return [sorted(len(s) - 1 - i for i in own) for s, own in pairs]
        if self.defect == "off by one span":
            moved = [(max(0, s.start - 1), s.stop - 1) for s in spans]
            plan = planned(moved, keep, len(tensor))
        if self.defect == "top-k across images":
            tokens = [t for s in spans for t in range(s.start, s.stop)]
            given = {name: None if t is None else t[tokens] for name, t in given.items()}
            joined = planned([(0, len(tokens))], [sum(keep)], len(tokens))
            (kept,) = super().select(method, joined, **given) or [range(len(tokens))]
            chosen = {tokens[i] for i in kept}
            return [[t - s.start for t in range(s.start, s.stop) if t in chosen] for s in spans]
        if self.defect == "TF32 score" and queries is not None:
            given["queries"] = tf32_rounded(queries)
        if self.defect == "local heads" and queries is not None:
            given["queries"] = queries[:, : queries.shape[1] // 2]
        if self.defect == "not finite first":
            given = {
                name: None if t is None else t.nan_to_num(1e4, 1e4, -1e4)
                for name, t in given.items()
            }
        return super().select(method, plan, **given)

    def open(self, model: Path, policy: PruningPolicy | None, **options: Any) -> Any:
        session = super().open(model, policy, **options)
        if session.pruning is not None and self.defect == "off by one span":
            settings = session.pruning._settings

            def shifted(config: Any, ids: Sequence[int]) -> list[Placeholder]:
                found = settings.family.find(config, ids)
                return [Placeholder(Run(own.run.start - 1, own.run.stop - 1)) for own in found]

            family = replace(settings.family, find=shifted)
            session.pruning._settings = replace(settings, family=family)
        return session


class Server(Broken):
    """Serves in a plain way what level 3 is about, with a planted defect."""

    capabilities = Capabilities(
        **dict.fromkeys(
            ["batch", "multi_image", "cpu", "request_budget", "abort", "chunked_prefill"], True
        ),
        prefix_cache=True,
        preemption=True,
    )

    def open(
        self,
        model: Path,
        policy: PruningPolicy | None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        serving: Serving | None = None,
    ) -> "ServerSession":
        return ServerSession(model, policy, dtype, serving or Serving(), self.defect)


class ServerSession(TransformersSession):
    """Answers one request after the other; `defect` says what goes wrong."""

    def __init__(
        self,
        model: Path,
        policy: PruningPolicy | None,
        dtype: str | None,
        serving: Serving,
        defect: str | None,
    ) -> None:
        super().__init__(model, None, "cpu", dtype)
        self._policy, self._serving, self._defect = policy, serving, defect
        self._seen: list[tuple[PruningPolicy | None, list[Any]]] = []
        self._held = 0
        if policy is None and defect == "no policy prunes":
            self._policy = PruningPolicy.parse("layer=2,keep=0.5")

    def held_slots(self) -> int:
        return self._held

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        answers = [self._answer(request) for request in requests]
        if self._defect == "the shortest comes first":
            answers.sort(key=lambda answer: len(answer.output_ids))
        if self._defect == "who leaves takes others along" and answers[0] != answers[-1]:
            cut = min(len(answer.output_ids) for answer in answers)
            if any(request.leave_after for request in requests):
                answers = [replace(a, output_ids=a.output_ids[:cut]) for a in answers]
        return answers

    def _answer(self, request: Request) -> Answer:
        policy = self._policy
        if request.budget == "off" and self._defect != "off prunes":
            policy = None
        elif request.budget not in (None, "off") and self._defect != "one budget for all":
            assert policy is not None
            policy = replace(policy, budget=request.budget)
        plain = Request(request.content, request.max_new_tokens)
        if policy is None:
            (answer,) = super().generate([plain])
        else:
            self.pruning = enable(self.model, policy)
            try:
                (answer,) = super().generate([plain])
            finally:
                self.pruning.disable()
                self.pruning = None
        cached = self._cached(request, policy) if self._serving.prefix_cache else 0
        chunk, left = self._serving.prefill_chunk, request.leave_after
        new = answer.prompt_tokens - cached
        answer = replace(
            answer,
            logits=None,
            output_ids=answer.output_ids[:left],
            cached_tokens=cached,
            chunks=-(-new // chunk) if chunk and self._defect != "chunks are not made" else 1,
            preempted=int(bool(self._serving.kv_tokens) and self._defect != "room for everyone"),
        )
        if left and self._defect == "who leaves keeps slots":
            self._held += 3
        if answer.preempted and not left and self._defect == "preempted, it loses a token":
            answer = replace(answer, output_ids=(*answer.output_ids[:1], *answer.output_ids[2:]))
        return answer

    def _cached(self, request: Request, policy: PruningPolicy | None) -> int:
        """Tokens of the prompt that an earlier one starts with, under the same policy."""
        ids: list[Any] = self._encode([request])["input_ids"][0].tolist()
        pictures = [part for part in request.content if isinstance(part, Path)]
        config = self.model.config.to_dict()
        found = plugins.registry().family(config["model_type"]).find(config, ids)
        for run, picture in zip([one.run for one in found], pictures, strict=True):
            ids[run.start : run.stop] = [picture] * len(run)
        most = 0
        for other, seen in self._seen:
            if other == policy or self._defect == "budgets share prefixes":
                pairs = zip(ids[:-1], seen, strict=False)
                same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ids) - 1)
                most = max(most, min(same, len(seen)))
        self._seen.append((policy, ids))
        return most


def defective(change: Callable[..., None]) -> Callable[[Choose], Choose]:
    """A `Pass.choose` after which `change(pass, choose, selector, tensors)` changes `kept`."""

    def breaks(choose: Choose) -> Choose:
        def broken(self: Pass, selector: Any, *tensors: Any, **options: Any) -> None:
            choose(self, selector, *tensors, **options)
            change(self, choose, selector, tensors)
            units = {unit.first + i for unit in self.units for i in range(len(unit.unit))}
            rows = [row for row in self.index.tolist() if row not in units]
            rows += [unit.first + i for unit in self.units for i in unit.chosen.tolist()]
            self._index = torch.tensor(sorted(rows))

        return broken

    return breaks


def stale() -> Callable[[Choose], Choose]:
    """Keep what was kept at that place before."""
    before: dict[tuple[Unit, int], torch.Tensor] = {}

    def change(current: Pass, *_: Any) -> None:
        for unit in current.units:
            unit.kept = before.setdefault((unit.unit, unit.planned.keep), unit.chosen)

    return defective(change)


def by_chunk(current: Pass, choose: Choose, selector: Any, tensors: Any) -> None:
    """Select from the part of a picture that a pass of 32 tokens brings, not from all of it."""
    for unit in current.units:
        start, stop, keep = unit.unit.start, unit.unit.stop, unit.planned.keep
        cut = -(-start // 32) * 32
        if not start < cut < stop:
            continue
        first = min(keep, cut - start, max(1, keep * (cut - start) // (stop - start)))
        if keep - first > stop - cut or first == keep:
            continue
        parts = Pass(tokens=current.tokens)
        plan = planned([(start, cut), (cut, stop)], [first, keep - first], stop + 1)
        parts.add(plan, stop, first=unit.first - start)
        choose(parts, selector, *tensors)
        kept = {part.unit.start: part.chosen for part in parts.units}
        one = kept.get(start, torch.arange(cut - start))
        unit.kept = torch.cat([one, kept.get(cut, torch.arange(stop - cut)) + cut - start])


def by_first_row(current: PaddedPass, choose: Choose, selector: Any, tensors: Any) -> None:
    """Select in every row by the queries and states of the first."""
    rows = torch.arange(current.tokens) % current.columns
    choose(current, selector, *(None if tensor is None else tensor[rows] for tensor in tensors))


def across_pictures(current: Pass, choose: Choose, selector: Any, tensors: Any) -> None:
    """One top-k over all pictures of a prompt."""
    for request in range(len(current.requests)):
        own = [unit for unit in current.units if unit.request == request]
        rows = [unit.first + i for unit in own for i in range(len(unit.unit))]
        keep = sum(unit.planned.keep for unit in own)
        joined = Pass()
        joined.add(planned([(0, len(rows))], [keep], len(rows) + 1) if rows else None, len(rows))
        choose(joined, selector, *(None if tensor is None else tensor[rows] for tensor in tensors))
        chosen = torch.tensor(rows)[joined.units[0].chosen] if rows else None
        for unit in own:
            inside = (chosen >= unit.first) & (chosen < unit.first + len(unit.unit))
            unit.kept = chosen[inside] - unit.first


def renumbered(cut: Any) -> Any:
    """Give kept tokens the positions 0, 1, 2, ... of a prompt that was short from the start."""

    def broken(self: PaddedPass, values: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = cut(self, values)
        rotary = values.shape[2] < 64  # cos and sin have head_dim entries, hidden states more
        return values[:, : kept.shape[1]].expand_as(kept) if rotary else kept

    return broken


def unmasked(slots: Any) -> Any:
    """Forget that shorter rows are padded."""

    def broken(columns: torch.Tensor, padded: bool, *others: Any) -> Any:
        return slots(columns, False, *others)

    return broken


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """The defect inside the transformers backend."""
    places: dict[str | None, tuple[Any, str, Callable[[Any], Any]]] = {
        "stale after a prefix hit": (Pass, "choose", stale()),
        "each chunk by itself": (Pass, "choose", defective(by_chunk)),
        "everyone as the first": (Pass, "choose", defective(by_first_row)),
        "top-k across images": (Pass, "choose", defective(across_pictures)),
        "re-indexed positions": (PaddedPass, "cut", renumbered),
        "padding is seen": (layers, "Slots", unmasked),
    }
    with pytest.MonkeyPatch.context() as patch:
        if name in places:
            owner, attribute, breaks = places[name]
            patch.setattr(owner, attribute, breaks(getattr(owner, attribute)))
        yield


def run(
    backend: Broken, folder: Path, monkeypatch: pytest.MonkeyPatch, *choice: str
) -> dict[str, str]:
    """Run the suite's command line on a backend: how each test ended, by id."""
    real = plugins.registry()
    spec = BackendSpec("broken", "a planted defect", lambda: backend)
    registry = replace(real, backends={**real.backends, "broken": spec})
    for module in (suite, ep_conformance.plugin):
        monkeypatch.setattr(module, "registry", lambda: registry)
    path = folder / "recording.json"
    with planted(backend.defect):
        asked = ("--backend", "broken", "--device", "cpu", "--record", str(path))
        status = suite.main([*asked, *choice])
    outcomes = {name: each.outcome for name, each in Recording.read(path).outcomes.items()}
    assert status == int("failed" in outcomes.values())
    return outcomes


@pytest.mark.parametrize(("kind", "level"), [(Broken, "1,2"), (Server, "3")])
def test_without_a_defect_everything_passes(kind, level, tmp_path, monkeypatch):
    outcomes = run(kind(None), tmp_path, monkeypatch, "--level", level)
    assert set(outcomes.values()) == {"passed"}


@pytest.mark.parametrize(
    ("defect", "caught_by"),
    [
        ("ties to the highest index", "identical-patches-rows"),
        ("ties to the highest index", "set-all-alike-set-entropy"),
        ("off by one span", "heads32x128-bfloat16-released"),
        ("top-k across images", "three-pictures-trace"),
        ("top-k across images", "set-three-pictures-set-entropy"),
        ("TF32 score", "close-calls-rows"),
        ("local heads", "heads32x128-bfloat16-released"),
        ("not finite first", "non-finite-rows"),
        ("not finite first", "set-non-finite-set-entropy"),
    ],
)
def test_level_1_catches(defect, caught_by, tmp_path, monkeypatch):
    test = f"test_selection.py::test_kept_indices[{caught_by}]"
    assert run(Broken(defect), tmp_path, monkeypatch, "--test", test) == {test: "failed"}


@pytest.mark.parametrize(
    ("defect", "caught_by"),
    [
        ("off by one span", MATCHES.format("demo-1pictures-layer=1,keep=0.11,method=released")),
        (
            "top-k across images",
            MATCHES.format("qwen-gqa-3pictures-layer=3,keep=0.5,method=set-entropy"),
        ),
        (
            "re-indexed positions",
            MATCHES.format("demo-1pictures-layer=1,keep=0.11,method=released"),
        ),
        (
            "re-indexed positions",
            MATCHES.format("llava-1pictures-layer=3,keep=0.5,method=set-entropy"),
        ),
        ("everyone as the first", MATCHES.format("llava-1+2pictures-layer=1,keep=16,method=trace")),
        ("padding is seen", "test_prompts_of_equal_length_that_keep_different_numbers"),
    ],
)
def test_level_2_catches(defect, caught_by, tmp_path, monkeypatch):
    test = f"test_engine.py::{caught_by}"
    assert run(Broken(defect), tmp_path, monkeypatch, "--test", test) == {test: "failed"}


@pytest.mark.parametrize(
    ("defect", "caught_by"),
    [
        ("stale after a prefix hit", "test_prefix_hit_as_cold"),
        ("the shortest comes first", "test_order_of_requests[1]"),
        ("each chunk by itself", "test_chunked_as_whole"),
        ("chunks are not made", "test_chunked_as_whole"),
        ("room for everyone", "test_preempted_as_undisturbed"),
        ("preempted, it loses a token", "test_preempted_as_undisturbed"),
        ("one budget for all", "test_budgets_side_by_side"),
        ("budgets share prefixes", "test_budgets_side_by_side"),
        ("off prunes", "test_off_is_untouched"),
        ("who leaves keeps slots", "test_who_leaves_takes_nothing_along"),
        ("who leaves takes others along", "test_who_leaves_takes_nothing_along"),
        ("no policy prunes", "test_no_policy_is_untouched"),
    ],
)
def test_level_3_catches(defect, caught_by, tmp_path, monkeypatch):
    test = f"test_serving.py::{caught_by}"
    assert run(Server(defect), tmp_path, monkeypatch, "--test", test) == {test: "failed"}


def test_a_failure_that_is_expected_does_not_fail_the_run(tmp_path, monkeypatch):
    test = "test_selection.py::test_kept_indices[identical-patches-rows]"
    known = tmp_path / "failures.txt"
    known.write_text(f"{test}  ties go to the highest index\n")
    backend = Broken("ties to the highest index")
    choice = ("--test", test, "--expected-failures", str(known))
    assert run(backend, tmp_path, monkeypatch, *choice) == {test: "xfailed"}
