r"""How many requests SGLang runs at once in the same KV memory, pruned and unpruned.

    python benchmarks/sglang/kv_capacity.py --tokens 2048 --requests 24 --answer 16 \
        --json benchmarks/results/sglang_kv_capacity.json

A tiny random Qwen2.5-VL of 28 layers gets requests with one picture each, all different, and long
answers. Both engines get pools of the same bytes; what is counted is SGLang's own number of running
requests. Times play no part, so any machine gives the same answer.
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

from ep_backends.sglang.backend import SGLangBackend
from ep_backends.sglang.plugin import kept_ratio
from ep_conformance.checkpoints import make_picture, tiny_qwen2_5_vl
from ep_core.pictures import read_picture
from ep_core.policy import PruningPolicy

LAYERS = 28
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
    ratio = kept_ratio(policy, LAYERS)
    slots = options.tokens * LAYERS
    pruned_tokens = int(slots / (policy.layer + ratio * (LAYERS - policy.layer)))
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_qwen2_5_vl(Path(folder) / "model", heads=2, kv_heads=2, layers=LAYERS)
        pictures = [
            make_picture(Path(folder) / f"{i}.png", i, PICTURE) for i in range(options.requests)
        ]
        rows = [
            measure("unpruned", model, pictures, None, options.tokens, options),
            measure("pruned", model, pictures, policy, pruned_tokens, options),
        ]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": dict(SGLangBackend().versions()),
        "policy": str(policy),
        "kv_slots_all_layers": slots,
        "swa_full_tokens_ratio": ratio,
        "rows": rows,
    }
    table = Table(title=f"{policy}, {slots:,} KV slots over {LAYERS} layers", title_justify="left")
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
    tokens: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Run every request at once; the largest number that SGLang ran together."""
    limits = {
        "max_total_tokens": tokens,
        "max_running_requests": options.requests,
        "disable_radix_cache": True,  # every picture is asked about once
    }
    with SGLangBackend().open(model, policy, dtype="float32", **limits) as session:
        engine = session.engine
        running = engine.loop.run_until_complete(_run(engine, session, pictures, options.answer))
        memory = engine.get_server_info()["internal_states"][0]["memory_usage"]
    below = memory["token_capacity"]
    return {
        "": name,
        "slots_below_layer": below,
        "slots_from_layer": memory.get("token_capacity_swa") or below,
        "running_at_once": max(running),
    }


async def _run(engine: Any, session: Any, pictures: list[Path], answer: int) -> list[int]:
    prompt = session.prompt([pictures[0], "what is on it?"])
    sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
    requests = [
        asyncio.ensure_future(
            engine.async_generate(
                prompt=prompt, image_data=[read_picture(picture)], sampling_params=sampling
            )
        )
        for picture in pictures
    ]
    running = [0]
    while not all(request.done() for request in requests):
        (load,) = await engine.tokenizer_manager.get_loads()
        running.append(load.num_running_reqs)
        await asyncio.sleep(0.05)
    for request in requests:
        request.result()
    return running


if __name__ == "__main__":
    main()
