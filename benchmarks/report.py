"""What benchmarks share: timing in rounds, and results with the machine, versions and command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """How a result came about: command, machine and versions, for its JSON file."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
    }


def processor() -> str:
    """Its name as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def heading(title: str, result: Mapping[str, Any]) -> list[str]:
    """The first lines of a Markdown report: what `environment` found."""
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} in use"
    if machine["accelerator"]:
        where += f"; {machine['accelerator']}"
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return [f"# {title}", "", f"{where}; {packages}.", "", f"    {result['command']}", ""]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table: the first column to the left, numbers to the right."""
    cells = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells]


def publish(result: Mapping[str, Any], lines: Iterable[str], path: Path | None) -> None:
    """Print the Markdown report; with a path, write it beside the JSON file of that name."""
    text = "\n".join(lines) + "\n"
    print(text)
    if path is not None:
        path.with_name(f"{path.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        path.with_name(f"{path.name}.md").write_text(text)


def output(text: str) -> Path:
    """An argument `--out NAME` for `publish`, refused before any work where it has no folder."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no such folder")
    return path


def progress(items: Iterable[T], what: str, total: float | None = None) -> Iterable[T]:
    """The items, with a progress bar on stderr."""
    return track(items, what, total=total, console=Console(stderr=True))


def timed(
    paths: Mapping[str, Callable[[], object]], rounds: int, what: str
) -> dict[str, list[float]]:
    """Milliseconds of each path in each round, after one round that does not count.

    In a round every path runs once in turn, so what else the machine does meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in paths}
    for round_ in progress(range(rounds + 1), what):
        for name, path in paths.items():
            start = time.perf_counter()
            path()
            if round_:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster the second is: the median over rounds of the ratio in a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
