"""The suite's command line: what it records, expects to fail, compares and shows."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import ep_conformance.__main__ as suite
from ep_backends.transformers.backend import TransformersBackend
from ep_conformance.recording import Recording

ON_THE_CPU = ("--backend", "transformers", "--device", "cpu")
SELECTION = "test_selection.py::test_kept_indices"
ENGINE = "test_engine.py::test_engine_matches_oracle"
TIES, CLOSE = f"{SELECTION}[identical-patches-rows]", f"{SELECTION}[close-calls-rows]"
SETS = f"{ENGINE}[qwen-gqa-1pictures-layer=2,keep=0.3,method=released]"


def record(path, *choice):
    status = suite.main([*ON_THE_CPU, "--record", str(path), *choice])
    return status, Recording.read(path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A recording of a test of each level."""
    path = tmp_path_factory.mktemp("recordings") / "a.json"
    tests = (CLOSE, SETS, "test_serving.py::test_who_leaves_takes_nothing_along")
    status, recording = record(path, *(word for test in tests for word in ("--test", test)))
    assert status == 0
    return path, recording


def other(recording, path, test, **changes):
    """Write the recording of another engine, in which the answers to one test are changed."""
    outcome = recording.outcomes[test]
    answers = [json.loads(json.dumps(answer)) for answer in outcome.answers]
    for key, change in changes.items():
        answers[0][key] = change(answers[0][key])
    outcomes = recording.outcomes | {test: replace(outcome, answers=answers)}
    conditions = replace(recording.conditions, backend="other", versions={"other": "2"})
    Recording(conditions, outcomes).write(path)
    return path


def test_a_recording_holds_what_a_comparison_needs(recorded):
    _, recording = recorded
    under = recording.conditions
    assert (under.backend, under.device, under.attention) == ("transformers", "cpu", "sdpa")
    assert under.versions.keys() >= {"transformers", "torch", "entropyprune", "python"}
    answer = recording.outcomes[SETS].answers[0]
    (span,), (scores,) = answer["spans"], answer["scores"]
    assert len(scores) == span["stop"] - span["start"] > len(span["kept"])
    assert len(answer["output_ids"]) == 6
    skipped = recording.outcomes["test_serving.py::test_who_leaves_takes_nothing_along"]
    assert (skipped.outcome, skipped.reason) == ("skipped", "no capability 'abort'")


def test_skips_and_conditions_are_told(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("ENTROPYPRUNE_BLOCK", "")
    record(tmp_path / "a.json", "--test", "test_serving.py::test_chunked_as_whole")
    out = capfd.readouterr().out
    assert "environment: ENTROPYPRUNE_BLOCK=" in out
    assert "attention: sdpa, dtype: float32" in out
    assert "no capability 'chunked_prefill'\n  test_serving.py::test_chunked_as_whole" in out


@pytest.mark.parametrize(
    ("there", "claimed", "device"),
    [(True, True, "cuda"), (True, False, "cpu"), (False, True, "cpu")],
)
def test_the_device_is_cuda_where_there_is_one(there, claimed, device, monkeypatch, tmp_path):
    able = replace(TransformersBackend.capabilities, cuda=claimed)
    monkeypatch.setattr(TransformersBackend, "capabilities", able)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    path = tmp_path / "a.json"
    skipped = "test_serving.py::test_chunked_as_whole"
    suite.main(["--backend", "transformers", "--record", str(path), "--test", skipped])
    assert Recording.read(path).conditions.device == device


def test_equal_recordings_do_not_differ(recorded, tmp_path, capsys):
    path, recording = recorded
    same = other(recording, tmp_path / "b.json", SETS)
    assert suite.main(["compare", str(path), str(same)]) == 0
    assert "2 tests compared between engines, 0 differences, 0 failures" in capsys.readouterr().out


def test_a_difference_is_told_to_the_token(recorded, tmp_path, capsys):
    path, recording = recorded
    span, scores = (recording.outcomes[CLOSE].answers[0][key][0] for key in ("spans", "scores"))
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])
    last, first_out = ranked[len(span["kept"]) - 1], ranked[len(span["kept"])]

    def swapped(spans):
        kept = sorted({*spans[0]["kept"], first_out} - {last})
        return [spans[0] | {"kept": kept}]

    changed = other(recording, tmp_path / "b.json", CLOSE, spans=swapped)
    assert suite.main(["compare", str(path), str(changed)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(CLOSE)]
    assert len(lines) == 2
    miss = f"{scores[last] - scores[first_out]:.1e} from the threshold"
    (line,) = [line for line in lines if f"token {first_out} " in line]
    assert line.startswith(f"{CLOSE}, request 0, picture 0 [0, 192): token {first_out} is kept by")
    assert "other 2, CPU only" in line
    assert line.endswith(miss)


def test_another_answer_from_the_same_tokens_is_told(recorded, tmp_path, capsys):
    path, recording = recorded
    changed = other(recording, tmp_path / "b.json", SETS, output_ids=lambda ids: ids[::-1])
    suite.main(["compare", str(path), str(changed)])
    assert "the same tokens are kept, but the answers are" in capsys.readouterr().out


def test_a_failure_in_a_recording_fails_the_comparison(recorded, tmp_path, capsys):
    _, recording = recorded
    failed = replace(recording.outcomes[SETS], outcome="failed")
    Recording(recording.conditions, {SETS: failed}).write(tmp_path / "b.json")
    assert suite.main(["compare", str(tmp_path / "b.json")]) == 1
    assert f"{SETS}: transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "is no recording of format 1"), (None, "was recorded twice")]
)
def test_what_cannot_be_compared_is_refused(content, message, recorded, tmp_path, capsys):
    path, _ = recorded
    second = tmp_path / "b.json"
    second.write_text(content or path.read_text())
    with pytest.raises(SystemExit):
        suite.main(["compare", str(path), str(second)])
    assert message in capsys.readouterr().err


def test_the_matrix_is_written_between_its_marks(recorded, tmp_path):
    path, _ = recorded
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- support matrix: make conformance -->\nold\n" + suite.MARKS[1])
    suite.main(["compare", str(path), "--update", str(page)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert "old" not in text
    assert "| aborts lose nothing | - (1) |" in text
    assert "1. no capability 'abort'" in text


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        (f"{TIES}  it is broken", 1, "is expected to fail, but it was reported as passed"),
        (f"{SELECTION}[nonsense]  it is broken", 1, "there is no such test"),
        (TIES, 4, "has no reason; an example is"),
        (f"{TIES} a\n{TIES} b", 4, "is there twice"),
        (f"# no failures\n\n{ENGINE}[of another level]  it is broken", 0, "59 passed"),
    ],
)
def test_expected_failures_do_not_go_stale(line, status, message, tmp_path, capfd):
    path = tmp_path / "failures.txt"
    path.write_text(line)
    choice = ["--level", "1", "--expected-failures", str(path)]
    assert suite.main([*ON_THE_CPU, *choice]) == status
    captured = capfd.readouterr()
    assert message in captured.out + captured.err


def test_without_pytest_it_says_what_to_install():
    code = """
import runpy, sys
sys.modules["pytest"] = None
runpy.run_module("ep_conformance", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "ep_conformance: error: the suite needs pytest; "
        "run pip install 'entropyprune[conformance]'\n"
    )
