"""`entropyprune eval`: an evaluation harness's tasks, unpruned and under each policy, as one table.

Every run is a process of its own: a model leaves its memory behind, and what a harness prints goes
to a log. The process sends JSON objects, one a line, on its standard output:
`{"answered": n, "of": m}` while it works, then what it counted, `{"counts": {...}}`, and at its end
`{"run": {...}}` or `{"error": "..."}`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ep_core.backend import default_device
from ep_core.cli_common import ModelFacts, PolicyType, device_option, dtype_option, load_backend
from ep_core.errors import EntropyPruneError
from ep_core.policy import ENV, EXAMPLE, PruningPolicy

HARNESSES = {"lmms-eval": "ep_backends.lmms_eval"}  # modules that run one evaluation each
UNPRUNED = "unpruned"
RESULTS = "results.json"
EXAMPLE_ENDPOINT = "http://127.0.0.1:30000/v1"


@click.command(name="eval")
@click.option(
    "--harness", type=click.Choice(list(HARNESSES)), default="lmms-eval", show_default=True
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a checkpoint in Hugging Face layout.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=PolicyType(),
    help=f'Such as "{EXAMPLE}"; repeat for several. Default: the variable {ENV}.',
)
@click.option("--endpoint", metavar="URL", help=f"Instead of --model, as in {EXAMPLE_ENDPOINT}.")
@click.option("--tasks", required=True, help="The harness's names, as in gqa,mme,pope.")
@click.option("--backend", help="Engine; see `entropyprune list`. Default: transformers.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests at once.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first questions of each task.")
@device_option
@dtype_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for results.json, every answer and the harness's logs.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def evaluate(
    harness: str,
    model: Path | None,
    policies: tuple[PruningPolicy, ...],
    endpoint: str | None,
    tasks: str,
    backend: str | None,
    batch_size: int,
    limit: int | None,
    device: str | None,
    dtype: str | None,
    out: Path | None,
    arguments: tuple[str, ...],
) -> None:
    """Measure accuracy with a harness: `eval --tasks gqa ... -- ARGUMENTS OF THE HARNESS`.

    Runs the tasks unpruned and under each policy. A server prunes as it was started, so an
    endpoint is measured as it is.
    """
    if (model is None) == (endpoint is None):
        raise EntropyPruneError(
            f"eval needs either --model DIR or --endpoint URL, as in --endpoint {EXAMPLE_ENDPOINT}"
        )
    common = {
        "tasks": _names(tasks),
        "batch_size": batch_size,
        "limit": limit,
        "arguments": list(arguments),
    }
    if endpoint is not None:
        _only_with_model(policies=policies, backend=backend, device=device, dtype=dtype)
        subject: dict[str, Any] = {"endpoint": endpoint}
        runs = {endpoint: subject}
    else:
        assert model is not None
        engine = load_backend(backend or "transformers")
        subject = {
            "model": str(model),
            "backend": backend or "transformers",
            "versions": dict(engine.versions()),
            "device": device or default_device(engine),
            "dtype": dtype,
        }
        runs = {
            name: {**subject, "policy": policy}
            for name, policy in _with_unpruned(model, policies).items()
        }
    finished: list[_Run] = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, run) in enumerate(runs.items(), 1):
            settings = {**common, **run, "log_samples": out is not None}
            which = f"{i} of {len(runs)}"
            try:
                column = _run(HARNESSES[harness], name, which, settings, out or Path(scratch))
            except EntropyPruneError:
                if finished:
                    _show(finished, limit, out)
                raise
            finished.append(column)
            if out is not None:
                _write(out / RESULTS, harness, {**subject, **common}, finished)
    _show(finished, limit, out)


@dataclass(frozen=True)
class _Run:
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


def _write(path: Path, harness: str, settings: dict[str, Any], runs: list[_Run]) -> None:
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


def _show(runs: list[_Run], limit: int | None, out: Path | None) -> None:
    """Print the table and what its reader must know."""
    rows = _rows(runs)
    policies = len(runs) - 1
    console = Console(soft_wrap=True, highlight=False)
    for i, run in enumerate(runs[1:], 1):
        console.print(f"policy {i}: {run.name}", markup=False)
    table = _table(rows, runs[0].name, policies, limit)
    # a table that a log cuts off is worth little
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)
    for line in _remarks(rows, policies):
        console.print(line, markup=False)
    for run in runs:
        for line in run.remarks():
            console.print(line, markup=False)
    if out is not None:
        console.print(f"written to {out / RESULTS}", markup=False)


def _names(tasks: str) -> list[str]:
    names = [name.strip() for name in tasks.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise EntropyPruneError(f"--tasks {tasks!r} must be different names, as in gqa,mme,pope")
    return names


def _only_with_model(**given: object) -> None:
    for name, value in given.items():
        if value:
            option = "--policy" if name == "policies" else f"--{name}"
            raise EntropyPruneError(
                f"{option} does not go with --endpoint: the server was started with its model and "
                "its policy; start another one for another column, as in entropyprune serve "
                f'lmdeploy --policy "{EXAMPLE}" -- ...'
            )


def _with_unpruned(
    model: Path, policies: tuple[PruningPolicy, ...]
) -> dict[str, dict[str, Any] | None]:
    """The policies as JSON by their names, after None for the unpruned run.

    They are checked against the model before anything is loaded, and settle its layer.
    """
    if not policies and (policy := PruningPolicy.from_environment()):
        policies = (policy,)
    if not policies:
        raise EntropyPruneError(f'no policy: give --policy "{EXAMPLE}" or set {ENV}')
    runs: dict[str, dict[str, Any] | None] = {UNPRUNED: None}
    for given in policies:
        policy = ModelFacts.of(model, given).policy
        assert policy is not None
        if str(policy) in runs:
            raise EntropyPruneError(f'--policy "{given}" is given twice')
        runs[str(policy)] = policy.to_json()
    return runs


def _run(module: str, name: str, which: str, settings: dict[str, Any], out: Path) -> _Run:
    """One evaluation in a process of its own, with its progress on stderr."""
    folder = out / which.split()[0]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != ENV}
    start = time.monotonic()
    command = [sys.executable, "-m", module, json.dumps({**settings, "out": str(folder)})]
    last: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    err = Console(stderr=True, soft_wrap=True, highlight=False)
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process,
        _progress(err) as progress,
    ):
        bar = progress.add_task(f"{which}: {name}", total=None)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last = json.loads(line)
                counts = last.get("counts", counts)
                if "of" in last:
                    progress.update(bar, completed=last["answered"], total=last["of"])
        except BaseException:
            process.terminate()
            raise
    if "error" in last:
        raise EntropyPruneError(f"{name}: {last['error']}")
    if "run" not in last:
        raise EntropyPruneError(
            f"{name}: the harness's process ended with status {process.returncode}; give --out "
            "DIR to keep its log"
        )
    run = _Run(name, round(time.monotonic() - start, 1), counts | last["run"])
    err.print(f"{which}: {name}: {run.facts['requests']:,} requests, {run.seconds:,.0f} s")
    return run


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _rows(runs: list[_Run]) -> list[dict[str, Any]]:
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
