"""Pruning inside SGLang; see docs/sglang.md."""

from __future__ import annotations

import os
import sys


def activate() -> None:
    """SGLang's plugin entry point (group `sglang.srt.plugins`).

    SGLang logs what a plugin raises and serves without it. If pruning was asked for, that must not
    happen: `SystemExit` it lets through.
    """
    try:
        from ep_backends.sglang.plugin import register

        register()
    except Exception as error:  # an engine that does not import can raise anything
        asked = os.environ.get("ENTROPYPRUNE") or any('"entropyprune"' in a for a in sys.argv)
        if asked:
            raise SystemExit(f"entropyprune: error: {error}") from error
        raise
