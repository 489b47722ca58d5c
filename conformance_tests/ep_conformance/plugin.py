"""The pytest side of the suite: the backend under test, the header, skips by capability."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ep_conformance.checkpoints import (
    make_picture,
    tiny_internvl,
    tiny_llava,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)
from ep_core.backend import Backend
from ep_core.plugins import registry
from ep_core.policy import ENV


class Workshop:
    """Seeded random checkpoints and pictures, written once a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def checkpoint(self, name: str) -> Path:
        """A folder: `qwen-gqa`, `qwen-odd` (9 heads on 3), `qwen2-vl`, `internvl` or `llava`."""
        path = self._folder / name
        if not path.exists():
            if name == "qwen-gqa":
                tiny_qwen2_5_vl(path, seed=1, heads=6, kv_heads=2, head_dim=16)
            elif name == "qwen-odd":
                tiny_qwen2_5_vl(path, seed=2, heads=9, kv_heads=3, head_dim=32)
            elif name == "qwen2-vl":
                tiny_qwen2_vl(path, seed=4)
            elif name == "internvl":
                tiny_internvl(path, seed=5)
            elif name == "llava":
                tiny_llava(path, seed=3)
            else:
                raise ValueError(f"there is no checkpoint {name!r}")
        return path

    def picture(self, seed: int, width: int, height: int) -> Path:
        """A picture file by seed and size."""
        path = self._folder / f"{seed}-{width}x{height}.png"
        if not path.exists():
            make_picture(path, seed, (width, height))
        return path


@dataclass(frozen=True)
class UnderTest:
    """The backend under test and where it runs."""

    name: str
    backend: Backend
    device: str


KEY = pytest.StashKey[UnderTest]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `python -m ep_conformance` passes on."""
    parser.addoption("--backend", required=True)
    parser.addoption("--device", default="cpu")


def pytest_configure(config: pytest.Config) -> None:
    """Load the backend; declare the marker that names what a test needs."""
    name = config.getoption("--backend")
    try:
        backend = registry().backend(name).load()
    except ImportError as error:
        raise pytest.UsageError(f"backend {name!r} is not installed here: {error}") from None
    config.stash[KEY] = UnderTest(name, backend, config.getoption("--device"))
    config.addinivalue_line("markers", "needs(capability): skip without the capability")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is under test, and under which conditions."""
    under = config.stash[KEY]
    versions = ", ".join(f"{name} {v}" for name, v in under.backend.versions().items())
    able = [name for name, value in vars(under.backend.capabilities).items() if value]
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(ENV)]
    where = torch.cuda.get_device_name() if under.device == "cuda" else platform.machine()
    return [
        f"backend: {under.name} ({versions})",
        f"device: {under.device} ({where}), dtype: as stored (level 1), float32 (level 2)",
        f"capabilities: {', '.join(able)}",
        f"environment: {', '.join(settings) or f'no {ENV}* variable is set'}",
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what the backend does not claim to do."""
    under = item.config.stash[KEY]
    needed = [name for mark in item.iter_markers("needs") for name in mark.args]
    for name in (under.device, *needed):
        if not getattr(under.backend.capabilities, name):
            pytest.skip(f"backend {under.name} has no capability {name!r}")


@pytest.fixture(scope="session")
def backend(pytestconfig: pytest.Config) -> Backend:
    """The backend under test."""
    return pytestconfig.stash[KEY].backend


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where it runs."""
    return pytestconfig.stash[KEY].device


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Checkpoints and pictures, made when first asked for."""
    return Workshop(tmp_path_factory.mktemp("conformance"))
