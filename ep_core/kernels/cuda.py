"""The Triton kernels, once they have shown on this device that they agree with torch."""

from __future__ import annotations

import torch

from ep_core.kernels import Kernels, Unavailable


def load() -> Kernels:
    """The kernels for CUDA devices; compiles them and compares small answers, which takes seconds.

    Raises:
        Unavailable: there is no Triton or no device, or the kernels fail or disagree there.
    """
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device")
    try:
        import triton

        from ep_core.kernels import triton_greedy, triton_scorer
    except ImportError as error:
        raise Unavailable(f"no {error.name}") from None
    kernels = Kernels(
        f"Triton {triton.__version__}", triton_scorer.matrix_entropy, triton_greedy.greedy_renyi2
    )
    try:
        agrees = agree(kernels, torch.device("cuda"))
    except Exception as error:  # a compiler can raise anything
        raise Unavailable(f"Triton {triton.__version__} failed: {error}") from error
    if not agrees:
        raise Unavailable(f"Triton {triton.__version__} gave other answers than torch")
    return kernels


def agree(kernels: Kernels, device: torch.device) -> bool:
    """Do they answer as torch does, on queries and hidden states of a usual size?"""
    from ep_core.entropy import cosine_gram, matrix_entropy
    from ep_core.selectors import greedy_renyi2_torch

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(16, 32, 128, generator=generator).to(device, torch.bfloat16)
    few = q[:4]
    scores = [
        (kernels.matrix_entropy(few, how), matrix_entropy(few, how, dtype=torch.float64))
        for how in ("rows", "trace")
    ]
    gram = cosine_gram(q.flatten(1))
    return all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in scores) and torch.equal(
        kernels.greedy_renyi2(gram, 8), greedy_renyi2_torch(gram, 8)
    )
