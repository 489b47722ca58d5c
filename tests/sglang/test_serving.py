"""Serving under pressure: the answers stay the oracle's, and no slot is lost.

Every engine runs with SGLang's own strict memory checks. Expected answers, kept sets and
log-probabilities come from the conformance suite's oracle.
"""

import asyncio

import pytest

from ep_core import demo

from .common import ask, expected, inside, nothing_lost, problems, questions, running

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

PICTURES = sorted(demo.PICTURES.glob("sample_*.png"))
TOKENS = 144  # of each of these pictures
BEFORE = 4  # tokens of the prompt before its first picture
NUMBER = "what number is written?"
LAYER, KEEP = 2, 16


@pytest.mark.parametrize("method", ["released", "rows", "set-entropy"])
def test_a_chunk_may_end_anywhere(method, tmp_path):
    one, three = (PICTURES[0], NUMBER), (*PICTURES[1:4], "is there a red star?")
    end = BEFORE + TOKENS
    sizes = [1000, 40, BEFORE - 1, BEFORE, BEFORE + 1, TOKENS, end - 1, end, end + 1, 2 * end + 20]
    found = {}
    with running(tmp_path, f"layer={LAYER},keep={KEEP},method={method}") as session:
        for size in sizes:
            # the smallest sizes cut the prompt's first picture, not all of them
            contents = [one] if size <= BEFORE + 1 else [one, three]
            session.engine.collective_rpc("set_chunk_size", size=size)
            assert session.engine.flush_cache().success
            with nothing_lost(session):
                outputs = ask(session, contents)
            for content, output in zip(contents, outputs, strict=True):
                found[size, len(content) - 1] = problems(
                    output, expected(content, LAYER, KEEP, method)
                )
        assert inside(session)["counts"]["parts"] > 20, "hardly a chunk ended inside a picture"
    assert not {key: what for key, what in found.items() if what}


def test_what_the_kept_pool_cannot_hold_does_not_block_the_server(tmp_path):
    """300 tokens fit below layer K, 207 kept ones: nobody waits for what will never fit."""
    arguments = {"max_total_tokens": 300, "max_running_requests": 8}
    hangs = {
        "a long text": ("is there a red star? " * 36, 8),  # 225 tokens
        "a long answer": ("is there a red star?", 220),
    }

    async def answer(session, text, tokens):
        asked = questions(session, [(text,)], [{"max_new_tokens": tokens}])
        one = {key: value[0] for key, value in asked.items()}
        try:
            return await asyncio.wait_for(session.engine.async_generate(**one), timeout=30)
        except TimeoutError:
            return "no answer in 30 s"
        except ValueError as error:
            return str(error)

    async def beside(session, text, tokens):
        return await asyncio.gather(
            answer(session, text, tokens), answer(session, "how many circles?", 4)
        )

    with running(tmp_path, f"layer={LAYER},keep={KEEP},method=released", **arguments) as session:
        for name, (text, tokens) in hangs.items():
            with nothing_lost(session):
                first, second = session.engine.loop.run_until_complete(
                    beside(session, text, tokens)
                )
            assert "no answer in 30 s" not in (first, second), name
            assert second["meta_info"]["finish_reason"]["type"] == "length", name
