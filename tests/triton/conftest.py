"""Triton's interpreter runs the kernels here; it must be asked for before Triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
