"""`entropyprune serve`: an engine's own server, with pruning."""

from __future__ import annotations

import os

import click

from entropyprune.cli.common import load_backend, needed, policy_option
from ep_core.errors import EntropyPruneError
from ep_core.policy import ENV, PruningPolicy


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("engine")
@policy_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(engine: str, policy: PruningPolicy | None, arguments: tuple[str, ...]) -> None:
    """Start an engine's own server with pruning.

    What follows -- is the server's own, as in

    \b
    entropyprune serve sglang --policy "layer=2,keep=128" -- --model-path DIR
    """
    policy = needed(policy)
    backend = load_backend(engine)
    failed = [status for status in backend.probe() if status.state == "FAILED"]
    if failed:
        raise EntropyPruneError(
            f"{failed[0].target}: {failed[0].detail}; run entropyprune doctor for all of them"
        )
    command = backend.server_command(arguments)
    os.environ[ENV] = str(policy)
    os.execv(command[0], command)
