"""The suite's command line.

python -m ep_conformance --backend NAME [--device cpu|cuda] [--level 1,2,3] [--record out.json]
python -m ep_conformance compare a.json b.json ... [--update README.md ...]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ep_conformance.compare import compare, matrix
from ep_conformance.recording import Recording
from ep_core.errors import EntropyPruneError
from ep_core.plugins import registry

try:
    import pytest
except ImportError as error:  # one line instead of a traceback for a bare installation
    sys.exit(
        f"ep_conformance: error: the suite needs {error.name}; "
        "run pip install 'entropyprune[conformance]'"
    )

LEVELS = {"1": "test_selection.py", "2": "test_engine.py", "3": "test_serving.py"}
MARKS = ("<!-- support matrix: make conformance -->\n", "<!-- end of the support matrix -->")


def main(arguments: list[str] | None = None) -> int:
    """Run the suite, or compare recordings; 0 if everything that could run passed."""
    given = sys.argv[1:] if arguments is None else arguments
    return _compare(given[1:]) if given[:1] == ["compare"] else _run(given)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ep_conformance",
        description="Show that a backend prunes the tokens that it should.",
        epilog="ep_conformance compare A.json B.json ... sets recordings beside each other.",
    )
    parser.add_argument("--backend", required=True, help="name, as in `entropyprune list`")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda where there is one and the backend runs there, else cpu",
    )
    parser.add_argument(
        "--level", default="1,2,3", help="levels to run, separated by commas (default: all)"
    )
    parser.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="ID",
        help="run this test alone, as in test_serving.py::test_chunked_as_whole",
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what happened as JSON")
    parser.add_argument(
        "--expected-failures",
        type=Path,
        metavar="FILE",
        help="test ids with reasons, a line each; one that does not fail is an error",
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
    files = {"--record": options.record, "--expected-failures": options.expected_failures}
    return pytest.main(
        [
            f"--config-file={here / 'pytest.ini'}",
            f"--rootdir={here}",
            f"--backend={options.backend}",
            *([f"--device={options.device}"] if options.device else []),
            *(f"{name}={path.resolve()}" for name, path in files.items() if path),
            *(str(here / name) for name in options.test or [LEVELS[level] for level in levels]),
        ]
    )


def _compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ep_conformance compare", description="Say where recorded runs differ."
    )
    parser.add_argument("recordings", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--update",
        action="append",
        default=[],
        type=Path,
        metavar="PAGE",
        help="write the support matrix between the marks in this page",
    )
    options = parser.parse_args(arguments)
    try:
        recordings = [Recording.read(path) for path in options.recordings]
        found, table = compare(recordings), matrix(recordings)
        for page in options.update:
            update(page, table)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for recording in recordings:
        print(*recording.conditions.lines(), sep="\n", end="\n\n")
    print(table, end="\n\n")
    print(*found.lines, sep="\n", end="\n" if found.lines else "")
    print(
        f"{found.tests} tests compared between engines, {len(found.lines) - found.failed} "
        f"differences, {found.failed} failures"
    )
    return int(found.failed > 0)


def update(page: Path, table: str) -> None:
    """Write a table between the marks in a page.

    Raises:
        ValueError: the marks are not there.
    """
    text, (start, end) = page.read_text(encoding="utf-8"), MARKS
    new, count = re.subn(
        f"({re.escape(start)}).*?({re.escape(end)})",
        lambda match: f"{match[1]}\n{table}\n\n{match[2]}",
        text,
        flags=re.DOTALL,
    )
    if not count:
        raise ValueError(f"{page} has no place for the matrix; put {start.strip()} and {end} there")
    page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
