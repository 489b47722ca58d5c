"""Pruning inside SGLang; see docs/sglang.md."""

from __future__ import annotations

import os
import sys
from typing import Any

_ASKED = ("ENTROPYPRUNE", "ENTROPYPRUNE_WORKERS")


def activate() -> None:
    """SGLang's plugin entry point (group `sglang.srt.plugins`).

    SGLang logs what a plugin raises and serves without it. If pruning was asked for, that must not
    happen: `SystemExit` it lets through.
    """
    try:
        from ep_backends.sglang.plugin import register

        register()
    except Exception as error:  # an engine that does not import can raise anything
        refusal = SystemExit(f"entropyprune: error: {error}")
        asked = any(map(os.environ.get, _ASKED)) or any(map(_names_us, sys.argv))
        if asked:
            raise refusal from error
        _refuse_later(refusal)
        raise


def _refuse_later(refusal: SystemExit) -> None:
    """A program may still ask for pruning, by an argument of `sglang.Engine`."""
    try:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    except ImportError:
        return

    def refuse(server_args: Any, previous: Any) -> None:
        if _names_us(server_args.json_model_override_args or ""):
            raise refusal
        previous(server_args)

    register_resolution_hook("handle_missing_default_values")(refuse)


def _names_us(argument: str) -> bool:
    return '"entropyprune"' in argument
