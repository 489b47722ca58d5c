"""What a run leaves behind: one JSON object, to be compared with those of other environments."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ep_core.backend import Backend
from ep_core.policy import ENV

FORMAT = 1


@dataclass(frozen=True)
class Conditions:
    """Under which a run took place.

    Attributes:
        backend: name of the backend under test.
        versions: of the engine, of what its results depend on, of this suite and of Python.
        device: "cpu" or "cuda".
        hardware: the machine's architecture or the GPU's name.
        attention: name of the attention kernels.
        dtype: of levels 2 and 3; level 1 takes tensors as they are stored.
        capabilities: what the backend can do.
        environment: every variable that begins with `ENTROPYPRUNE`.
    """

    backend: str
    versions: Mapping[str, str]
    device: str
    hardware: str
    attention: str
    dtype: str
    capabilities: tuple[str, ...]
    environment: Mapping[str, str]

    @classmethod
    def of(cls, name: str, backend: Backend, device: str) -> Conditions:
        """Those of this process."""
        own = {"entropyprune": version("entropyprune"), "python": platform.python_version()}
        return cls(
            backend=name,
            versions={**backend.versions(), **own},
            device=device,
            hardware=torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            attention=backend.attention(device),
            dtype="float32",
            capabilities=tuple(k for k, able in vars(backend.capabilities).items() if able),
            environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(ENV)},
        )

    def lines(self) -> list[str]:
        """For people."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        settings = ", ".join(f"{name}={value}" for name, value in self.environment.items())
        return [
            f"backend: {self.backend} ({versions})",
            f"device: {self.device} ({self.hardware}), attention: {self.attention}, "
            f"dtype: {self.dtype} (level 1: as stored)",
            f"capabilities: {', '.join(self.capabilities)}",
            f"environment: {settings or f'no {ENV}* variable is set'}",
        ]


@dataclass
class Outcome:
    """How one test ended.

    Attributes:
        outcome: "passed", "failed", "skipped" or "xfailed".
        row: of the support matrix.
        reason: of a skip or an expected failure.
        answers: what the engine answered, as `Expected.to_json` has it.
    """

    outcome: str
    row: str
    reason: str | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Recording:
    """A run: its conditions, and the outcome of each test by its id."""

    conditions: Conditions
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the recording as JSON, a test on each line."""
        tests = ",\n".join(
            f"{json.dumps(k)}: {json.dumps(asdict(v))}" for k, v in self.outcomes.items()
        )
        head = json.dumps({"format": FORMAT, **asdict(self.conditions)}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head[:-2]},\n "tests": {{\n{tests}\n}}\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Read what `write` wrote.

        Raises:
            ValueError: it is no recording, or one of another format.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(
                f"{path} is no recording of format {FORMAT}; make one with --record {path.name}"
            )
        tests = {name: Outcome(**outcome) for name, outcome in content.pop("tests").items()}
        content["capabilities"] = tuple(content["capabilities"])
        return cls(Conditions(**content), tests)
