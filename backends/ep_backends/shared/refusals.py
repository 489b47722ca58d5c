"""Stopping a server at its start, with one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ep_core.errors import EntropyPruneError, UnsupportedError

PREFIX = "entropyprune: error: "


class StartRefused(UnsupportedError, SystemExit):
    """Pruning cannot work with what was asked.

    An error for programs, and one line instead of a traceback where a command line meets it.
    """

    def __init__(self, message: str) -> None:
        SystemExit.__init__(self, PREFIX + message)

    def __str__(self) -> str:
        return str(self.code).removeprefix(PREFIX)


@contextmanager
def refusing() -> Iterator[None]:
    """Turn an error of ours into one that stops a server with one line."""
    try:
        yield
    except EntropyPruneError as error:
        raise StartRefused(str(error)) from None
