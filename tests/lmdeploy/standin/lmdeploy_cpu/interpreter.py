"""LMDeploy's Triton kernels under Triton's interpreter: the same source, run by numpy."""

from types import ModuleType
from typing import Any

import triton.language as tl

# an A100's, but for the multiprocessors: the fewer there are, the fewer programs are interpreted
PROPERTIES = {
    "multi_processor_count": 4,
    "compute_capability": (8, 0),
    "warps_per_sm": 64,
    "blocks_per_sm": 32,
}


def change(kernels: ModuleType) -> None:
    """Change one module of kernels right after it was imported.

    While the interpreter runs a kernel it replaces what `triton.language` holds. A kernel's module
    that keeps a function of it under a name of its own (`tl_exp2 = tl.exp2`) would call the
    compiler's, so such names are made to look the function up when they are called.
    """
    for name, value in list(vars(kernels).items()):
        if tl.core.is_builtin(value):
            setattr(kernels, name, _late(value.__name__))
    if kernels.__name__.endswith(".cuda.utils"):
        kernels.get_device_props = lambda device=None: PROPERTIES
        kernels.is_cuda = lambda: False


def _late(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if name == "fast_dividef":  # from CUDA's own library, which the interpreter lacks
            return args[0] / args[1]
        return getattr(tl, name)(*args, **kwargs)

    return call
