"""The C++ kernels: the shared library for this processor as torch operators.

Importing this module loads nothing; `load` does, once.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch

from ep_core.kernels import build, rational
from ep_core.kernels.interface import Kernels, Unavailable

NORMALIZE = {"none": 0, "rows": 1, "trace": 2}  # as in csrc/scorer.cpp
FORMAT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in csrc/simd.h

_COEFFICIENTS = (rational.LINEAR, rational.SQUARE, *rational.POLES, *rational.WEIGHTS)
_RATIONAL = (ctypes.c_double * len(_COEFFICIENTS))(*_COEFFICIENTS)


@cache
def load() -> Kernels:
    """The kernels for this processor, registered with torch as `torch.ops.entropyprune`.

    Raises:
        Unavailable: no library was built, or not from these sources.
    """
    variant = list(build.VARIANTS)[open_library("baseline").ep_variant()]
    if not build.library(variant).exists():  # the compiler did not know it
        variant = "baseline"
    library = open_library(variant)

    def score(q: torch.Tensor, normalize: str) -> torch.Tensor:
        return matrix_entropy(library, q, normalize)

    def select(gram: torch.Tensor, k: int) -> torch.Tensor:
        return greedy_renyi2(library, gram, k)

    options: dict[str, Any] = {"mutates_args": (), "device_types": "cpu"}
    score_op = torch.library.custom_op("entropyprune::matrix_entropy", score, **options)
    score_op.register_fake(lambda q, normalize: q.new_empty(len(q), dtype=torch.float32))
    select_op = torch.library.custom_op("entropyprune::greedy_renyi2", select, **options)
    select_op.register_fake(lambda gram, k: gram.new_empty(k, dtype=torch.int64))
    return Kernels(f"C++, {variant}", score_op, select_op)


@cache
def open_library(variant: str) -> ctypes.CDLL:
    """The library of a variant, which the processor must be able to run.

    Raises:
        Unavailable: it was not built, or not from these sources.
    """
    path = build.library(variant)
    if not path.exists():
        raise Unavailable("no compiled library; install a C++ compiler, then entropyprune again")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # built for another platform
        raise Unavailable(str(error)) from None
    library.ep_sources.restype = c_char_p
    if library.ep_sources().decode() != build.digest():
        raise Unavailable(f"{path.name} was built from other sources; install entropyprune again")
    library.ep_variant.restype = c_int
    library.ep_matrix_entropy.restype = c_int
    library.ep_matrix_entropy.argtypes = [
        *(c_void_p, c_int),  # queries, format
        *(c_int64, c_int64, c_int64, c_int64, c_int64),  # tokens, heads, width, two strides
        *(c_int, c_void_p, c_int64),  # normalize, rational, poles
        *(c_int64, c_void_p),  # threads, scores
    ]
    library.ep_greedy_renyi2.restype = c_int
    library.ep_greedy_renyi2.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p]
    return library


def matrix_entropy(library: ctypes.CDLL, q: torch.Tensor, normalize: str) -> torch.Tensor:
    """`[N, H, D]` queries in bfloat16, float16 or float32 to `[N]` float32 scores.

    Any strides over tokens and heads are read in place; only a strided D is copied. As many
    threads as torch has.
    """
    if q.stride(2) != 1:
        q = q.contiguous()
    scores = torch.empty(len(q), dtype=torch.float32)
    failed = library.ep_matrix_entropy(
        *(q.data_ptr(), FORMAT[q.dtype]),
        *(*q.shape, q.stride(0), q.stride(1)),
        *(NORMALIZE[normalize], _RATIONAL, len(rational.POLES)),
        *(torch.get_num_threads(), scores.data_ptr()),
    )
    if failed:
        raise MemoryError("no memory for the scorer's working space")
    return scores


def greedy_renyi2(library: ctypes.CDLL, gram: torch.Tensor, k: int) -> torch.Tensor:
    """`[N, N]` float32 cosines and 1 <= k <= N to `[k]` ascending indices."""
    if gram.stride(1) != 1:
        gram = gram.contiguous()
    kept = torch.empty(k, dtype=torch.int64)
    failed = library.ep_greedy_renyi2(
        gram.data_ptr(), len(gram), gram.stride(0), k, kept.data_ptr()
    )
    if failed:
        raise MemoryError("no memory for the greedy selection's working space")
    return kept
