"""The real lmms-eval, in the environment that `make test-eval` creates, without a network."""

import importlib.metadata
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    try:
        importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        raise pytest.UsageError(
            "tests/lmms_eval needs its own environment: make test-eval"
        ) from None
    # one thread: several wait for each other where other programs run
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", ENTROPYPRUNE="", OMP_NUM_THREADS="1"
    )
