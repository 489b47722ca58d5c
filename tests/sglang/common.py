"""What tests of a running SGLang engine share: starting one, expected answers, a look inside.

The engine runs in processes of its own. `install` below is an SGLang plugin for those processes:
it counts what happened, tells what each pool holds through SGLang's own internal state, and offers
a call through SGLang's own remote procedure calls. It changes nothing by itself.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

PROBE = "ep_serving_probe"  # this file's name as a plugin
EOS = 423  # of the demonstration model
# what SGLang checks about its own memory, read by its processes when they start
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",  # before every batch
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",  # no slot in use is free, none is free twice
    "SGLANG_INVARIANT_CHECK": "2",  # raise
    # running out of memory again soon after a retraction
    "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS": "5",
    "SGLANG_RETRACT_DECODE_STEPS": "1",
}
TOLERANCE = 1e-4  # of a log-probability; the conformance suite's for logits
TIE = 1e-3  # tokens whose log-probabilities are closer may swap
SECONDS = 900  # a bound on whatever is waited for; nothing here takes that long, however busy
GONE = "gone"  # how the names of requests begin that the scheduler itself may abort
COUNTS: Counter[str] = Counter()
ARMED: dict[str, int | None] = {}


# In the engine's processes.


def install() -> None:
    """SGLang's plugin entry point."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.internal_state"
        ".SchedulerInternalStateController._add_topology",
        _tell,
        HookType.AFTER,
    )
    HookRegistry.register(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache._evict",
        _count_evicted,
        HookType.AFTER,
    )
    HookRegistry.register(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
        _count_retracted,
        HookType.AFTER,
    )
    Scheduler.set_chunk_size = _set_chunk_size
    Scheduler.evict_from = _evict_from
    Scheduler.abort_when = _arm
    if os.environ.get("ENTROPYPRUNE_WORKERS"):
        HookRegistry.register(
            "ep_backends.sglang.prefill.LayerHooks._cut", _count_parts, HookType.AFTER
        )
        HookRegistry.register(
            "ep_backends.sglang.attention.PrunedAttention._decode_view",
            _check_lengths,
            HookType.AFTER,
        )
        HookRegistry.register(
            "ep_backends.sglang.kv.KeptRadixCache.claim_kv_row", _count_released, HookType.BEFORE
        )
        HookRegistry.register(
            "sglang.srt.managers.scheduler.Scheduler.process_input_requests",
            _abort_chunked,
            HookType.BEFORE,
        )


def _tell(result: None, controller: Any, state: dict[str, Any]) -> None:
    """Add what each pool holds to the internal state."""
    scheduler = controller.scheduler
    tree, allocator = scheduler.tree_cache, scheduler.token_to_kv_pool_allocator
    two = hasattr(allocator, "full_to_swa_index_mapping")
    pools = {}
    for name in ("full", "swa") if two else ("full",):
        pool = getattr(allocator, f"{name}_attn_allocator") if two else allocator
        free = pool.get_all_free_pages().tolist()
        pools[name] = {
            "size": pool.size,
            "free": len(set(free)),
            "free twice": len(free) - len(set(free)),
            "evictable": getattr(tree, f"{name}_evictable_size")(),
            "protected": getattr(tree, f"{name}_protected_size")(),
        }
    if two:
        mapped = allocator.full_to_swa_index_mapping[:-1]
        pools["swa"]["in use"] = len(set(mapped[mapped > 0].tolist()))
    rows = scheduler.req_to_token_pool
    state["probe"] = {
        "pools": pools,
        "rows": rows.size - len(rows.free_slots),
        "waiting": len(scheduler.waiting_queue),
        "running": len(scheduler.running_batch.reqs),
        "overlap": scheduler.enable_overlap,
        "plugin": "ep_backends.sglang.plugin" in sys.modules,
        "too many": tree.swa_transient_size(),
        "counts": dict(COUNTS),
    }


def _count_evicted(result: Any, *args: Any, **kwargs: Any) -> None:
    COUNTS["evicted full"] += result.num_tokens_evicted
    COUNTS["evicted kept"] += result.swa_num_tokens_evicted


def _count_parts(result: Any, hooks: Any, batch: Any, *args: Any) -> None:
    COUNTS["parts"] += sum(part.waiting is not None for part in batch.pruning.prefill.requests)


def _check_lengths(view: Any, attention: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """The kept lengths of plans, known on the host, are what the mapping says."""
    slots = attention._rows[batch.req_pool_indices.long()].long()
    columns = torch.arange(slots.shape[1])
    held = (attention._mapping[slots] > 0) & (columns < batch.seq_lens[:, None])
    found, told = held.sum(dim=1).tolist(), view.seq_lens_cpu.tolist()
    assert found == told, f"rows hold {found} kept tokens, their plans say {told}"
    assert view.seq_lens.tolist() == told
    assert view.seq_lens_sum == sum(told)
    COUNTS["lengths"] += 1


def _count_retracted(result: Any, *args: Any, **kwargs: Any) -> None:
    COUNTS["retracted"] += len(result[0])


def _count_released(tree: Any, req: Any) -> None:
    from ep_backends.sglang.requests import request_of

    request = request_of(req)
    if request is not None:
        COUNTS["released with a part"] += request.waiting is not None
        COUNTS["released with dropped slots"] += bool(request.dropped)


def _set_chunk_size(scheduler: Any, size: int) -> None:
    """Remote call: prefill in chunks of another size from now on."""
    scheduler.chunked_prefill_size = size


def _arm(scheduler: Any, chunks: int | None = None) -> None:
    """Remote call: abort the next prompt in chunks that is called `GONE`.

    Args:
        scheduler: SGLang's.
        chunks: once a picture waits at layer K after so many; None: once the last chunk has dropped
            tokens, whose slots are in no list then.
    """
    ARMED["chunks"] = chunks


def _abort_chunked(scheduler: Any, *args: Any) -> None:
    """A client leaves while a chunk of its prompt is running."""
    from sglang.srt.managers.io_struct import AbortReq

    from ep_backends.sglang.requests import request_of

    req = scheduler.chunked_req
    request = request_of(req)
    if not ARMED or request is None or not req.rid.startswith(GONE):
        return
    chunks = ARMED["chunks"]
    if request.dropped if chunks is None else request.waiting and request.chunks >= chunks:
        ARMED.clear()
        COUNTS["aborted"] += 1
        scheduler.abort_request(AbortReq(rid=req.rid))


def _evict_from(scheduler: Any, position: int) -> None:
    """Remote call: the prefix cache loses what it holds behind a position of each prompt."""
    tree = scheduler.tree_cache
    core = tree.tree_core
    tails = []

    def visit(node: Any, start: int) -> None:
        for child in list(node.children.values()):
            stop = start + len(child.key)
            if start < position < stop:
                upper, action = core._split_node(child.key, child, position - start)
                tree._apply_cache_actions([] if action is None else [action])
                visit(upper, position)
                continue
            visit(child, stop)
            if start >= position:
                tails.append(child)  # after its children

    visit(core.root_node, 0)
    for node in tails:
        tree._evict_device_leaf(node.id, dict.fromkeys(tree.tree_components, 0))


# In the process of the tests.


class EngineDied(Exception):
    """One of the engine's processes ended."""


class _Signals:
    """What the engine does in this process on a signal: SGLang's own would end it."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def sigterm_handler(self) -> None:
        """Nothing to drain."""

    def running_phase_sigquit_handler(self) -> None:
        """A child died: whoever waits for an answer waits no longer."""
        self._manager.died = True
        for task in asyncio.all_tasks(self._manager.event_loop):
            task.cancel()


@contextmanager
def running(
    folder: Path,
    policy: str | None,
    environment: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Iterator[Any]:
    """A session of the SGLang backend on the demonstration model, watched from inside.

    Only one at a time: SGLang ends every child process when an engine is shut down.

    Args:
        folder: where the probe is made a plugin.
        policy: what to prune.
        environment: what the engine's processes read besides `STRICT`.
        arguments: of `sglang.Engine`.
    """
    from ep_backends.sglang.backend import SGLangBackend
    from ep_core import demo
    from ep_core.policy import PruningPolicy

    metadata = folder / f"{PROBE}-1.dist-info"
    if not metadata.exists():
        metadata.mkdir(parents=True)
        (folder / f"{PROBE}.py").symlink_to(Path(__file__).resolve())
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROBE}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(
            f"[sglang.srt.plugins]\n{PROBE} = {PROBE}:install\n"
        )
    before, own = dict(os.environ), STRICT | dict(environment or {})
    os.environ.update(own)
    sys.path.insert(0, str(folder))  # spawned processes start with the same path
    try:
        with SGLangBackend().open(
            demo.MODEL,
            None if policy is None else PruningPolicy.parse(policy),
            device="cpu",
            dtype="float32",
            **{"log_level": "warning", **arguments},
        ) as session:
            session.engine.tokenizer_manager.signal_handler_class = _Signals
            yield session
    finally:
        sys.path.remove(str(folder))
        for key in own:
            os.environ.pop(key)
        os.environ.update({key: before[key] for key in own if key in before})


def alive(session: Any) -> bool:
    """Do all processes of the engine still run, as far as was heard?"""
    return not getattr(session.engine.tokenizer_manager, "died", False)


def wait(session: Any, work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in the engine's loop.

    Raises:
        EngineDied: one of the engine's processes ended meanwhile.
    """
    try:
        return session.engine.loop.run_until_complete(work)
    except asyncio.CancelledError as error:
        raise EngineDied("a process of the engine died; its traceback is in the output") from error


async def look(session: Any) -> dict[str, Any]:
    """What the scheduler's process tells."""
    return (await session.engine.tokenizer_manager.get_internal_state())[0]["probe"]


def inside(session: Any) -> dict[str, Any]:
    """What the scheduler's process tells."""
    return wait(session, look(session))


async def until(session: Any, condition: Callable[[dict[str, Any]], bool], what: str) -> Any:
    """Wait for a state of the scheduler; what it tells then."""
    end = time.monotonic() + SECONDS
    while not condition(told := await look(session)):
        if time.monotonic() > end:
            raise AssertionError(f"in {SECONDS} s the engine did not come to this: {what}: {told}")
    return told


def idle(session: Any) -> dict[str, Any]:
    """Wait until no request is left in the scheduler; what it tells then.

    An answer is there before the scheduler is through with its request: with the overlap schedule
    one more pass is under way.
    """

    def empty(told: dict[str, Any]) -> bool:
        return not (told["rows"] or told["waiting"] or told["running"])

    return wait(session, until(session, empty, "no request is left"))


@contextmanager
def nothing_lost(session: Any) -> Iterator[None]:
    """Afterwards each slot of both pools is free or in the prefix cache, once."""
    yield
    told = idle(session)
    assert told["too many"] == 0, f"dropped slots of requests that are gone are counted: {told}"
    for name, pool in told["pools"].items():
        assert pool["free twice"] == 0, f"{name}: {told}"
        assert pool["protected"] == 0, f"{name}: a request that is gone holds a prefix: {told}"
        assert pool["free"] + pool["evictable"] == pool["size"], f"{name}: slots are lost: {told}"
        assert pool.get("in use", pool["evictable"]) == pool["evictable"], f"{name}: {told}"


def ask(
    session: Any,
    contents: Sequence[tuple[str | Path, ...]],
    sampling: Sequence[dict[str, Any]] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Submit messages together; SGLang's own answers, log-probabilities and kept sets included."""
    asked = questions(session, contents, sampling)
    return wait(session, session.engine.async_generate(**asked, return_logprob=True, **arguments))


async def each(
    session: Any,
    contents: Sequence[tuple[str | Path, ...]],
    sampling: Sequence[dict[str, Any]] | None = None,
    names: Sequence[str] | None = None,
) -> list[dict[str, Any] | str]:
    """Submit messages at once as requests of their own.

    Args:
        session: a session of the backend.
        contents, sampling: as for `questions`.
        names: of the requests, to abort them by.

    Returns:
        for each message SGLang's answer, or why there is none.
    """
    asked = questions(session, contents, sampling)

    async def one(i: int) -> dict[str, Any] | str:
        arguments = {key: value[i] for key, value in asked.items()}
        name = uuid.uuid4().hex if names is None else names[i]
        answer = session.engine.async_generate(**arguments, rid=name, return_logprob=True)
        try:
            return await asyncio.wait_for(answer, SECONDS)
        except TimeoutError:
            # or it would be found running, and taken for a leak
            session.engine.tokenizer_manager.abort_request(rid=name)
            return f"no answer in {SECONDS} s"
        except ValueError as error:
            return str(error)

    return await asyncio.gather(*map(one, range(len(contents))))


def questions(
    session: Any,
    contents: Sequence[tuple[str | Path, ...]],
    sampling: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The arguments of `generate` for messages; the end of sequence is never chosen.

    Args:
        session: a session of the backend.
        contents: texts and picture files of each message.
        sampling: of each message, over the defaults; `policy` is what it asks of pruning.
    """
    from ep_backends.shared.pictures import read_picture

    pictures = [[part for part in content if isinstance(part, Path)] for content in contents]
    parameters = []
    for own in sampling or [{}] * len(contents):
        rest = {key: value for key, value in own.items() if key != "policy"}
        policy = own.get("policy", {"details": True})
        defaults = {
            "temperature": 0,
            "max_new_tokens": 6,
            "logit_bias": {str(EOS): -100.0},
            "custom_params": {"entropyprune": policy},
        }
        parameters.append(defaults | rest)
    return {
        "prompt": [session.prompt(content) for content in contents],
        "image_data": [[read_picture(p) for p in paths] or None for paths in pictures],
        "sampling_params": parameters,
    }


@cache
def oracle() -> Any:
    """The oracle of the demonstration model that never chooses the end of sequence."""
    from ep_conformance.oracle import Oracle
    from ep_core import demo

    class Endless(Oracle):
        def _logits(self, last: torch.Tensor) -> torch.Tensor:
            logits = super()._logits(last).clone()
            logits[EOS] -= 100.0
            return logits

    endless = Endless(demo.MODEL)
    endless.eos = []
    return endless


@cache
def expected(
    content: tuple[str | Path, ...], layer: int | None, keep: int, method: str, tokens: int = 6
) -> Any:
    """The oracle's result for one message, `keep` tokens of each picture."""
    pictures = sum(isinstance(part, Path) for part in content)
    if not pictures:
        layer = None
    return oracle().generate(
        content, layer=layer, keep=[keep] * pictures, method=method, max_new_tokens=tokens
    )


def problems(output: dict[str, Any] | str, wanted: Any, tokens: int = 6) -> list[str]:
    """How an output of the engine differs from the oracle's result; [] if it does not.

    Args:
        output: SGLang's, or why there is none.
        wanted: the oracle's, of at least as many tokens.
        tokens: asked for.
    """
    if isinstance(output, str):
        return [output]
    meta = output["meta_info"]
    if meta["finish_reason"] != {"type": "length", "length": tokens}:
        return [f"finished as {meta['finish_reason']}"]
    found = []
    info = (meta.get("entropyprune") or [None])[0] or {}
    if "spans" in info:
        kept = [span["kept"] for span in info["spans"]]
        if kept != wanted.kept:
            found.append(f"kept {kept}, the oracle {wanted.kept}")
    elif info.get("kept", 0) != sum(map(len, wanted.kept)):
        found.append(f"{info}, the oracle keeps {wanted.kept}")
    logprobs = torch.log_softmax(wanted.logits, -1)
    given = [value for value, *_ in meta["output_token_logprobs"]]
    for step, (token, value) in enumerate(zip(output["output_ids"], given, strict=True)):
        right = wanted.output_ids[step]
        if token != right:
            gap = float(logprobs[step, right] - logprobs[step, token])
            if gap > TIE:
                found.append(f"token {step} is {token}, the oracle's {right} is {gap:.4f} above it")
            break
        off = abs(float(logprobs[step, token]) - value)
        if off > TOLERANCE:
            found.append(f"token {step}: log-probability off by {off:.2e}")
            break
    return found
