"""Serving under pressure: answers stay the oracle's, and no block is lost.

One engine, one tiny Qwen2.5-VL. Where a test needs few blocks or small chunks, the engine gets them
for that long. Expected answers and kept tokens come from the conformance suite's oracle.
"""

import asyncio
import random
from types import SimpleNamespace

import pytest

from ep_backends.lmdeploy.requests import plan_of
from ep_conformance.checkpoints import tiny_qwen2_5_vl
from ep_core.backend import Request
from ep_core.budget import FlopsReduction, Keep
from ep_core.errors import EntropyPruneError
from ep_core.plan import Reason

from .common import (
    ask,
    chunks_of,
    expected,
    few_blocks,
    in_loop,
    nothing_lost,
    picture,
    scheduler,
    start,
    wrong,
)

# the engine's warnings are not ours to fix
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LAYER, KEEP, METHOD = 2, 0.25, "released"
NUMBER, STAR = "what number is written?", "is there a red star?"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A session, its checkpoint, and pictures of 64, 12, 30 and 4 tokens."""
    folder = tmp_path_factory.mktemp("serving")
    model = tiny_qwen2_5_vl(folder / "model", seed=1)
    sizes = [(8, 8), (4, 3), (5, 6), (2, 2)]
    pictures = [picture(folder, i, *size) for i, size in enumerate(sizes)]
    policy = f"layer={LAYER},keep={KEEP},method={METHOD}"
    with start(model, policy, enable_metrics=True) as session:
        yield SimpleNamespace(session=session, model=model, pictures=pictures)


def right(engine, contents, tokens=6, keep=KEEP, layer=LAYER):
    """The oracle's results."""
    return [expected(engine.model, content, layer, keep, METHOD, tokens) for content in contents]


def test_batch_of_different_pictures_and_text(engine):
    big, small, middle, least = engine.pictures
    contents = [
        (big, NUMBER),
        (NUMBER,),
        (small, "and", middle, STAR),
        (least, least, STAR),
        ("look:", middle, "then", big, "and at last", small, NUMBER),
        (big, big, NUMBER),
    ]
    with nothing_lost(engine.session):
        answers = ask(engine.session, contents)
    assert not wrong(answers, right(engine, contents))
    assert [answer.reason is None for answer in answers] == [True, False, True, True, True, True]


def test_budgets_of_requests_side_by_side(engine):
    big, _, middle, _ = engine.pictures
    content = (big, "and", middle, NUMBER)
    budgets = {None: KEEP, "off": None, Keep(7): 7, Keep(0.5): 0.5, Keep(30): 30, Keep(1): 1}
    requests = [Request(content, 6, budget) for budget in budgets]
    with nothing_lost(engine.session):
        answers = engine.session.generate(requests)
    wanted = [
        expected(engine.model, content, None if keep is None else LAYER, keep, METHOD)
        for keep in budgets.values()
    ]
    assert not wrong(answers, wanted)
    assert answers[1].reason == "switched off by the request"


@pytest.mark.parametrize(
    ("wishes", "keep"),
    [
        ([{"keep": 5}, "off", None], [5, 12, 8]),
        ([None, {"keep": 1.0}, {"keep": 2}], [16, 12, 2]),
        (["off", False, {"keep": 29}], [64, 12, 29]),
        ([{"keep": 64}, None, "off"], [64, 3, 30]),
    ],
)
def test_budgets_of_pictures_side_by_side(engine, wishes, keep):
    content = (*engine.pictures[:3], NUMBER)
    session = engine.session
    with nothing_lost(session):
        seen = in_loop(session, ask_with(session, content, wishes))
    wanted = expected(engine.model, content, LAYER, keep, METHOD)
    assert seen.ids == wanted.output_ids


async def ask_with(session, content, wishes, **sampling):
    """Ask through LMDeploy's own doors: each picture with what it asks of pruning."""
    from lmdeploy import GenerationConfig

    (messages, _), left = session._messages(Request(content)), iter(wishes)
    for part in messages[0]["content"]:
        if part["type"] == "image_data":
            part["image_data"]["entropyprune"] = next(left)
    engine = session.pipeline.async_engine
    config = GenerationConfig(**{"max_new_tokens": 6, "do_sample": False} | sampling)
    prepared = await engine.preprocess(messages, engine.session_mgr.get(), gen_config=config)
    seen = SimpleNamespace(ids=[], logprobs=[], plan=plan_of(prepared))
    async for output in engine.generate(prepared):
        seen.ids += output.token_ids or []
        seen.logprobs += output.logprobs or []
    return seen


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Keep(65), "keep=65 asks for more than a span of 64 tokens has"),
        (FlopsReduction(0.3), "a request cannot set 'flops', only keep, average"),
    ],
)
def test_request_with_a_budget_that_does_not_fit_is_refused_alone(engine, budget, message):
    content = (engine.pictures[0], NUMBER)
    with nothing_lost(engine.session), pytest.raises(EntropyPruneError, match=message):
        engine.session.generate([Request(content, 6), Request(content, 6, budget)])
    assert not wrong(ask(engine.session, [content]), right(engine, [content]))


def test_picture_that_a_request_names_wrongly_is_refused(engine):
    from lmdeploy.serve.core.exceptions import RequestError

    content = (*engine.pictures[:2], NUMBER)
    for wishes, message in {
        (("of", None)): "entropyprune='of' cannot be read",
        ((None, 5)): "entropyprune=5 cannot be read",
        ((None, True)): "entropyprune=True cannot be read",
    }.items():
        with nothing_lost(engine.session), pytest.raises(RequestError, match=message):
            in_loop(engine.session, ask_with(engine.session, content, wishes))


def test_engine_without_a_policy_refuses_a_budget(engine):
    from lmdeploy.serve.core.exceptions import RequestError

    content = (engine.pictures[1], NUMBER)
    (plain,) = right(engine, [content], layer=None)
    with start(engine.model, None) as session, nothing_lost(session):
        for wish in ({"keep": 5}, "on"):
            with pytest.raises(RequestError, match="this server does not prune"):
                in_loop(session, ask_with(session, content, [wish]))
        for wish in (None, "off", False):
            assert in_loop(session, ask_with(session, content, [wish])).ids == plain.output_ids


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"logprobs": 1, "logprob_start_len": 0, "max_new_tokens": 0}, Reason.PROMPT_LOGPROBS),
        ({"logprobs": 1, "logprob_start_len": 9, "max_new_tokens": 0}, Reason.PROMPT_LOGPROBS),
        ({"return_ppl": True}, Reason.PERPLEXITY),
    ],
)
def test_request_for_values_of_its_prompt_is_not_pruned(engine, sampling, reason):
    session, content = engine.session, (*engine.pictures[:2], NUMBER)
    plain = right(engine, [content], layer=None)[0]
    with nothing_lost(session):
        seen = in_loop(session, ask_with(session, content, [None, None], **sampling))
    assert seen.plan.reason == reason
    if sampling.get("max_new_tokens") == 0:
        scored = len(plain.input_ids) - sampling["logprob_start_len"] - 1
        assert len(seen.logprobs) == scored, f"{len(seen.logprobs)} tokens have one, not {scored}"
    else:
        assert seen.ids == plain.output_ids
    # and the next request is pruned again
    assert not wrong(ask(session, [content]), right(engine, [content]))


@pytest.mark.parametrize("size", [12, 13, 15, 16, 17, 23, 31, 40, 64, 65, 80, 100, 126])
def test_a_chunk_may_end_anywhere(engine, size):
    big, small, middle, least = engine.pictures
    contents = [
        (small, "and a text that is longer than the picture, so that a chunk ends inside", STAR),
        ("look: " * 9, small, middle, "twice", least, small, NUMBER),
        ("a text in several chunks, and then", big, NUMBER),
        ("nothing but text, also longer than a chunk",),
        (least, STAR),
    ]
    with chunks_of(engine.session, size), nothing_lost(engine.session):
        answers = ask(engine.session, contents)
    assert not wrong(answers, right(engine, contents))
    assert size > 65 or max(answer.chunks for answer in answers) > 1, "no prompt was cut"


def test_chunks_between_the_decode_steps_of_others(engine):
    big, small, middle, _ = engine.pictures
    session = engine.session
    early = [(small, NUMBER), (middle, STAR), (NUMBER,)]
    late = [("look: " * 20, big, "and", small, NUMBER), (big, middle, big, STAR)]

    async def both():
        first = [asyncio.ensure_future(session._ask(Request(c, 40))) for c in early]
        while not all(each.scheduled for each in session._running.values()) or not session._running:
            await asyncio.sleep(0)
        second = [asyncio.ensure_future(session._ask(Request(c, 12))) for c in late]
        return await asyncio.gather(*first), await asyncio.gather(*second)

    with chunks_of(session, 20), nothing_lost(session):
        first, second = in_loop(session, both())
    for contents, seen, tokens in ((early, first, 40), (late, second, 12)):
        answers = [
            session._answer(Request(content, tokens), each)
            for content, each in zip(contents, seen, strict=True)
        ]
        assert not wrong(answers, right(engine, contents, tokens))
    assert min(each.state.passes for each in second) > 2, "the late ones were not cut in chunks"


def test_preempted_requests_are_computed_again(engine):
    big, small, middle, _ = engine.pictures
    contents = [(big, NUMBER), (big, "and", middle, STAR), (small, NUMBER), (STAR,), (big, STAR)]
    with few_blocks(engine.session, 13), nothing_lost(engine.session):
        answers = ask(engine.session, contents, 60)
    assert sum(answer.preempted for answer in answers if answer.spans) > 1, (
        f"nobody with a picture was preempted: {[answer.preempted for answer in answers]}"
    )
    assert not wrong(answers, right(engine, contents, 60))


def test_preempted_requests_in_chunks(engine):
    big, small, middle, _ = engine.pictures
    contents = [("look: " * 12, big, NUMBER), (big, "and", middle, STAR), (small, STAR)] * 2
    session = engine.session
    with chunks_of(session, 40), few_blocks(session, 16), nothing_lost(session):
        answers = ask(session, contents, 50)
    assert any(answer.preempted and answer.chunks > 1 for answer in answers), (
        f"(preempted, chunks): {[(answer.preempted, answer.chunks) for answer in answers]}"
    )
    assert not wrong(answers, right(engine, contents, 50))


def test_many_requests_in_a_small_pool(engine):
    big, small, middle, least = engine.pictures
    messages = [
        *((text,) for text in (NUMBER, STAR, "a longer text, " * 6)),
        *((one, text) for one in (big, small, middle, least) for text in (NUMBER, STAR)),
        (big, small, STAR),
        ("look:", middle, "and", big, NUMBER),
        (least, big, middle, NUMBER),
        (big, big, STAR),
    ]
    requests = [(content, tokens) for content in messages for tokens in (1, 5, 17, 40)]
    random.Random(1).shuffle(requests)
    session = engine.session
    with chunks_of(session, 90), few_blocks(session, 20), nothing_lost(session):
        answers = session.generate([Request(*request) for request in requests])
    assert len(requests) >= 60
    assert sum(answer.preempted for answer in answers) > 4, "hardly anybody was preempted"
    wanted = [right(engine, [content], tokens)[0] for content, tokens in requests]
    assert not wrong(answers, wanted)


@pytest.mark.parametrize("when", ["waiting", "a chunk", "the first token", "decode"])
def test_a_client_that_leaves_loses_no_block(engine, when):
    big, small, middle, _ = engine.pictures
    session, good = engine.session, [(small, NUMBER), (STAR,), (big, middle, STAR)]

    def reached(sequence):
        if when == "a chunk":
            return 0 < sequence.num_history_ids < sequence.input_end_pos - 1
        if when == "waiting":
            return True
        done = sequence.num_valid_ids - sequence.input_end_pos
        return done >= {"the first token": 1, "decode": 5}[when]

    async def leave():
        gone = asyncio.ensure_future(session._ask(Request(("look: " * 12, big, small, STAR), 500)))
        while not any(
            reached(sequence)
            for known in scheduler(session).sessions.values()
            for sequence in known.sequences.values()
        ):
            assert not gone.done(), "it was answered"
            await asyncio.sleep(0)
        others = [asyncio.ensure_future(session._ask(Request(c, 6))) for c in good]
        gone.cancel()
        await asyncio.wait([gone])
        return await asyncio.gather(*others)

    with chunks_of(session, 30), nothing_lost(session):
        seen = in_loop(session, leave())
    answers = [session._answer(Request(c, 6), s) for c, s in zip(good, seen, strict=True)]
    assert not wrong(answers, right(engine, good))


def test_prompt_as_tokens_with_a_picture(engine):
    """What the server's `/generate` makes of `input_ids` with `image_data`."""
    from lmdeploy import GenerationConfig

    small = engine.pictures[1]
    session = engine.session
    (whole,) = right(engine, [(small, NUMBER)])
    (begin, stop) = whole.spans[0]
    token = whole.input_ids[begin]
    ids = [*whole.input_ids[:begin], token, *whole.input_ids[stop:]]
    (message,), _ = session._messages(Request((small,)))
    parts = message["content"]
    for part in parts:
        part["image_data"]["entropyprune"] = {"keep": 3}
    messages = [{"role": "user", "content": [{"type": "text", "text": ids}, *parts]}]
    engine_ = session.pipeline.async_engine

    async def answer():
        prepared = await engine_.preprocess(
            messages,
            engine_.session_mgr.get(),
            gen_config=GenerationConfig(max_new_tokens=6, do_sample=False),
            do_preprocess=False,
        )
        return [t async for output in engine_.generate(prepared) for t in output.token_ids or ()]

    with nothing_lost(session):
        ids = in_loop(session, answer())
    assert ids == expected(engine.model, (small, NUMBER), LAYER, 3, METHOD).output_ids


def test_asleep_and_awake_again(engine):
    """LMDeploy gives its cache back and makes it anew: with the same groups of layers."""
    contents = [(engine.pictures[0], NUMBER), (STAR,)]
    before = ask(engine.session, contents)
    agents = engine.session.pipeline.async_engine
    in_loop(engine.session, agents.sleep(level=1))

    async def wake():
        agents.wakeup()

    in_loop(engine.session, wake())
    with nothing_lost(engine.session):
        assert ask(engine.session, contents) == before
    assert not wrong(before, right(engine, contents))
