"""`entropyprune eval` around the harness; this environment lacks lmms-eval, and needs none here."""

import json
import os
import sys

import pytest

from entropyprune.cli import eval as cli_eval
from entropyprune.cli import eval_table, main
from ep_core import demo

MODEL = ["--model", demo.MODEL]
POLICY = ["--policy", "layer=2,keep=36"]
TASKS = ["--tasks", "gqa"]
SERVER = ["--endpoint", "http://127.0.0.1:30000/v1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (TASKS, ["either --model DIR or --endpoint URL", "http://127.0.0.1:30000/v1"]),
        ([*TASKS, *MODEL, *SERVER], ["either --model DIR or --endpoint URL"]),
        ([*MODEL, *POLICY], ["--tasks"]),
        ([*MODEL, *TASKS], ["no policy", "layer=2,keep=128", "ENTROPYPRUNE"]),
        ([*TASKS, *SERVER, *POLICY], ["--policy", "started with its model and its policy"]),
        ([*TASKS, *SERVER, "--backend", "sglang"], ["--backend does not go with --endpoint"]),
        ([*TASKS, *SERVER, "--device", "cuda"], ["--device does not go with --endpoint"]),
        ([*TASKS, *SERVER, "--dtype", "float16"], ["--dtype does not go with --endpoint"]),
        ([*MODEL, *TASKS, *POLICY, *POLICY], ["layer=2,keep=36", "given twice"]),
        ([*MODEL, *POLICY, "--tasks", "gqa,,mme"], ["'gqa,,mme'", "as in gqa,mme,pope"]),
        ([*MODEL, *POLICY, "--tasks", "gqa,gqa"], ["'gqa,gqa'", "different"]),
        ([*MODEL, *TASKS, "--policy", "layer=8,keep=9"], ["layer=8", "1 to 7"]),
        ([*MODEL, *TASKS, "--policy", "layer=2,keep=9,method=x"], ["'x'", "set-entropy"]),
        ([*MODEL, *TASKS, *POLICY, "--backend", "nowhere"], ["'nowhere'", "transformers"]),
        ([*MODEL, *TASKS, *POLICY, "--harness", "own"], ["own", "lmms-eval"]),
        ([*MODEL, *TASKS, *POLICY, "--limit", 0], ["--limit"]),
        ([*MODEL, *TASKS, *POLICY, "--polcy"], ["--polcy"]),
        ([*MODEL, *TASKS, *POLICY], ["lmms-eval is missing", "pip install 'entropyprune[eval]'"]),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(demo.MODEL), "DIR"),
)
def test_eval_refuses_in_one_line(monkeypatch, capsys, arguments, words):
    monkeypatch.delenv("ENTROPYPRUNE", raising=False)
    monkeypatch.setattr(sys, "argv", ["entropyprune", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("entropyprune: error: ")
    for word in words:
        assert word in line


HARNESS = """
import json, pathlib, sys
settings = json.loads(sys.argv[1])
results = pathlib.Path(settings["out"]).with_name("results.json")
before = len(json.loads(results.read_text())["runs"]) if results.exists() else 0
if (settings["policy"] or {}).get("layer") == 3:
    print(json.dumps({"error": "out of memory"}))
    sys.exit(1)
metrics = {"exact_match": {"value": 0.5, "stderr": None, "higher_is_better": True}}
task = {"questions": 7, "main": "exact_match", "metrics": metrics}
notes = [f"{before} runs were written before"]
counts = {"requests": 7, "unpruned": {}, "notes": notes}
print(json.dumps({"run": {"tasks": {"gqa": task}, "harness_version": "0", **counts}}))
"""


def test_a_failing_run_leaves_the_finished_ones_printed_and_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake_harness.py").write_text(HARNESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(cli_eval.HARNESSES, "lmms-eval", "fake_harness")
    failing = ["--policy", "layer=3,keep=36", "--out", tmp_path / "out"]
    arguments = map(str, [*MODEL, *TASKS, *POLICY, *failing])
    monkeypatch.setattr(sys, "argv", ["entropyprune", "eval", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert exit_.value.code == 2, err
    assert last.startswith("entropyprune: error: layer=3"), last
    assert last.endswith("out of memory"), last
    (line,) = [line for line in out.splitlines() if "exact_match" in line]
    cells = [cell.strip() for cell in line.split("│")[3:-1]]
    assert cells == ["7", "0.5000", "0.5000", "100.0%"], f"not the two finished columns: {out}"
    assert ": 1 runs were written before" in out, f"the first run was not written at once: {out}"
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [run["name"].split(",")[0] for run in results["runs"]] == ["unpruned", "layer=2"]
    left = sorted(path.name for path in (tmp_path / "out").glob("results*"))
    assert left == ["results.json"], "a temporary file is left"


def shown(capsys, wer=None, **values):
    """What is printed of tasks with these values, unpruned and pruned."""

    def tasks(i):
        return {
            task: {
                "questions": 7,
                "main": "wer" if task == wer else "score",
                "metrics": {
                    "wer" if task == wer else "score": {
                        "value": pair[i],
                        "stderr": None,
                        "higher_is_better": task != wer,
                    }
                },
            }
            for task, pair in values.items()
        }

    facts = {"requests": 7, "unpruned": {}, "notes": []}
    runs = [eval_table.Run(name, 1.0, {"tasks": tasks(i), **facts}) for i, name in enumerate("ab")]
    eval_table.show(runs, None, None)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return {row[0]: row[3:] for row in cells}, [line for line in lines if "so there is" in line]


def test_the_mean_is_that_of_what_every_task_keeps(capsys):
    rows, remarks = shown(capsys, gqa=(0.5, 0.25), pope=(0.8, 0.8))
    assert rows["mean of the tasks"] == ["", "", "75.0%"]
    assert remarks == []


def test_a_task_without_a_value_is_shown_and_there_is_no_mean(capsys):
    rows, remarks = shown(capsys, gqa=(0.5, 0.25), vqa=(None, None), pope=(0.8, None))
    assert rows["vqa"] == ["-", "-", "-"], "the task has no row with dashes"
    assert rows["pope"] == ["0.8000", "-", "-"]
    assert "mean of the tasks" not in rows, "a mean over other tasks than those asked for"
    assert remarks == [
        "vqa (score), pope (score): no value of the first metric, so there is no mean of the tasks"
    ]


def test_nothing_is_kept_of_a_metric_where_lower_is_better(capsys):
    rows, remarks = shown(capsys, wer="speech", gqa=(0.5, 0.25), speech=(0.2, 0.4))
    assert rows["speech"] == ["0.2000", "0.4000", "-"], "twice the errors are no 200% kept"
    assert "mean of the tasks" not in rows, "a mean with a metric where lower is better"
    assert remarks == [
        "speech (wer): lower is better in the first metric, so there is no mean of the tasks"
    ]
