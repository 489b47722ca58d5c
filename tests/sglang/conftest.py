"""The real SGLang engine on the CPU, in the environment that `make setup-sglang` creates."""

import os

# read when sglang is first imported, here and in its worker processes
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
