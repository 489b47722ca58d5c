"""The pytest side of the suite: the backend under test, the header, skips, the recording."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_conformance.checkpoints import (
    make_picture,
    tiny_internvl,
    tiny_llava,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)
from ep_conformance.expected_failures import read_expected_failures, stale
from ep_conformance.recording import Conditions, Outcome, Recording
from ep_core.backend import Backend, default_device
from ep_core.errors import EntropyPruneError
from ep_core.plugins import registry


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


@dataclass
class Run:
    """The backend under test, where it runs, and what happened so far."""

    name: str
    backend: Backend
    device: str
    recording: Recording
    expected_failures: Mapping[str, str]


KEY = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `python -m ep_conformance` passes on."""
    parser.addoption("--backend", required=True)
    parser.addoption("--device")
    parser.addoption("--record", type=Path)
    parser.addoption("--expected-failures", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    """Load the backend and the expected failures; declare the suite's markers."""
    # a GPU multiplies float32 in fewer digits otherwise; engine processes inherit both
    os.environ |= {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}
    name = config.getoption("--backend")
    failures = config.getoption("--expected-failures")
    try:
        backend = registry().backend(name).load()
        expected = {} if failures is None else read_expected_failures(failures)
    except ImportError as error:
        raise pytest.UsageError(f"backend {name!r} is not installed here: {error}") from None
    except (EntropyPruneError, OSError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    device = config.getoption("--device") or default_device(backend)
    recording = Recording(Conditions.of(name, backend, device))
    config.stash[KEY] = Run(name, backend, device, recording, expected)
    config.addinivalue_line("markers", "needs(capability): skip without the capability")
    config.addinivalue_line("markers", "row(name): where the test stands in the support matrix")
    # tiny tensors: waiting for a second thread at every operation costs more than it gives
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is under test, and under which conditions."""
    return config.stash[KEY].recording.conditions.lines()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the failures that are expected."""
    for item in items:
        if reason := config.stash[KEY].expected_failures.get(item.nodeid):
            item.add_marker(pytest.mark.xfail(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what the backend does not claim to do."""
    run = item.config.stash[KEY]
    needed = [name for mark in item.iter_markers("needs") for name in mark.args]
    for name in (run.device, *needed):
        if not getattr(run.backend.capabilities, name):
            pytest.skip(f"no capability {name!r}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record how a test ended, and what the engine answered in it."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        (row,) = [mark.args[0] for mark in item.iter_markers("row")]
        answers: Any = dict(item.user_properties).get("answers", [])
        outcome = Outcome(report.outcome, row, answers=answers)
        if hasattr(report, "wasxfail") and report.outcome == "skipped":
            outcome.outcome, outcome.reason = "xfailed", report.wasxfail
        elif isinstance(report.longrepr, tuple):
            outcome.reason = report.longrepr[2].removeprefix("Skipped: ")
        item.config.stash[KEY].recording.outcomes[item.nodeid] = outcome
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the recording; expected failures that did not happen fail the run."""
    run = session.config.stash[KEY]
    if path := session.config.getoption("--record"):
        run.recording.write(path)
    if session.exitstatus == pytest.ExitCode.OK and _stale(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """List what did not run, by reason, and expected failures that went stale."""
    by_reason: dict[str, list[str]] = {}
    for name, outcome in config.stash[KEY].recording.outcomes.items():
        if outcome.outcome in ("skipped", "xfailed"):
            by_reason.setdefault(f"{outcome.outcome}: {outcome.reason}", []).append(name)
    if by_reason:
        terminalreporter.section("skipped and expected failures")
    for reason, names in by_reason.items():
        terminalreporter.line(reason)
        for name in names:
            terminalreporter.line(f"  {name}")
    if lines := _stale(config):
        terminalreporter.section("expected failures that are stale", red=True)
        for line in lines:
            terminalreporter.line(line)


def _stale(config: pytest.Config) -> list[str]:
    run = config.stash[KEY]
    files = {Path(argument).name for argument in config.args}
    outcomes = {name: outcome.outcome for name, outcome in run.recording.outcomes.items()}
    return stale(run.expected_failures, outcomes, files)


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
