"""A stand-in for the CPU build of sgl_kernel, for checks on a machine without a GPU only.

SGLang imports names from `sgl_kernel` when it starts in CPU mode, and no CPU build of that package
is published. This one has the names and no kernels: SGLang then takes its own plain-torch paths.
It is installed into `.venv-sglang` by `make setup-sglang` and is no part of the distribution.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.0.0+standin"

# operators that model files look up while they are imported; none of ours ever calls one
_NAMED_AT_IMPORT = (
    "fused_gdn_gating_cpu",
    "fused_moe_router_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
)
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in _NAMED_AT_IMPORT:
    _library.define(f"{_name}(Tensor a, Tensor b) -> Tensor")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu") or name.startswith("__"):
        raise AttributeError(f"the sgl_kernel stand-in has no {name!r}")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"the sgl_kernel stand-in has no kernel {name!r}")

    return missing
