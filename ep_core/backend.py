"""The contract of a backend: what an engine offers to everything that uses one.

The CLI, the conformance suite and the benchmarks use one door: `Backend.open(...)` gives a
`Session`, whose `generate` answers requests and says what was pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, Self

import torch

from ep_core.budget import Budget
from ep_core.errors import UnsupportedError
from ep_core.ledger import PointStatus
from ep_core.plan import RequestPlan
from ep_core.policy import PruningPolicy
from ep_core.report import SpanRecord

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
        budget: what this request keeps instead of the policy's budget, or "off" for everything;
            needs the capability `request_budget`.
        leave_after: the client leaves once it has that many tokens, at least 1, and the engine
            gives the request up; needs the capability `abort`.
    """

    content: tuple[str | Path, ...]
    max_new_tokens: int = 32
    budget: Budget | Literal["off"] | None = None
    leave_after: int | None = None


@dataclass(frozen=True)
class Serving:
    """How an engine serves, in terms that engines share; None is the engine's own choice.

    Attributes:
        prefill_chunk: most prompt tokens in one prefill pass; needs `chunked_prefill`.
        kv_tokens: tokens that the KV cache has room for in each layer < K. Requests are admitted
            without room for their answers, so that running ones have to be preempted; needs
            `preemption`.
        prefix_cache: may a prompt use the KV of another that starts alike? Needs `prefix_cache`.
    """

    prefill_chunk: int | None = None
    kv_tokens: int | None = None
    prefix_cache: bool | None = None


@dataclass(frozen=True)
class KVSlots:
    """KV slots that a request's prompt holds, as the engine's own allocator counts them.

    In a padded batch that includes the padding.

    Attributes:
        below: in each layer < K.
        from_layer: in each layer >= K.
        block: slots are handed out in blocks of so many, shared by all layers; above 1 both counts
            may be more than the tokens take.
    """

    below: int
    from_layer: int
    block: int = 1


@dataclass(frozen=True)
class Answer:
    """What an engine returns for one request.

    Attributes:
        output_ids: generated tokens, the end-of-sequence token included when it was produced; of
            a client that left, those that it had got.
        text: the answer, special tokens left out.
        prompt_tokens: length of the expanded prompt.
        spans: every picture and what was kept of it.
        kv: KV slots held by the prompt, or None where the engine cannot tell.
        reason: why nothing was pruned, or None.
        logits: `[steps, vocab]` float32 on the CPU that each token was taken from, or None
            where the engine cannot give them.
        logprobs: log-probability of each generated token, or None where the engine cannot give it.
        cached_tokens: tokens of the prompt whose KV was there before.
        chunks: prefill passes that the prompt took, or None where the engine cannot tell.
        preempted: how often the engine took the request back, to run it again later.
    """

    output_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    spans: tuple[SpanRecord, ...]
    kv: KVSlots | None
    reason: str | None
    logits: torch.Tensor | None = field(default=None, repr=False, compare=False)
    logprobs: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    cached_tokens: int = 0
    chunks: int | None = None
    preempted: int = 0


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; tests name a capability, never an implementation.

    Attributes:
        batch: several requests at once.
        multi_image: several pictures in one prompt.
        kv_savings: dropped tokens hold no KV slots from layer K on, and `Answer.kv` shows it.
        layer_entropies: `Session.layer_entropies`.
        request_budget: a request may set its own budget, or "off".
        abort: a client may leave, and `Session.held_slots` shows what that leaves behind.
        chunked_prefill: a prompt may be prefilled in several passes; `Answer.chunks` counts them.
        prefix_cache: prompts that start alike may share KV; `Answer.cached_tokens` shows it.
        preemption: a running request may be taken back; `Answer.preempted` counts it.
        cpu, cuda: where it runs.
    """

    batch: bool = False
    multi_image: bool = False
    kv_savings: bool = False
    layer_entropies: bool = False
    request_budget: bool = False
    abort: bool = False
    chunked_prefill: bool = False
    prefix_cache: bool = False
    preemption: bool = False
    cpu: bool = False
    cuda: bool = False


class Session(Protocol):
    """A loaded model in an engine.

    A class that inherits from it refuses what it does not override.
    """

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer the requests together, greedily; answers come in the order of the requests.

        Raises:
            EntropyPruneError: the engine refused one of them, and why.
        """

    def layer_entropies(self, request: Request) -> list[list[float]]:
        """Unpruned, the matrix entropy of each picture's tokens entering each layer.

        Needs the capability `layer_entropies`. One list of `layers` numbers for each picture.
        """
        raise UnsupportedError("this engine cannot measure layers; use transformers")

    def held_slots(self) -> int:
        """KV slots per layer, of layers < K or >= K, that are neither free nor only cached.

        Needs the capability `abort`. 0 once every request is answered or gone.
        """
        raise UnsupportedError("this engine has no KV pool to count slots of")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the model."""


class Backend(Protocol):
    """An engine that can prune.

    A class that inherits from it has no server and no attach points unless it says so.
    """

    capabilities: Capabilities

    def versions(self) -> Mapping[str, str]:
        """Versions of the engine and of what its results depend on."""

    def attention(self, device: str) -> str:
        """Name of the attention kernels that a session on this device uses."""

    def probe(self) -> Sequence[PointStatus]:
        """Each place where the backend reaches into its host, checked, without starting it."""
        return ()

    def select(
        self,
        method: str,
        plan: RequestPlan,
        *,
        queries: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        device: str = "cpu",
    ) -> list[list[int]]:
        """Select through the hooks that requests run through, for conformance level 1.

        Args:
            method: name of a selector.
            plan: of a prompt of T tokens.
            queries: `[T, H, D]`, for selectors that need queries.
            hidden: `[T, d]`, for selectors that need hidden states.
            device: where to select.

        Returns:
            Of each unit that loses tokens the indices of those that stay, ascending.
        """

    def server_command(self, arguments: Sequence[str]) -> list[str]:
        """The command line of the engine's own server; it finds the policy in `ENTROPYPRUNE`.

        Args:
            arguments: the server's own.

        Raises:
            UnsupportedError: the engine has no server, or it would run without pruning.
        """
        raise UnsupportedError("this engine has no server; use it in your own program")

    def open(
        self,
        model: Path,
        policy: PruningPolicy | None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        serving: Serving | None = None,
    ) -> Session:
        """Load a checkpoint; `policy=None` leaves the engine untouched.

        Args:
            model: folder of a checkpoint in Hugging Face layout.
            policy: what to prune.
            device: "cpu" or "cuda".
            dtype: one of `DTYPES`; None takes the checkpoint's.
            serving: how to serve; None is the engine's own choice in everything.

        Raises:
            EntropyPruneError: the model, policy or option is not supported, and why.
        """


@dataclass(frozen=True)
class BackendSpec:
    """An engine by name.

    Attributes:
        name: what `--backend` says.
        summary: one line for `entropyprune list`.
        load: imports the engine; runs only when it is used, and raises `ImportError` where the
            engine is not installed.
        families: by model type, which checkpoints of a family run in the engine, or why none does;
            for tables. A family that is not named runs where its decoder fits.
    """

    name: str
    summary: str
    load: Callable[[], Backend]
    families: Mapping[str, str] = field(default_factory=dict)


def default_device(backend: Backend) -> str:
    """Where a backend runs unless the user says otherwise: on cuda, where it can."""
    return "cuda" if backend.capabilities.cuda and torch.cuda.is_available() else "cpu"
