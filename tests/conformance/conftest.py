"""Tests of the suite import its modules, whose markers its plugin declares in a run of its own."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("row(name)", "needs(capability)"):
        config.addinivalue_line("markers", f"{marker}: of the suite")
