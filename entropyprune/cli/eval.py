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
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from entropyprune.cli.common import (
    ModelFacts,
    PolicyType,
    console,
    device_option,
    dtype_option,
    load_backend,
    needed,
)
from entropyprune.cli.eval_table import RESULTS, UNPRUNED, Run, show, write
from ep_core.backend import default_device
from ep_core.errors import EntropyPruneError
from ep_core.policy import ENV, EXAMPLE, PruningPolicy

HARNESSES = {"lmms-eval": "ep_backends.lmms_eval"}  # modules that run one evaluation each
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
@click.option("--tasks", required=True, metavar="NAMES", help="The harness's, as in gqa,mme,pope.")
@click.option(
    "--backend", metavar="NAME", help="Engine; see `entropyprune list`. Default: transformers."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Requests at once.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only the first N questions of each task.",
)
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
    """Measure accuracy with an evaluation harness.

    Runs the tasks unpruned and under each policy. A server prunes as it was started, so an
    endpoint is measured as it is. What follows -- is the harness's own, as in

    \b
    entropyprune eval --model DIR --policy "layer=2,keep=128" --tasks gqa \\
      -- --verbosity DEBUG
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
    finished: list[Run] = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, run) in enumerate(runs.items(), 1):
            settings = {**common, **run, "log_samples": out is not None}
            which = f"{i} of {len(runs)}"
            try:
                column = _run(HARNESSES[harness], name, which, settings, out or Path(scratch))
            except EntropyPruneError:
                if finished:
                    show(finished, limit, out)
                raise
            finished.append(column)
            if out is not None:
                write(out / RESULTS, harness, {**subject, **common}, finished)
    show(finished, limit, out)


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
    runs: dict[str, dict[str, Any] | None] = {UNPRUNED: None}
    for given in policies or (needed(None),):
        policy = ModelFacts.of(model, given).policy
        assert policy is not None
        if str(policy) in runs:
            raise EntropyPruneError(f'--policy "{given}" is given twice')
        runs[str(policy)] = policy.to_json()
    return runs


def _run(module: str, name: str, which: str, settings: dict[str, Any], out: Path) -> Run:
    """One evaluation in a process of its own, with its progress on stderr."""
    folder = out / which.split()[0]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != ENV}
    start = time.monotonic()
    command = [sys.executable, "-m", module, json.dumps({**settings, "out": str(folder)})]
    last: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process,
        _progress() as progress,
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
    run = Run(name, round(time.monotonic() - start, 1), counts | last["run"])
    requests = run.facts["requests"]
    click.echo(f"{which}: {name}: {requests:,} requests, {run.seconds:,.0f} s", err=True)
    return run


def _progress() -> Progress:
    """A bar on stderr for people; logs get none."""
    err = console(stderr=True)
    err.quiet = not err.is_terminal
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )
