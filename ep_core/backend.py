"""The contract of a backend: what an engine offers to everything that uses one.

The CLI, the conformance suite and the benchmarks use one door: `Backend.open(...)` gives a
`Session`, whose `generate` answers requests and says what was pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch

from ep_core.errors import UnsupportedError
from ep_core.patching import PointStatus
from ep_core.policy import PruningPolicy
from ep_core.report import SpanRecord
from ep_core.spans import VisualSpan

DTYPES = ("float32", "bfloat16", "float16")


def check_placement(device: str, dtype: str | None) -> None:
    """Refuse a device that is not there and a data type that no backend has.

    Raises:
        UnsupportedError: with what is allowed.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device!r} is not available here; use cpu")
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Request:
    """One user message, answered greedily.

    Attributes:
        content: text (`str`) and picture files (`Path`), in the order of the message.
        max_new_tokens: generation stops here or at the end-of-sequence token.
    """

    content: tuple[str | Path, ...]
    max_new_tokens: int = 32


@dataclass(frozen=True)
class KVSlots:
    """KV slots that a request's prompt holds, as the engine's own allocator counts them.

    In a padded batch that includes the padding.

    Attributes:
        below: in each layer < K.
        from_layer: in each layer >= K.
    """

    below: int
    from_layer: int


@dataclass(frozen=True)
class Answer:
    """What an engine returns for one request.

    Attributes:
        output_ids: generated tokens, the end-of-sequence token included when it was produced.
        text: the answer, special tokens left out.
        prompt_tokens: length of the expanded prompt.
        spans: every picture and what was kept of it.
        kv: KV slots held by the prompt, or None where the engine cannot tell.
        reason: why nothing was pruned, or None.
        logits: `[steps, vocab]` float32 on the CPU that each token was taken from, or None
            where the engine cannot give them.
    """

    output_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    spans: tuple[SpanRecord, ...]
    kv: KVSlots | None
    reason: str | None
    logits: torch.Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; tests name a capability, never an implementation."""

    batch: bool = False
    multi_image: bool = False
    kv_savings: bool = False
    layer_entropies: bool = False
    cpu: bool = False
    cuda: bool = False


class Session(Protocol):
    """A loaded model in an engine."""

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer the requests together, greedily, in their order."""

    def layer_entropies(self, request: Request) -> list[list[float]]:
        """Unpruned, the matrix entropy of each picture's tokens entering each layer.

        Needs the capability `layer_entropies`. One list of `layers` numbers for each picture.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None:
        """Release the model."""


class Backend(Protocol):
    """An engine that can prune."""

    capabilities: Capabilities

    def versions(self) -> Mapping[str, str]:
        """Versions of the engine and of what its results depend on."""

    def probe(self) -> Sequence[PointStatus]:
        """Each place where the backend reaches into its host, checked, without starting it."""

    def select(
        self,
        method: str,
        spans: Sequence[VisualSpan],
        keep: Sequence[int],
        *,
        queries: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        device: str = "cpu",
    ) -> list[list[int]]:
        """Select through the engine's own selection path, for conformance level 1.

        Args:
            method: name of a selector.
            spans: spans of one prompt of T tokens.
            keep: tokens kept per span.
            queries: `[T, H, D]`, for selectors that need queries.
            hidden: `[T, d]`, for selectors that need hidden states.
            device: where to select.
        """

    def server_command(self, arguments: Sequence[str]) -> list[str]:
        """The command line of the engine's own server; it finds the policy in `ENTROPYPRUNE`.

        Args:
            arguments: the server's own.

        Raises:
            UnsupportedError: the engine has no server, or it would run without pruning.
        """

    def open(
        self,
        model: Path,
        policy: PruningPolicy | None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
    ) -> Session:
        """Load a checkpoint; `policy=None` leaves the engine untouched.

        Args:
            model: folder of a checkpoint in Hugging Face layout.
            policy: what to prune.
            device: "cpu" or "cuda".
            dtype: one of `DTYPES`; None takes the checkpoint's.

        Raises:
            EntropyPruneError: the model, policy or option is not supported, and why.
        """


@dataclass(frozen=True)
class BackendSpec:
    """An engine by name; `load` imports it and runs only when it is used.

    `load` raises `ImportError` where the engine is not installed.
    """

    name: str
    summary: str
    load: Callable[[], Backend]
