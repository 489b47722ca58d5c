"""One evaluation for `entropyprune eval`, in a process of its own: see `entropyprune.cli.eval`.

python -m ep_backends.lmms_eval SETTINGS, a JSON object: `tasks`, `batch_size`, `limit`, `out`,
`log_samples`, `arguments`, and either `endpoint` or `model`, `backend`, `policy`, `device` and
`dtype`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import traceback
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ep_backends.lmms_eval import ENDPOINT, NAME
from ep_core.errors import EntropyPruneError, UnsupportedError

LOG = "log.txt"
DERIVED = (  # ends of the names under which lmms-eval tells more about a metric
    *("_stderr", "_stderr_clt", "_stderr_clustered", "_expected_accuracy"),
    *("_consensus_accuracy", "_internal_variance", "_consistency_rate"),
)
OURS = {  # what `entropyprune eval` decides, by lmms-eval's names
    "model": "--model",
    "model_args": "--model, --policy, --backend and the like",
    "tasks": "--tasks",
    "batch_size": "--batch-size",
    "limit": "--limit",
    "device": "--device",
    "output_path": "--out",
    "log_samples": "--out",
    "use_cache": "nothing: an answer from a cache is not known to be pruned",
}


def main() -> None:
    """Run, send what came of it to standard output, and everything else to the log."""
    settings = json.loads(sys.argv[1])
    channel = os.dup(1)
    log = os.open(Path(settings["out"], LOG), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        message: dict[str, Any] = {"run": run(settings, channel)}
    except EntropyPruneError as error:
        message = {"error": str(error)}
    except Exception as error:  # a harness, its tasks and their data can raise anything
        traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())
        message = {"error": f"lmms-eval failed, give --out DIR to keep its log: {said}"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(channel, (json.dumps(message) + "\n").encode())
    sys.exit("error" in message)


def run(settings: dict[str, Any], channel: int) -> dict[str, Any]:
    """Evaluate; gives the facts that `entropyprune.cli.eval_table` describes, the counts left out.

    Raises:
        EntropyPruneError: what the user can change.
    """
    try:
        harness_version = version("lmms-eval")
    except PackageNotFoundError:
        raise EntropyPruneError(
            "lmms-eval is missing; run pip install 'entropyprune[eval]'"
        ) from None
    from lmms_eval.__main__ import cli_evaluate_single

    arguments = lmms_eval_arguments(settings, channel)
    try:
        results, _ = cli_evaluate_single(arguments)
    except AssertionError as error:
        # lmms-eval's chat models take no other tasks, and it says so with this assertion
        if "used for generation only" not in str(error):
            raise
        from ep_backends.lmms_eval.requests import POSSIBLE

        raise UnsupportedError(f"a task compares log-likelihoods; {POSSIBLE}") from None
    return {"harness_version": harness_version, "tasks": measured(results)}


def lmms_eval_arguments(settings: dict[str, Any], channel: int) -> Any:
    """lmms-eval's own arguments: the user's, read by its parser, and ours.

    Raises:
        EntropyPruneError: an argument that it does not know, or that is ours to set.
    """
    from lmms_eval.__main__ import parse_eval_args

    said = io.StringIO()
    sys.argv = ["lmms-eval", *settings["arguments"]]
    try:
        with contextlib.redirect_stderr(said):
            parser, arguments = parse_eval_args()
    except SystemExit:
        line = (said.getvalue().strip() or "nothing after -- may end the program").splitlines()[-1]
        raise EntropyPruneError(f"after --: {line}") from None
    for name, ours in OURS.items():
        if getattr(arguments, name) != parser.get_default(name):
            raise EntropyPruneError(f"after --: --{name} is not allowed; use {ours}")
    arguments.model = ENDPOINT if "endpoint" in settings else NAME
    arguments.model_args = model_arguments(settings, channel)
    arguments.tasks = ",".join(settings["tasks"])
    arguments.batch_size = settings["batch_size"]
    arguments.limit = settings["limit"]
    arguments.device = settings.get("device")
    arguments.output_path = settings["out"]
    arguments.log_samples = settings["log_samples"]
    return arguments


def model_arguments(settings: dict[str, Any], channel: int) -> str:
    """The model class's arguments in the one string that lmms-eval passes on.

    Raises:
        EntropyPruneError: a path that the string cannot hold.
    """
    from lmms_eval.utils import simple_parse_args_string

    if "endpoint" in settings:
        os.environ.setdefault("OPENAI_API_KEY", "none")  # the client wants one, servers do not
        url = settings["endpoint"].rstrip("/")
        given = {"base_url": url, "model": served_model(url)}
    else:
        policy = "off" if settings["policy"] is None else json.dumps(settings["policy"])
        given = {
            "model": os.path.abspath(settings["model"]),
            "backend": settings["backend"],
            "policy": policy,
        }
        if settings["dtype"] is not None:
            given["dtype"] = settings["dtype"]
    text = ",".join(f"{key}={value}" for key, value in given.items())
    try:
        read = simple_parse_args_string(text)
    except ValueError:
        read = None
    if read != given:
        raise EntropyPruneError(
            f"lmms-eval cannot take {given['model']!r} as an argument, as commas, quotes and "
            "brackets separate its arguments; rename the folder or link to it"
        )
    return f"{text},report={channel}"


def served_model(url: str) -> str:
    """The name under which a server offers its model.

    Raises:
        EntropyPruneError: nothing answers there as OpenAI's API does.
    """
    key = os.environ["OPENAI_API_KEY"]
    try:
        request = urllib.request.Request(
            f"{url}/models", headers={"Authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EntropyPruneError(
            f"{url}/models names no model ({error}); an endpoint is a running server's address, "
            "as in http://127.0.0.1:30000/v1"
        ) from None


def measured(results: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's numbers for each task; the metric listed first is there without a number too."""
    tasks = {}
    for task, config in results["configs"].items():
        values = {
            tuple(key.split(",", 1)): value
            for key, value in results["results"][task].items()
            if "," in key
        }
        listed = [metric["metric"] for metric in config.get("metric_list") or []]
        order = listed or [name for name, _ in values if not name.endswith(DERIVED)]
        directions = results.get("higher_is_better", {}).get(task, {})
        metrics: dict[str, Any] = {}
        for metric in dict.fromkeys(order or ["no metric"]):
            filters = [filter_ for name, filter_ in values if name == metric]
            for filter_ in filters or ["none"]:
                value = finite(values.get((metric, filter_)))
                if value is not None or not metrics:
                    metrics[metric if filter_ == "none" else f"{metric} ({filter_})"] = {
                        "value": value,
                        "stderr": finite(values.get((f"{metric}_stderr", filter_))),
                        "higher_is_better": directions.get(metric) is not False,
                    }
        questions = results["n-samples"][task]["effective"]
        main = next(iter(metrics))
        tasks[task] = {"questions": int(questions), "main": main, "metrics": metrics}
    return tasks


def finite(value: object) -> float | None:
    """The value as a number that JSON can hold, or None: submissions and "N/A" are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        try:
            value = value.item()  # type: ignore[attr-defined] # a number of numpy's
        except (AttributeError, ValueError):
            return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


if __name__ == "__main__":
    main()
