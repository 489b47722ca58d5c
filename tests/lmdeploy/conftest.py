"""The real LMDeploy engine on the CPU, in the environment that `make setup-lmdeploy` creates.

There `lmdeploy_cpu` stands in for LMDeploy's device layer from the moment that a process imports
lmdeploy. The stand-in changes torch: whatever is compared with transformers lets transformers
answer in another process, or before.
"""

import importlib.util

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("lmdeploy_cpu") is None:
        raise pytest.UsageError("tests/lmdeploy needs its own environment: make setup-lmdeploy")
