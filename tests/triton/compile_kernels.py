"""Compile the kernels for a GPU that need not be there: compile_kernels.py COMPUTE_CAPABILITY."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ep_core.kernels import rational, triton_greedy, triton_scorer

TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)


def compile_for(kernel, types, constants, warps=4):
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    assert triton.compile(source, target=TARGET, options={"num_warps": warps}).asm["cubin"]


strides = {"token_stride": "i32", "head_stride": "i32", "width_stride": "i32"}
for (heads, width, stored, warps), normalize in (
    ((32, 128, "bf16", 1), 0),
    ((28, 80, "fp16", 1), 2),
    ((64, 256, "fp32", 4), 1),
):
    constants = {
        "HEADS": heads,
        "WIDTH": width,
        "ROWS": max(16, triton.next_power_of_2(heads)),
        "SLICE": 32,
        "POLES": len(rational.POLES),
        "NORMALIZE": normalize,
    }
    types = {"q": f"*{stored}", "scores": "*fp32", "coefficients": "*fp64"} | strides
    compile_for(triton_scorer._score, types, constants, warps)

gram = {"gram": "*fp32", "totals": "*fp64"}
strides = {"row_stride": "i32", "column_stride": "i32"}
for block in (1024, 8192):
    size = {"BLOCK": block}
    compile_for(triton_greedy._totals, gram | strides | {"n": "i32"}, size)
    types = gram | {"kept": "*i64"} | strides | {"n": "i32", "k": "i32"}
    compile_for(triton_greedy._pick, types, size, 8)
