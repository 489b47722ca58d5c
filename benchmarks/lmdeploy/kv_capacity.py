r"""How many requests LMDeploy runs at once in the same KV memory, pruned and unpruned.

    python benchmarks/lmdeploy/kv_capacity.py --tokens 2048 --requests 24 --answer 16 \
        --json benchmarks/results/lmdeploy_kv_capacity.json

A tiny random Qwen2.5-VL of 28 layers gets requests with one picture each, all different, and long
answers. Both engines get caches of the same bytes; what is counted is LMDeploy's own number of
running requests. Times play no part, so any machine gives the same answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ep_backends.lmdeploy.backend import LMDeployBackend
from ep_backends.lmdeploy.kv import kv_ratio
from ep_conformance.checkpoints import make_picture, tiny_qwen2_5_vl
from ep_core.pictures import read_picture
from ep_core.policy import PruningPolicy

LAYERS = 28
BLOCK = 16  # tokens
PICTURE = (448, 448)  # 256 visual tokens


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="layer=2,keep=0.11,method=set-entropy")
    parser.add_argument("--tokens", type=int, default=4096, help="KV slots per layer, unpruned")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    policy = PruningPolicy.parse(options.policy)
    assert isinstance(policy.layer, int)
    ratio = kv_ratio(policy, LAYERS)
    blocks = options.tokens // BLOCK
    pruned_blocks = blocks * LAYERS // (LAYERS - policy.layer + ratio * policy.layer)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_qwen2_5_vl(Path(folder) / "model", heads=2, kv_heads=2, layers=LAYERS)
        pictures = [
            make_picture(Path(folder) / f"{i}.png", i, PICTURE) for i in range(options.requests)
        ]
        rows = [
            measure("unpruned", model, pictures, None, blocks, options),
            measure("pruned", model, pictures, policy, pruned_blocks, options),
        ]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": dict(LMDeployBackend().versions()),
        "policy": str(policy),
        "kv_slots_all_layers": options.tokens * LAYERS,
        "tokens_below_for_each_from_layer": ratio,
        "rows": rows,
    }
    table = Table(title=f"{policy}, blocks of {BLOCK} tokens", title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(
    name: str,
    model: Path,
    pictures: list[Path],
    policy: PruningPolicy | None,
    blocks: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Run every request at once; the largest number that LMDeploy ran together."""
    limits = {
        "num_gpu_blocks": blocks + 1,  # one is reserved
        "block_size": BLOCK,
        "max_batch_size": options.requests,
    }
    with LMDeployBackend().open(model, policy, dtype="float32", **limits) as session:
        engine = session.pipeline.async_engine
        cache = engine.engine.executor.model_agent.cache_engine
        running = asyncio.run_coroutine_threadsafe(
            _run(engine, pictures, options.answer), session.pipeline.internal_thread.loop
        ).result()
        return {
            "": name,
            "blocks": blocks,
            "cache_bytes": cache.gpu_allocation.nbytes * blocks // (blocks + 1),
            "running_at_once": max(running),
        }


async def _run(engine: Any, pictures: list[Path], answer: int) -> list[int]:
    requests = [asyncio.ensure_future(_ask(engine, picture, answer)) for picture in pictures]
    running = [0]
    while not all(request.done() for request in requests):
        running.append(engine.engine.scheduler.num_running())
        await asyncio.sleep(0.01)
    for request in requests:
        request.result()
    return running


async def _ask(engine: Any, picture: Path, answer: int) -> None:
    from lmdeploy import GenerationConfig

    content = [
        {"type": "image_data", "image_data": {"data": read_picture(picture)}},
        {"type": "text", "text": "what is on it?"},
    ]
    prepared = await engine.preprocess(
        [{"role": "user", "content": content}],
        engine.session_mgr.get(),
        gen_config=GenerationConfig(max_new_tokens=answer, ignore_eos=True),
    )
    async for _ in engine.generate(prepared):
        pass


if __name__ == "__main__":
    main()
