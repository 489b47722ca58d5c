"""What tests of a running LMDeploy engine share: expected answers, and a hand inside the engine.

Engines run in the process of the tests. The checkpoints are tiny and random: their end-of-sequence
token is never the likeliest, so answers are as long as asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ep_conformance.checkpoints import make_picture
from ep_conformance.oracle import Oracle, OracleResult
from ep_core.backend import Answer, Request
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy, no_policy_in_environment

Content = tuple[str | Path, ...]

TOLERANCE = 1e-4  # of a log-probability; the conformance suite's for logits
TIE = 1e-3  # tokens whose log-probabilities are closer may swap
CPU = {"num_gpu_blocks": 64, "block_size": 16, "max_batch_size": 4, "eager_mode": True}
SECONDS = 300  # how long a state is waited for at most
PIXELS = 28  # sides of what becomes a token in Qwen2.5-VL


def start(model: Path, policy: str | None, **arguments: Any) -> Any:
    """A session of the LMDeploy backend; arguments are of `PytorchEngineConfig`."""
    parsed = None if policy is None else PruningPolicy.parse(policy)
    return registry().backend("lmdeploy").load().open(model, parsed, dtype="float32", **arguments)


def picture(folder: Path, seed: int, wide: int, tall: int) -> Path:
    """A picture of `wide` times `tall` tokens."""
    path = folder / f"{seed}-{wide}x{tall}.png"
    return path if path.exists() else make_picture(path, seed, (PIXELS * wide, PIXELS * tall))


def launch(model: Path, speculative: Any = None, **arguments: Any) -> Any:
    """Start LMDeploy's pipeline as a user does; gives the engine's configuration."""
    from lmdeploy import PytorchEngineConfig, pipeline

    config = PytorchEngineConfig(**(CPU | arguments))
    options = {"backend_config": config, "speculative_config": speculative}
    with pipeline(str(model), log_level="ERROR", **options):
        return config


@contextmanager
def no_pruning() -> Iterator[None]:
    """Inside, pruning starts switched off; nothing is left of it afterwards."""
    import ep_backends.lmdeploy

    with no_policy_in_environment():
        ep_backends.lmdeploy.activate().undo()
        yield
        ep_backends.lmdeploy.activate().undo()


# What is right.


@cache
def _oracle(model: Path) -> Oracle:
    return Oracle(model)


@cache
def _generated(
    model: Path,
    content: Content,
    layer: int | None,
    keep: tuple[int, ...],
    method: str,
    tokens: int,
) -> OracleResult:
    return _oracle(model).generate(
        content, layer=layer, keep=keep, method=method, max_new_tokens=tokens
    )


def expected(
    model: Path,
    content: Content,
    layer: int | None,
    keep: int | float | Sequence[int],
    method: str = "released",
    tokens: int = 6,
) -> OracleResult:
    """The oracle's result for one message.

    Args:
        model: folder of the checkpoint.
        content: texts and picture files.
        layer: the first that sees kept tokens only; None for no pruning.
        keep: tokens of each picture; or the same number, or share of its tokens, for all.
        method: by which they are chosen.
        tokens: of the answer.
    """
    pictures = sum(isinstance(part, Path) for part in content)
    if not pictures or layer is None:
        return _generated(model, content, None, (), method, tokens)
    if isinstance(keep, float):
        spans = _generated(model, content, None, (), method, 1).spans
        keep = [max(1, int(keep * (stop - begin) + 0.5)) for begin, stop in spans]
    each = (keep,) * pictures if isinstance(keep, int) else tuple(keep)
    return _generated(model, content, layer, each, method, tokens)


def problems(answer: Answer, wanted: OracleResult) -> list[str]:
    """How an engine's answer differs from the oracle's result; [] if it does not."""
    found = []
    kept = [list(span.kept) for span in answer.spans]
    if answer.spans and kept != wanted.kept:
        found.append(f"kept {kept}, the oracle {wanted.kept}")
    if answer.prompt_tokens != len(wanted.input_ids):
        found.append(f"{answer.prompt_tokens} tokens of prompt, not {len(wanted.input_ids)}")
    if len(answer.output_ids) != len(wanted.output_ids):
        found.append(f"{len(answer.output_ids)} tokens, the oracle {len(wanted.output_ids)}")
    logprobs = torch.log_softmax(wanted.logits, -1)
    for step, (token, value) in enumerate(zip(answer.output_ids, answer.logprobs, strict=True)):
        right = wanted.output_ids[step]
        if token != right:
            gap = float(logprobs[step, right] - logprobs[step, token])
            if gap > TIE:
                found.append(f"token {step} is {token}, the oracle's {right} is {gap:.4f} above it")
            break
        off = abs(float(logprobs[step, token]) - value)
        if not off <= TOLERANCE:
            found.append(f"token {step}: log-probability off by {off:.2e}")
            break
    return found


def wrong(
    answers: Sequence[Answer], wanted: Sequence[OracleResult]
) -> dict[int, tuple[Answer, list[str]]]:
    """Of each answer that is not the oracle's, by its place: what differs."""
    pairs = enumerate(zip(answers, wanted, strict=True))
    return {i: (pair[0], what) for i, pair in pairs if (what := problems(*pair))}


def ask(session: Any, contents: Sequence[Content], tokens: int = 6, **request: Any) -> list[Answer]:
    """Submit messages together."""
    return session.generate([Request(content, tokens, **request) for content in contents])


# Inside the engine. It has an event loop in a thread: what touches it runs there.


def in_loop(session: Any, work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in the engine's loop; one that takes too long is given up, and said."""
    running = asyncio.run_coroutine_threadsafe(work, session.pipeline.internal_thread.loop)
    try:
        return running.result(SECONDS)
    except TimeoutError:
        running.cancel()
        raise AssertionError(f"the engine did not come to its end in {SECONDS} s") from None


def scheduler(session: Any) -> Any:
    """LMDeploy's scheduler."""
    return session.pipeline.async_engine.engine.scheduler


def free_blocks(session: Any) -> int:
    """Blocks that nobody holds."""
    return scheduler(session).block_manager.get_num_free_gpu_blocks()


@contextmanager
def nothing_lost(session: Any) -> Iterator[None]:
    """Afterwards as many blocks are free as before, and the scheduler knows no request."""
    before = free_blocks(session)
    yield
    end = time.monotonic() + SECONDS
    # a session is ended after its last token went out
    while (free_blocks(session), len(scheduler(session).sessions)) != (before, 0):
        assert time.monotonic() < end, (
            f"{SECONDS} s after the last answer: {before} blocks were free, now "
            f"{free_blocks(session)}; sessions that are left: {list(scheduler(session).sessions)}"
        )
        time.sleep(0.01)
    allocator = scheduler(session).block_manager.allocator.get_phy_allocator("gpu")
    free = allocator._free_blocks[len(allocator._free_blocks) - before :].tolist()
    assert len(set(free)) == before, "a block is free twice"


@contextmanager
def few_blocks(session: Any, count: int) -> Iterator[None]:
    """Inside, the engine has only that many blocks: somebody else holds the others."""
    allocator = scheduler(session).block_manager.allocator

    async def take() -> Any:
        return allocator.allocate(allocator.get_phy_allocator("gpu").get_num_free_blocks() - count)

    async def give_back(blocks: Any) -> None:
        allocator.free(blocks)

    taken = in_loop(session, take())
    try:
        yield
    finally:
        in_loop(session, give_back(taken))


@contextmanager
def chunks_of(session: Any, tokens: int) -> Iterator[None]:
    """Inside, prompts are prefilled in chunks of at most so many tokens."""
    engine = session.pipeline.async_engine.engine
    maker = engine._engine_loop.inputs_maker
    places = (engine.cache_config, maker.config, maker.long_context_chunker)
    before = [place.max_prefill_token_num for place in places]

    async def set_to(values: Sequence[int]) -> None:
        for place, value in zip(places, values, strict=True):
            place.max_prefill_token_num = value
        maker.long_context_chunker.clear()

    in_loop(session, set_to([tokens] * len(places)))
    try:
        yield
    finally:
        in_loop(session, set_to(before))
