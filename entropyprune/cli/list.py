"""`entropyprune list`: everything that can be named in an option or a policy."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from entropyprune.cli.common import console
from ep_core import demo
from ep_core.errors import EntropyPruneError
from ep_core.plugins import Registry, registry

MARKS = ("<!-- model families: make tables -->\n", "<!-- end of the model families -->")


@click.command(name="list")
@click.option(
    "--update",
    "pages",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Write the table of families and engines between its marks in this Markdown page.",
)
def list_(pages: tuple[Path, ...]) -> None:
    """List backends, model families and methods."""
    plugins = registry()
    for page in pages:
        update(page, family_table(plugins))
    if pages:
        return
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


def family_table(plugins: Registry) -> str:
    """Model families by engine, in Markdown: which checkpoints run, or why none does."""
    engines = [spec for _, spec in sorted(plugins.backends.items()) if spec.families]
    lines = [
        f"| | {' | '.join(spec.name for spec in engines)} |",
        f"|---{'|---' * len(engines)}|",
    ]
    for model_type, family in sorted(plugins.families.items(), key=lambda item: item[1].name):
        cells = [spec.families.get(model_type, "where its decoder fits") for spec in engines]
        lines.append(f"| {family.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def update(page: Path, table: str) -> None:
    """Write a table between the marks in a page.

    Raises:
        EntropyPruneError: the marks are not there.
    """
    text, (start, end) = page.read_text(encoding="utf-8"), MARKS
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise EntropyPruneError(f"{page} has no marks for the table: {start.strip()} ... {end}")
    page.write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")
