"""`entropyprune list`: everything that can be named in an option or a policy."""

from __future__ import annotations

import click
from rich.table import Table

from entropyprune.cli.common import console
from ep_core import demo
from ep_core.plugins import registry


@click.command(name="list")
def list_() -> None:
    """List backends, model families and methods."""
    plugins = registry()
    table = Table("kind", "name", "what it is", "plugin")
    for name, spec in sorted(plugins.backends.items()):
        table.add_row("backend", name, spec.summary, plugins.providers[f"backend {name}"])
    for name, family in sorted(plugins.families.items()):
        what = f"{family.name}, layer {family.default_layer} by default"
        table.add_row("family", name, what, plugins.providers[f"family {name}"])
    for name, selector in sorted(plugins.selectors.items()):
        table.add_row("method", name, selector.summary, plugins.providers[f"selector {name}"])
    console().print(table)
    click.echo(f"demonstration model: {demo.MODEL}")
    click.echo(f"demonstration pictures: {demo.PICTURES}")
