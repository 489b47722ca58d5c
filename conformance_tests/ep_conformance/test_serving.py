"""Level 3: whatever else an engine is doing, a request is answered as the oracle answers it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from ep_conformance.comparison import Pruned, expect
from ep_conformance.plugin import Workshop
from ep_core.backend import Answer, Backend, Request, Serving, Session
from ep_core.budget import Keep
from ep_core.errors import EntropyPruneError, UnsupportedError

CHECKPOINT = "qwen-gqa"  # random weights: answers do not end early, and depend on every token
CHUNK = 32  # tokens; the largest picture here has 48
ROOM = 320  # tokens; no prompt with its answer takes more than half of it
START = 6  # tokens that every prompt starts with
LONG = "the text that both of them share is long enough to fill several blocks of a cache. "

# the policies (None: not even patched) and how the engine serves
ENGINES: dict[str, tuple[Pruned | None, Serving]] = {
    "roomy": (Pruned(2, 0.25, "set-entropy"), Serving(prefix_cache=True)),
    "pressed": (
        Pruned(2, 0.25, "released"),
        Serving(prefill_chunk=CHUNK, kv_tokens=ROOM, prefix_cache=True),
    ),
    "untouched": (None, Serving()),
}
Content = tuple[str | Path, ...]


class Engine:
    """A session that answers as the oracle does, or fails the test."""

    def __init__(self, session: Session, model: Path, pruned: Pruned | None) -> None:
        self.session, self._model, self._pruned = session, model, pruned

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Ask together and compare each answer with the oracle's."""
        answers = self.session.generate(requests)
        for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            try:
                asked = replace(request, budget=None)
                expect(self._model, asked, self._pruned_by(request)).check(answer)
            except AssertionError as error:
                raise AssertionError(
                    f"request {i} of {len(requests)}, {request}, found {answer.cached_tokens} "
                    f"tokens in the cache, took {answer.chunks} passes and was preempted "
                    f"{answer.preempted} times: {error}"
                ) from None
        return answers

    def _pruned_by(self, request: Request) -> Pruned | None:
        if request.budget == "off" or self._pruned is None:
            return None
        if request.budget is None:
            return self._pruned
        assert isinstance(request.budget, Keep)
        return replace(self._pruned, keep=request.budget.value)


@pytest.fixture(scope="module")
def engine(backend: Backend, device: str, workshop: Workshop) -> Iterator[Callable[[str], Engine]]:
    """Gives the engine of a name; one runs at a time, and ends when another is asked for."""
    model, able = workshop.checkpoint(CHECKPOINT), backend.capabilities
    current: dict[str, Engine] = {}
    with ExitStack() as stack:

        def give(name: str) -> Engine:
            if name not in current:
                stack.close()
                current.clear()
                pruned, wanted = ENGINES[name]
                serving = Serving(
                    prefill_chunk=wanted.prefill_chunk if able.chunked_prefill else None,
                    kv_tokens=wanted.kv_tokens if able.preemption else None,
                    prefix_cache=wanted.prefix_cache if able.prefix_cache else None,
                )
                policy = None if pruned is None else pruned.policy
                try:
                    session = backend.open(
                        model, policy, device=device, dtype="float32", serving=serving
                    )
                except UnsupportedError as error:
                    pytest.skip(f"refused: {error}")
                current[name] = Engine(stack.enter_context(session), model, pruned)
            return current[name]

        yield give


@pytest.fixture(scope="module")
def pictures(workshop: Workshop) -> list[Path]:
    """Pictures of 12, 48, 10, 24 and 25 tokens, and another one of 12."""
    sizes = [(4, 3), (8, 6), (2, 5), (6, 4), (5, 5), (4, 3)]
    return [workshop.picture(i, 28 * wide, 28 * high) for i, (wide, high) in enumerate(sizes)]


def mixture(pictures: Sequence[Path], before: str, able: Backend) -> list[Request]:
    """Prompts of every kind, none of which starts as a prompt with another `before` does."""
    a, b, c, d, e, _ = pictures
    contents: list[Content] = [
        (before, a, "what number is written?"),
        (before, "is there a red star?"),
        (before, b, "how many circles?"),
        (before, a, "and where?"),
        (before, e, "a", e, "what?"),
        (before, c, "beside", d, a, "is there a red star?"),
    ]
    return [
        Request(content, 4 + i)
        for i, content in enumerate(contents)
        if able.capabilities.multi_image or sum(isinstance(part, Path) for part in content) < 2
    ]


@pytest.mark.row("batch = alone")
@pytest.mark.needs("batch")
@pytest.mark.parametrize("first", ["alone", "together"])
def test_together_as_alone(
    first: str, engine: Callable[[str], Engine], backend: Backend, pictures: list[Path]
) -> None:
    """What else is in the batch changes nothing, whether or not it was asked before."""
    requests, roomy = mixture(pictures, first, backend), engine("roomy")
    if first == "alone":
        for request in requests:
            roomy.ask([request])
        roomy.ask(requests)
    else:
        roomy.ask(requests)
        for request in requests:
            roomy.ask([request])


@pytest.mark.row("any order of requests")
@pytest.mark.needs("batch")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_requests(
    seed: int, engine: Callable[[str], Engine], backend: Backend, pictures: list[Path]
) -> None:
    """Everyone gets their own answer, whoever comes first."""
    requests = mixture(pictures, f"{seed}. ", backend)
    random.Random(seed).shuffle(requests)
    engine("roomy").ask(requests)


@pytest.mark.row("prefix hit = cold")
@pytest.mark.needs("prefix_cache")
def test_prefix_hit_as_cold(
    engine: Callable[[str], Engine], backend: Backend, pictures: list[Path]
) -> None:
    """A cached picture stands for itself alone, and only where the prompts are alike so far."""
    a, b, *_, f = pictures
    # what is asked one after the other, and how many of its pictures are cached by then
    steps: dict[str, tuple[Content, int]] = {
        "cold": ((a, LONG, "what?"), 0),
        "another question": ((a, LONG, "why?"), 1),
        "the same again": ((a, LONG, "what?"), 1),
        "another picture of its size": ((f, LONG, "what?"), 0),
        "after another text": (("look:", a, LONG, "what?"), 0),
    }
    if backend.capabilities.multi_image:
        steps |= {
            "two pictures": ((b, LONG, a, LONG, "what?"), 0),
            "another second picture": ((b, LONG, f, LONG, "what?"), 1),
            "both are known": ((b, LONG, a, LONG, "why?"), 2),
            "the same picture twice": ((a, LONG, a, LONG, "what?"), 1),
        }
    for name, (content, known) in steps.items():
        (answer,) = engine("roomy").ask([Request(content, 6)])
        ends = [0, *(span.stop for span in answer.spans)]
        starts = [*(span.start for span in answer.spans), answer.prompt_tokens]
        assert ends[known] <= answer.cached_tokens <= starts[known], (
            f"{name}: {answer.cached_tokens} tokens were cached; {known} pictures were known"
        )


@pytest.mark.row("budgets side by side")
@pytest.mark.needs("request_budget")
def test_budgets_side_by_side(engine: Callable[[str], Engine], pictures: list[Path]) -> None:
    """Each request is pruned by its own budget, and finds nothing that another one left."""
    roomy, picture = engine("roomy"), pictures[1]
    budgets: list[Keep | Literal["off"] | None] = [None, Keep(3), "off", Keep(0.5), Keep(1)]

    def asked(text: str) -> list[Request]:
        return [Request(("mine: ", picture, text), 6, budget=budget) for budget in budgets]

    for request in asked("one by one"):
        (answer,) = roomy.ask([request])
        assert answer.cached_tokens <= START, f"{request} found {answer.cached_tokens} tokens"
    roomy.ask(asked("together"))
    roomy.ask(asked("one by one")[::-1])
    with pytest.raises(EntropyPruneError, match="keep=49"):
        roomy.session.generate([Request((picture, "too much"), 6, budget=Keep(49))])
    roomy.ask(asked("after a refusal"))


@pytest.mark.row("off by request = unpruned")
@pytest.mark.needs("request_budget")
def test_off_is_untouched(
    engine: Callable[[str], Engine], backend: Backend, pictures: list[Path]
) -> None:
    """A request that switches pruning off is answered as without it, beside pruned ones."""
    requests = mixture(pictures, "off or not ", backend)
    off = [replace(request, budget="off") for request in requests]
    answers = engine("roomy").ask([*requests, *off, *requests])
    for answer in answers[len(requests) : 2 * len(requests)]:
        assert not answer.spans or all(len(s.kept) == s.stop - s.start for s in answer.spans)
        assert answer.reason, "nothing was pruned, and the answer does not say why"


@pytest.mark.row("chunked = whole")
@pytest.mark.needs("chunked_prefill")
def test_chunked_as_whole(engine: Callable[[str], Engine], pictures: list[Path]) -> None:
    """A prefill pass may end before, after and, where the engine cuts it, inside a picture.

    The text before the picture grows by a token each time, and the ends of the passes with it.
    """
    pressed = engine("pressed")
    for i in range(CHUNK + 2):
        # another first letter each time, so that nothing but the start is ever cached
        content = (f"{chr(ord('A') + i)}{'.' * i}", pictures[1], "what number is written?")
        (answer,) = pressed.ask([Request(content, 6)])
        assert answer.chunks is not None
        assert answer.chunks > 1, f"a prompt of {answer.prompt_tokens} tokens came whole"
        assert answer.cached_tokens <= START, f"{answer.cached_tokens} tokens were cached"


@pytest.mark.row("preempted = undisturbed")
@pytest.mark.needs("preemption")
def test_preempted_as_undisturbed(
    engine: Callable[[str], Engine], backend: Backend, pictures: list[Path]
) -> None:
    """Requests that the engine had to take back go on as if nothing had happened."""
    requests = [
        Request((f"{i}: ", picture, "is there a red star?"), 40 + 4 * i)
        for i, picture in enumerate([*pictures, *pictures])
    ]
    answers = engine("pressed").ask(requests + mixture(pictures, "then ", backend))
    assert sum(answer.preempted for answer in answers), "there was room for everyone"


@pytest.mark.row("aborts lose nothing")
@pytest.mark.needs("abort")
def test_who_leaves_takes_nothing_along(
    engine: Callable[[str], Engine], backend: Backend, pictures: list[Path]
) -> None:
    """Clients leave at any time; the others are answered, and no KV slot is lost."""
    pressed = engine("pressed")
    assert pressed.session.held_slots() == 0, "something is held before anyone asks"
    for turn, moments in enumerate(([1, 2, 30], [5, 1, 60], [20, 3, 2])):
        leaving = [
            Request((f"{turn}{i}", pictures[i + 1], "how many circles?"), 90, leave_after=moment)
            for i, moment in enumerate(moments)
        ]
        answers = pressed.ask([*leaving, *mixture(pictures, f"{turn} stays ", backend)])
        gone = answers[: len(leaving)]
        assert all(len(answer.output_ids) < 90 for answer in gone), "nobody left early"
        held = pressed.session.held_slots()
        assert held == 0, f"{held} KV slots per layer are held after everyone has left"


@pytest.mark.row("no policy = unpruned")
def test_no_policy_is_untouched(
    engine: Callable[[str], Engine], backend: Backend, pictures: list[Path]
) -> None:
    """Without a policy the engine answers as the oracle does unpruned."""
    untouched = engine("untouched")
    requests = mixture(pictures, "", backend)
    batches = [requests] if backend.capabilities.batch else [[each] for each in requests]
    for batch in batches:
        for answer in untouched.ask(batch):
            assert answer.reason, "nothing was pruned, and the answer does not say why"
            assert all(len(span.kept) == span.stop - span.start for span in answer.spans)
