"""Fused kernels of the scores and of the greedy set, and when they are used.

`matrix_entropy` and `greedy_renyi2` take a fused kernel where there is one, otherwise the torch
code in `ep_core.kernels.reference`. What is available on a type of device is found out when it is
first asked for, so that importing the package stays light; where kernels were to be expected and
are missing, one log line says why. docs/kernels.md has what they compute and how accurately.
"""

from __future__ import annotations

import logging
import os

import torch

from ep_core.errors import EntropyPruneError
from ep_core.kernels import reference
from ep_core.kernels.interface import Kernels, Unavailable

SWITCH = "ENTROPYPRUNE_KERNELS"  # "off": torch everywhere
MAX_HEADS = 64
MAX_HEAD_DIM = 256
MAX_TOKENS = 2**13  # of a greedy set: up to here its sums are exact
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

logger = logging.getLogger("entropyprune")


def matrix_entropy(q: torch.Tensor, normalize: str) -> torch.Tensor:
    """The scores of checked `[N, H, D]` queries, `[N]` float32; see `ep_core.entropy`."""
    _, heads, head_dim = q.shape
    if heads <= MAX_HEADS and head_dim <= MAX_HEAD_DIM and q.dtype in QUERY_DTYPES:
        found = _kernels(q.device.type)
        scores = None if found is None else found.matrix_entropy(q, normalize)
        if scores is not None:
            return scores
    return reference.matrix_entropy(q, normalize)


def greedy_renyi2(gram: torch.Tensor, k: int) -> torch.Tensor:
    """The greedy set from an `[N, N]` cosine Gram matrix, `[k]` ascending int64 indices."""
    if len(gram) <= MAX_TOKENS:
        found = _kernels(gram.device.type)
        kept = None if found is None else found.greedy_renyi2(gram, k)
        if kept is not None:
            return kept
    return reference.greedy_renyi2(gram, k)


def describe(device_type: str) -> str:
    """Which path a type of device takes, and why, for people."""
    try:
        found = _load(device_type)
    except Unavailable as reason:
        return f"torch ({reason})"
    if failed := found.failures():
        return f"torch in part ({'; '.join(failed)}), else {found.name}"
    return (
        f"{found.name} (bfloat16, float16 and float32 with up to {MAX_HEADS} heads of width "
        f"{MAX_HEAD_DIM}; torch for others)"
    )


def _load(device_type: str) -> Kernels:
    setting = os.environ.get(SWITCH, "")
    if setting == "off":
        raise Unavailable(f"{SWITCH}=off")
    if setting:
        raise EntropyPruneError(f"{SWITCH}={setting}: allowed is 'off', or not to set it")
    if device_type == "cpu":
        from ep_core.kernels import cpu

        return cpu.load()
    if device_type == "cuda":
        from ep_core.kernels import cuda

        return cuda.load()
    raise Unavailable(f"there are none for {device_type}")


_found: dict[str, Kernels | None] = {}  # by device type; torch.compile can read a dict


def _kernels(device_type: str) -> Kernels | None:
    if device_type not in _found:
        try:
            _found[device_type] = _load(device_type)
        except Unavailable as reason:
            _found[device_type] = None
            if device_type in ("cpu", "cuda") and SWITCH not in os.environ:
                logger.warning("%s: torch instead of fused kernels: %s", device_type, reason)
    return _found[device_type]
