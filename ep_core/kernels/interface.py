"""What a type of device offers in kernels, and how it says that it has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


class Unavailable(Exception):
    """Why a device type has no kernels."""


@dataclass(frozen=True)
class Kernels:
    """The fused kernels of one device type.

    Attributes:
        name: for people, such as "C++ for AVX-512".
        matrix_entropy: `([N, H, D] queries, normalize) -> [N]` float32 scores; None: use torch.
        greedy_renyi2: `([N, N] float32 cosine Gram matrix, k) -> [k]` ascending int64 indices;
            None: use torch.
        failures: tries usual sizes, where kernels have to prove themselves, and says for people
            which fail and why.
    """

    name: str
    matrix_entropy: Callable[[torch.Tensor, str], torch.Tensor | None]
    greedy_renyi2: Callable[[torch.Tensor, int], torch.Tensor | None]
    failures: Callable[[], list[str]] = list
