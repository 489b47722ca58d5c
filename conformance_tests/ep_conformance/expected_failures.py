"""Failures that are known: a file of test ids with reasons, none of which may go stale.

# what the engine cannot do yet, and where that is reported
test_serving.py::test_order_of_requests[1]  answers come back in the order of arrival
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

EXAMPLE = "test_serving.py::test_order_of_requests[1]  why it fails"


def read_expected_failures(path: Path) -> dict[str, str]:
    """Reasons by test id.

    Raises:
        ValueError: a line is no id with a reason, or an id stands there twice.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, reason = line.partition(" ")
        if not reason.strip():
            raise ValueError(f"{path}:{number}: {name!r} has no reason; an example is {EXAMPLE!r}")
        if name in found:
            raise ValueError(f"{path}:{number}: {name!r} is there twice; keep one of the lines")
        found[name] = reason.strip()
    return found


def stale(
    expected: Mapping[str, str], outcomes: Mapping[str, str], files: Collection[str]
) -> list[str]:
    """What is wrong with the expectations, a line each.

    Args:
        expected: reasons by test id.
        outcomes: how each test ended, by id.
        files: the test files that were run; ids of others are not judged.
    """
    return [
        f"{name} is expected to fail, but "
        + (f"it was reported as {outcomes[name]}" if name in outcomes else "there is no such test")
        for name in expected
        if (name in outcomes or name.partition("::")[0] in files)
        and outcomes.get(name) != "xfailed"
    ]
