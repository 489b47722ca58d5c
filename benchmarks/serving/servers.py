"""The engines' own servers, pruned and unpruned, with KV memory of the same bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

START_SECONDS = 150
BLOCK = 16  # tokens of LMDeploy's blocks
# of a pass of SGLang: on a CPU its vision tower costs the square of the pictures in it, here two
PREFILL = 512  # tokens
# of a model: the HTTP server and the clients need cores too, and threads that wait for one another
# make times depend on whatever else runs
THREADS = 1


@dataclass(frozen=True)
class Memory:
    """KV slots in each layer below K and in each from K on, and the engine's setting for them."""

    below: int
    from_layer: int
    arguments: Mapping[str, int]


def memory(backend: str, policy: PruningPolicy | None, layers: int, tokens: int) -> Memory:
    """KV memory for so many tokens in each layer of an unpruned server, in bytes.

    Args:
        backend: name of the engine.
        policy: of a server that prunes; its layer settled.
        layers: of the model.
        tokens: that the unpruned server has slots for.
    """
    k = 0 if policy is None else policy.layer
    assert isinstance(k, int)
    if backend == "sglang":
        slots = kept = tokens
        if policy is not None:
            from ep_backends.sglang.arguments import kept_ratio

            ratio = kept_ratio(policy, layers)
            slots = int(tokens * layers / (k + ratio * (layers - k)))
            kept = int(slots * ratio)
        return Memory(slots, kept, {"max_total_tokens": slots})
    factor = 1
    if policy is not None:
        from ep_backends.lmdeploy.kv import kv_ratio

        factor = kv_ratio(policy, layers)
    blocks = tokens // BLOCK * layers // (layers - k + factor * k)
    # LMDeploy reserves one
    return Memory(blocks * BLOCK * factor, blocks * BLOCK, {"num_gpu_blocks": blocks + 1})


class Server:
    """One server of an engine, a group of processes."""

    def __init__(
        self,
        backend: str,
        model: Path,
        policy: PruningPolicy | None,
        limits: Mapping[str, int],
        log: Path,
    ) -> None:
        """Prepare; `serving` starts it.

        Args:
            backend: name of the engine.
            model: folder of a checkpoint.
            policy: what to prune.
            limits: more settings of the server, named as in the engine's Python interface.
            log: where its output goes.
        """
        self._backend, self._log = backend, log
        self._arguments = _arguments(backend, model)
        for name, value in limits.items():
            self._arguments += ["--" + name.replace("_", "-"), str(value)]
        self._environment = _environment(backend, policy)
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: it does not start; the end of its log.
        """
        # LMDeploy's processes race at the start: see docs/lmdeploy.md#limits
        for _ in range(8 if self._backend == "lmdeploy" else 1):
            self._launch()
            if self._answers():
                return
            self.stop()
        raise RuntimeError(f"{self._backend} did not start:\n{self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End it and its engine."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # a session of its own: nobody else's
        self._process.wait()
        self._process = None

    def _launch(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.address = f"http://127.0.0.1:{port}"
        prefix = "--" if self._backend == "sglang" else "--server-"
        host = "host" if self._backend == "sglang" else "name"
        where = [prefix + host, "127.0.0.1", prefix + "port", port]
        command = registry().backend(self._backend).load().server_command(self._arguments + where)
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, env=self._environment, start_new_session=True
            )

    def _answers(self) -> bool:
        """Does it come up? False when its process ended or time is over."""
        assert self._process is not None
        end = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return True
            time.sleep(0.3)
        return False


@contextmanager
def serving(servers: Sequence[Server]) -> Iterator[None]:
    """Start the servers side by side, and end them with the block."""
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.start, servers))
        yield
    finally:
        for server in servers:
            server.stop()


def _arguments(backend: str, model: Path) -> list[str]:
    if backend == "sglang":
        return [
            *("--model-path", str(model), "--device", "cpu", "--dtype", "bfloat16"),
            *("--attention-backend", "torch_native", "--mm-attention-backend", "sdpa"),
            *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
            *("--disable-cuda-graph", "--context-length", "2048", "--max-running-requests", "32"),
            *("--disable-radix-cache", "--enable-metrics", "--skip-server-warmup"),
            "--sleep-on-idle",  # the other server has the machine to itself
            *("--max-prefill-tokens", str(PREFILL)),
        ]
    return [
        *("serve", "api_server", str(model), "--backend", "pytorch", "--eager-mode"),
        *("--dtype", "bfloat16", "--cache-block-seq-len", str(BLOCK), "--max-batch-size", "32"),
    ]


def _environment(backend: str, policy: PruningPolicy | None) -> Mapping[str, str]:
    own = {"ENTROPYPRUNE": "" if policy is None else str(policy), "OMP_NUM_THREADS": str(THREADS)}
    if backend == "sglang":
        from ep_backends.sglang.backend import CPU_ENVIRONMENT

        own |= CPU_ENVIRONMENT
    return os.environ | own
