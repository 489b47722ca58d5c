"""The table of `entropyprune eval`: a row for each task and metric, a column for each run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from entropyprune.cli.common import console

UNPRUNED = "unpruned"
RESULTS = "results.json"


@dataclass(frozen=True)
class Run:
    """One column: what the harness measured, and how many requests were pruned.

    Attributes:
        name: the policy, "unpruned" or the endpoint.
        seconds: what it took, the model's loading included.
        facts: `tasks`, `{task: {"questions": n, "main": metric, "metrics": {metric: {"value",
            "stderr", "higher_is_better"}}}}`, a value of None where there is none; `requests`;
            `unpruned`, `{reason: requests}`; `notes`, lines for the reader; `harness_version`.
    """

    name: str
    seconds: float
    facts: dict[str, Any]

    def remarks(self) -> Iterator[str]:
        """What a reader of the table must know about this column."""
        if self.name != UNPRUNED:
            for reason, count in self.facts["unpruned"].items():
                requests = self.facts["requests"]
                yield f"{self.name}: {count:,} of {requests:,} requests ran unpruned: {reason}"
        for note in self.facts["notes"]:
            yield f"{self.name}: {note}"


def write(path: Path, harness: str, settings: dict[str, Any], runs: list[Run]) -> None:
    """The finished runs; another run's end replaces the file as a whole."""
    summary = {
        "harness": f"{harness} {runs[0].facts['harness_version']}",
        **settings,
        "runs": [{"name": run.name, "seconds": run.seconds, **run.facts} for run in runs],
        "table": _rows(runs),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(path)


def show(runs: list[Run], limit: int | None, out: Path | None) -> None:
    """Print the table and what its reader must know."""
    rows = _rows(runs)
    policies = len(runs) - 1
    for i, run in enumerate(runs[1:], 1):
        click.echo(f"policy {i}: {run.name}")
    table = _table(rows, runs[0].name, policies, limit)
    # a table that a log cuts off is worth little
    wide = console()
    wide.width = max(wide.width, Console(width=1000).measure(table).maximum)
    wide.print(table)
    for line in _remarks(rows, policies):
        click.echo(line)
    for run in runs:
        for line in run.remarks():
            click.echo(line)
    if out is not None:
        click.echo(f"written to {out / RESULTS}")


def _rows(runs: list[Run]) -> list[dict[str, Any]]:
    """One row for each task and metric: the values, and what each keeps of the first run's."""
    rows = []
    for task, measured in runs[0].facts["tasks"].items():
        for metric in measured["metrics"]:
            columns = [run.facts["tasks"][task]["metrics"].get(metric) or {} for run in runs]
            values = [column.get("value") for column in columns]
            higher_is_better = measured["metrics"][metric]["higher_is_better"]
            whole = values[0] if higher_is_better else None
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "main": metric == measured["main"],
                    "higher_is_better": higher_is_better,
                    "questions": measured["questions"],
                    "values": values,
                    "stderr": [column.get("stderr") for column in columns],
                    "kept": [
                        value / whole if whole and value is not None else None for value in values
                    ],
                }
            )
    return rows


def _table(rows: list[dict[str, Any]], first: str, policies: int, limit: int | None) -> Table:
    title = f"the first {limit:,} questions of each task" if limit else None
    table = Table(title=title, title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    heads = [name for i in range(policies) for name in (f"policy {i + 1}", "kept")]
    for name in ("questions", first, *heads):
        table.add_column(name, justify="right", no_wrap=True)

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    for row in rows:
        known = [abs(value) for value in row["values"] if value is not None]
        digits = 4 if max(known, default=0) <= 1 else 2  # a share, or points
        cells: list[str] = []
        for value, share in zip(row["values"], row["kept"], strict=True):
            cells += ["-" if value is None else f"{value:.{digits}f}", percent(share)]
        del cells[1]  # the first column is what the others are shares of
        table.add_row(row["task"], row["metric"], f"{row['questions']:,}", *cells)
    kept = [row["kept"] for row in rows if row["main"]]
    if len(kept) > 1 and policies and all(None not in shares for shares in kept):
        means = [sum(column) / len(kept) for column in zip(*kept, strict=True)]
        table.add_section()
        cells = [cell for mean in means[1:] for cell in ("", percent(mean))]
        table.add_row("mean of the tasks", "each task's first", "", "", *cells)
    return table


def _remarks(rows: list[dict[str, Any]], policies: int) -> Iterator[str]:
    """The tasks whose first metric has no share that is kept, and why."""
    firsts = [row for row in rows if row["main"]]
    so = ", so there is no mean of the tasks" if len(firsts) > 1 and policies else ""
    reasons: dict[str, list[str]] = {}
    for row in firsts:
        if None in row["values"]:
            reason = "no value of the first metric"
        elif policies and not row["higher_is_better"]:
            reason = "lower is better in the first metric"
        elif policies and row["values"][0] == 0:
            reason = "the first metric's first value is 0"
        else:
            continue
        reasons.setdefault(reason, []).append(f"{row['task']} ({row['metric']})")
    for reason, names in reasons.items():
        yield f"{', '.join(names)}: {reason}{so}"
