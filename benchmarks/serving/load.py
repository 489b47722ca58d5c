"""A client that keeps a server busy: so many requests at once, each about a picture of its own."""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds without a byte from the server


@dataclass(frozen=True)
class Reply:
    """When an answer came, in seconds of one clock.

    Attributes:
        sent: its request was sent.
        first: its first token was there.
        last: its last token was there.
    """

    sent: float
    first: float
    last: float


def body(model: Path, picture: Path, tokens: int) -> bytes:
    """A chat request about a picture file for exactly so many tokens, greedy and streamed."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is on it?"},
    ]
    request = {
        "model": str(model),
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(request).encode()


def load(address: str, bodies: Sequence[bytes], tokens: int, concurrency: int) -> list[Reply]:
    """Send the requests, `concurrency` at once: a client sends its next when it has an answer.

    Raises:
        RuntimeError: an answer has another number of tokens than was asked for.
        OSError: the server refused a request, or is gone.
    """
    with ThreadPoolExecutor(concurrency) as clients:
        return list(clients.map(partial(_ask, address, tokens), bodies))


def counters(address: str) -> dict[str, int]:
    """What the server counted for pruning, without the labels of its own."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=TIMEOUT) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, int] = {}
    for line in lines:
        name, _, value = line.removeprefix("entropyprune:").rpartition(" ")
        if name != line.rpartition(" ")[0]:
            found[name.partition("{")[0]] = int(float(value))
    return found


def _ask(address: str, tokens: int, request: bytes) -> Reply:
    sent = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    post = urllib.request.Request(
        f"{address}/v1/chat/completions", request, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(post, timeout=TIMEOUT) as response:
        for line in response:
            if line.startswith(b"data: {"):
                piece = json.loads(line[6:])
                usage = piece.get("usage") or usage
                if piece.get("choices"):
                    times.append(time.perf_counter())
    if usage.get("completion_tokens") != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, the server counts {usage}")
    return Reply(sent, times[0], times[-1])
