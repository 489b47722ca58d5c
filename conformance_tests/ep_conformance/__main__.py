"""Run the suite: `python -m ep_conformance --backend NAME [--device cpu|cuda] [--level 1,2]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from ep_core.errors import EntropyPruneError
from ep_core.plugins import registry

LEVELS = {"1": "test_selection.py", "2": "test_engine.py", "3": "test_serving.py"}


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen levels; 0 if everything that could run passed."""
    parser = argparse.ArgumentParser(
        prog="ep_conformance", description="Show that a backend prunes the tokens that it should."
    )
    parser.add_argument("--backend", required=True, help="name, as in `entropyprune list`")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--level", default="1,2,3", help="levels to run, separated by commas (default: all)"
    )
    options = parser.parse_args(arguments)
    levels = options.level.split(",")
    if unknown := [level for level in levels if level not in LEVELS]:
        parser.error(f"there is no level {unknown[0]!r}; there are {', '.join(LEVELS)}")
    try:
        registry().backend(options.backend)
    except EntropyPruneError as error:
        parser.error(str(error))
    here = Path(__file__).parent
    return pytest.main(
        [
            f"--config-file={here / 'pytest.ini'}",
            f"--rootdir={here}",
            f"--backend={options.backend}",
            f"--device={options.device}",
            *(str(here / LEVELS[level]) for level in levels),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
