"""The CPU stand-in for LMDeploy's device layer keeps to its place."""

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_refused_where_there_is_a_gpu():
    done = run("import torch; torch.cuda.is_available = lambda: True; import lmdeploy")
    assert done.returncode
    assert "this machine has a GPU" in done.stderr


def test_torch_is_untouched_without_lmdeploy():
    done = run("import torch; print(type(torch.empty).__name__, torch.cuda.Stream.__module__)")
    assert done.stdout.split() == ["builtin_function_or_method", "torch.cuda.streams"], done.stderr


def test_a_graph_is_not_captured_by_mistake():
    code = """
from types import SimpleNamespace
import lmdeploy.pytorch.engine
from lmdeploy.pytorch.backends import get_backend
get_backend("cuda").build_graph_runner(None, None, None, SimpleNamespace(eager_mode=False), "cpu")
"""
    assert "LMDEPLOY_FAKE_CUDA_GRAPH_CAPTURE" in run(code).stderr
