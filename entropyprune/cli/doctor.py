"""`entropyprune doctor`: what is installed here, and does it fit?"""

from __future__ import annotations

import os
import platform

import click
import torch

from entropyprune import __version__
from entropyprune.cli.common import remedy, why_not_loaded
from ep_core import kernels
from ep_core.backend import Backend
from ep_core.errors import EntropyPruneError
from ep_core.plugins import ENV_BLOCK, registry
from ep_core.policy import ENV, PruningPolicy


@click.command()
def doctor() -> int:
    """Check this installation and each backend."""
    click.echo(f"entropyprune {__version__}, Python {platform.python_version()}")
    click.echo(f"torch {torch.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}")
    for device in ("cpu", "cuda"):
        click.echo(f"kernels, {device}: {kernels.describe(device)}")
    failed = False
    for name in (ENV, ENV_BLOCK):
        click.echo(f"{name}={os.environ.get(name, '(not set)')}")
    try:
        PruningPolicy.from_environment()
    except EntropyPruneError as error:
        failed = True
        click.echo(f"  FAILED: {error}")
    absent = []
    for name, spec in sorted(registry().backends.items()):
        try:
            backend = spec.load()
        except Exception as error:  # an engine that does not import can raise anything
            absent.append(f"backend {name} {why_not_loaded(name, error)}")
        else:
            failed |= _print_points(name, backend)
    for line in absent:
        click.echo(line)
    return 1 if failed else 0


def _print_points(name: str, backend: Backend) -> bool:
    """Print an engine's versions and each attach point; True if one of them does not fit."""
    packages = ", ".join(f"{key} {value}" for key, value in backend.versions().items())
    click.echo(f"backend {name}: {packages}")
    statuses = backend.probe()
    for status in statuses:
        click.echo(f"  {status.target}\n    {status}")
    failed = any(status.state == "FAILED" for status in statuses)
    if failed:
        click.echo(f"  this version of {name} does not fit{remedy(name)}")
    return failed
