"""`entropyprune eval` where it refuses; this environment lacks lmms-eval, and needs none here."""

import sys

import pytest

from ep_core import cli, demo

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
        cli.main()
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("entropyprune: error: ")
    for word in words:
        assert word in line
