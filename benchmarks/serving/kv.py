"""How many requests an engine runs at once in KV memory of the same bytes, by its own count.

The engine runs from this process, so that its scheduler can be asked.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import progress
from benchmarks.serving.servers import BLOCK, PREFILL, memory
from ep_backends.shared.pictures import read_picture
from ep_conformance.checkpoints import make_picture, tiny_qwen2_5_vl
from ep_core.policy import PruningPolicy

LAYERS, TOKENS = 28, 2048  # of the model; KV slots in each layer of the unpruned engine
REQUESTS, ANSWER = 24, 16  # all at once; tokens of each answer
PICTURE = (448, 448)  # pixels: 256 visual tokens
QUESTION = "what is on it?"


def capacity(backend: str, policy: PruningPolicy) -> dict[str, dict[str, int]]:
    """KV slots and the most requests that ran at once, unpruned and pruned.

    Args:
        backend: name of the engine.
        policy: what to prune; its layer settled.
    """
    run = _sglang if backend == "sglang" else _lmdeploy
    engines = {"unpruned": None, "pruned": policy}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_qwen2_5_vl(folder / "model", heads=2, kv_heads=2, layers=LAYERS)
        pictures = [make_picture(folder / f"{i}.png", i, PICTURE) for i in range(REQUESTS)]
        for which, own in progress(list(engines.items()), f"{backend}, KV memory"):
            given = memory(backend, own, LAYERS, TOKENS)
            running = run(model, pictures, own, dict(given.arguments))
            slots = {"below": given.below, "from layer": given.from_layer}
            found[which] = slots | {"requests at once": running}
    return found


def _sglang(
    model: Path, pictures: list[Path], policy: PruningPolicy | None, arguments: dict[str, int]
) -> int:
    from ep_backends.sglang.backend import SGLangBackend

    limits = arguments | {
        "max_running_requests": REQUESTS,
        "max_prefill_tokens": PREFILL,
        "disable_radix_cache": True,  # every picture is asked about once
    }
    with SGLangBackend().open(model, policy, dtype="float32", **limits) as session:
        engine = session.engine
        prompt = session.prompt([pictures[0], QUESTION])
        sampling = {"temperature": 0, "max_new_tokens": ANSWER, "ignore_eos": True}

        async def ask(picture: Path) -> None:
            await engine.async_generate(
                prompt=prompt, image_data=[read_picture(picture)], sampling_params=sampling
            )

        async def running() -> int:
            (load,) = await engine.tokenizer_manager.get_loads()
            return int(load.num_running_reqs)

        most: int = engine.loop.run_until_complete(_watch(ask, pictures, running))
        return most


def _lmdeploy(
    model: Path, pictures: list[Path], policy: PruningPolicy | None, arguments: dict[str, int]
) -> int:
    from lmdeploy import GenerationConfig

    from ep_backends.lmdeploy.backend import LMDeployBackend

    limits = arguments | {"block_size": BLOCK, "max_batch_size": REQUESTS}
    with LMDeployBackend().open(model, policy, dtype="float32", **limits) as session:
        engine = session.pipeline.async_engine
        everyone = asyncio.Barrier(REQUESTS)  # else the first have their answers before the last

        async def ask(picture: Path) -> None:
            content = [
                {"type": "image_data", "image_data": {"data": read_picture(picture)}},
                {"type": "text", "text": QUESTION},
            ]
            prepared = await engine.preprocess(
                [{"role": "user", "content": content}],
                engine.session_mgr.get(),
                gen_config=GenerationConfig(max_new_tokens=ANSWER, ignore_eos=True),
            )
            await everyone.wait()
            async for _ in engine.generate(prepared):
                pass

        async def running() -> int:
            return int(engine.engine.scheduler.num_running())

        loop = session.pipeline.internal_thread.loop
        return asyncio.run_coroutine_threadsafe(_watch(ask, pictures, running), loop).result()


async def _watch(ask: Any, pictures: list[Path], running: Any) -> int:
    """Ask about all pictures at once; the most that `running` said meanwhile."""
    waiting = {asyncio.ensure_future(ask(picture)) for picture in pictures}
    most = 0
    while waiting:
        most = max(most, await running())
        answered, waiting = await asyncio.wait(waiting, timeout=0.02)
        for request in answered:
            request.result()  # one that failed ends the measurement
    return most
