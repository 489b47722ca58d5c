"""The Triton kernels, each in the sizes in which it has agreed with torch on this device.

Triton compiles a kernel once more for every size, with other needs of registers and shared memory;
what one size has shown says little of the next.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch

from ep_core.kernels import reference
from ep_core.kernels.interface import Kernels, Unavailable

BOUND = 1e-5  # of a score's error, docs/kernels.md

Kernel = Callable[[torch.Tensor, Any], torch.Tensor]

logger = logging.getLogger("entropyprune")


def load() -> Kernels:
    """The kernels for CUDA devices; a size is compiled and checked when it is first asked for.

    Raises:
        Unavailable: there is no Triton or no device.
    """
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device")
    try:
        import triton

        from ep_core.kernels import triton_greedy, triton_scorer
    except ImportError as error:
        raise Unavailable(f"no {error.name}") from None
    score, select = triton_scorer.matrix_entropy, triton_greedy.greedy_renyi2
    return Kernels(
        f"Triton {triton.__version__}, each size checked at its first use",
        proven(score, ScorerSize.of),
        proven(select, GreedySize.of),
        lambda: failures(score, select, torch.device("cuda")),
    )


@dataclass(frozen=True)
class ScorerSize:
    """What the scorer is compiled for. Strides too select a compilation, but only of its loads."""

    device: torch.device
    heads: int
    head_dim: int
    dtype: torch.dtype
    normalize: Any

    @classmethod
    def of(cls, q: torch.Tensor, normalize: str) -> ScorerSize:
        """The size of `[N, H, D]` queries."""
        return cls(q.device, q.shape[1], q.shape[2], q.dtype, normalize)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.heads} heads of width {self.head_dim} in {dtype}, {self.normalize!r}"

    def check(self, kernel: Kernel) -> None:
        """Score four tokens; raises what the kernel raises, and ArithmeticError if it is wrong."""
        # on the CPU, which takes little of a full device's memory and trusts nothing there
        q = _random(4, self.heads, self.head_dim)
        degree = torch.linspace(-2, 2, self.heads, dtype=torch.float32, device="cpu")[:, None]
        q[1] += degree * q[0, 0]  # a direction that heads share
        q[2] = 0
        q[3, -1, -1] = math.nan
        q = q.to(self.dtype)
        expected = reference.matrix_entropy(q, self.normalize, dtype=torch.float64).double()
        bound = torch.full_like(expected, BOUND)
        if self.normalize == "none":
            x = q.double() - q.double().mean(dim=1, keepdim=True)
            trace = x.square().sum(dim=(1, 2)) / self.heads
            bound *= torch.maximum(expected.abs(), trace / math.log(self.heads))
        scores = kernel(q.to(self.device), self.normalize).to("cpu", torch.float64)
        # equal covers -inf
        if not bool(((scores == expected) | ((scores - expected).abs() <= bound)).all()):
            raise ArithmeticError("other scores than torch's")


@dataclass(frozen=True)
class GreedySize:
    """What the greedy set is compiled for: N up to a power of two."""

    device: torch.device
    block: int

    @classmethod
    def of(cls, gram: torch.Tensor, _k: int) -> GreedySize:
        """The size of an `[N, N]` Gram matrix."""
        return cls(gram.device, max(16, 1 << (len(gram) - 1).bit_length()))

    def __str__(self) -> str:
        return f"a greedy set of at most {self.block} tokens"

    def check(self, kernel: Kernel) -> None:
        """Pick a few tokens; raises what the kernel raises, and ArithmeticError if it is wrong."""
        n = self.block // 2 + 1  # the smallest of this size
        directions = reference.unit_rows(_random(n // 2 + 1, 24).double())
        cosines = (directions @ directions.mT).float()
        pairs = torch.arange(n, device="cpu") // 2  # every pick is a tie of two neighbours
        gram = cosines.index_select(0, pairs).index_select(1, pairs)
        gram[n // 2] = gram[:, n // 2] = math.nan  # a token without direction
        k = min(16, n // 2)
        expected = reference.greedy_renyi2(gram, k)
        if not torch.equal(kernel(gram.to(self.device), k).cpu(), expected):
            raise ArithmeticError("other picks than torch's")


Size = ScorerSize | GreedySize


def proven(
    kernel: Kernel, size_of: Callable[[torch.Tensor, Any], Size]
) -> Callable[[torch.Tensor, Any], torch.Tensor | None]:
    """The kernel where it can be trusted, None (use torch) where it failed once.

    A size is checked when it is first asked for, which waits for the compiler and the device. One
    log line says which size fails and why.
    """
    usable: dict[Size, bool] = {}

    def answer(x: torch.Tensor, option: Any) -> torch.Tensor | None:
        size = size_of(x, option)
        if not usable.get(size, True):
            return None
        try:
            if size not in usable:
                size.check(kernel)
                usable[size] = True
            return kernel(x, option)
        except torch.OutOfMemoryError:
            raise  # says nothing of the kernel, and torch would need more
        except Exception as error:  # a compiler can raise anything, and again at other strides
            usable[size] = False
            why = _line(error)
            logger.warning("%s: torch instead of a fused kernel for %s: %s", x.device, size, why)
            return None

    disable: Any = torch.compiler.disable  # a compiled model would trace the check too
    untraced: Callable[[torch.Tensor, Any], torch.Tensor | None] = disable(answer)
    return untraced


def failures(score: Kernel, select: Kernel, device: torch.device) -> list[str]:
    """Which of the usual sizes fail on a device and why, for people."""
    usual: list[tuple[Kernel, Size]] = [
        (score, ScorerSize(device, 32, 128, torch.bfloat16, "rows")),
        (select, GreedySize(device, 1024)),
    ]
    found = []
    for kernel, size in usual:
        try:
            size.check(kernel)
        except Exception as error:  # a compiler can raise anything
            found.append(f"{size}: {_line(error)}")
    return found


def _random(*shape: int) -> torch.Tensor:
    """Explicit in all that a host may have set otherwise."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def _line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 200)
