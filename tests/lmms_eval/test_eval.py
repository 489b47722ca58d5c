"""`entropyprune eval` as a user runs it, on the example's task, counted again without lmms-eval."""

import json

import pytest

from ep_core import demo

from .common import (
    EXAMPLE,
    POLICY,
    QUESTIONS,
    answers_without_harness,
    entropyprune,
    logged_answers,
    share_correct,
)

POOR = "layer=2,keep=0.25,method=released"  # loses most of this model's answers


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The command's output, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("out")
    done = entropyprune(
        *("eval", "--harness", "lmms-eval", "--model", demo.MODEL, "--tasks", "demo_pictures"),
        *("--policy", POLICY, "--policy", POOR, "--out", out, "--", "--include_path", EXAMPLE),
        HF_HOME=str(tmp_path_factory.mktemp("hf")),
    )
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.fixture(scope="module")
def counted():
    """Share of correct answers by policy, the engine asked directly."""
    return {policy: answers_without_harness(policy) for policy in (None, POLICY, POOR)}


def test_the_examples_questions_are_the_bundled_ones():
    lines = map(json.loads, (EXAMPLE / "questions.jsonl").read_text().splitlines())
    assert [(line["image"], line["question"], line["answer"]) for line in lines] == [
        (picture.name, question, answer) for picture, question, answer in QUESTIONS
    ]


def test_every_accuracy_is_that_of_the_engine_asked_directly(evaluated, counted):
    table = json.loads((evaluated[1] / "results.json").read_text())["table"]
    expected = [share_correct(answers) for answers in counted.values()]
    assert expected[2] < expected[0] / 2, "columns that are all alike would show nothing"
    (row,) = table
    assert (row["task"], row["metric"], row["questions"]) == ("demo_pictures", "exact_match", 94)
    assert row["values"] == pytest.approx(expected, abs=1e-12)
    assert row["kept"] == pytest.approx([share / expected[0] for share in expected], abs=1e-12)


def test_every_single_answer_is_that_of_the_engine_asked_directly(evaluated, counted):
    for run, (policy, expected) in enumerate(counted.items(), 1):
        assert logged_answers(evaluated[1] / str(run)) == expected, (
            f"answers under {policy or 'no policy'} differ"
        )


def test_the_printed_table_has_each_run_and_what_it_keeps(evaluated, counted):
    out = evaluated[0].stdout
    full, good, poor = (share_correct(answers) for answers in counted.values())
    assert f"policy 1: {POLICY}\npolicy 2: {POOR}\n" in out
    (line,) = [line for line in out.splitlines() if "demo_pictures" in line]
    expected = ["94", f"{full:.4f}"]
    for share in (good, poor):
        expected += [f"{share:.4f}", f"{share / full:.1%}"]
    assert [cell.strip() for cell in line.split("│")[3:-1]] == expected, line
    assert "ran unpruned" not in out, "each request was pruned"


def test_progress_is_one_line_a_run_on_stderr(evaluated):
    lines = evaluated[0].stderr.splitlines()
    assert [line.rpartition(": 94 requests, ")[0] for line in lines] == [
        "1 of 3: unpruned",
        f"2 of 3: {POLICY}",
        f"3 of 3: {POOR}",
    ]


def test_results_say_what_was_run(evaluated):
    results = json.loads((evaluated[1] / "results.json").read_text())
    assert results["harness"] == "lmms-eval 0.7.3"
    assert set(results["versions"]) == {"transformers", "torch"}
    assert [run["requests"] for run in results["runs"]] == [94] * 3
    assert [run["unpruned"] for run in results["runs"]] == [{"no policy is set": 94}, {}, {}]


def test_requests_that_ran_unpruned_are_counted_with_their_reason(tmp_path):
    """Of the first 40 questions in batches of 8 every picture is too small for the policy."""
    done = entropyprune(
        *("eval", "--model", demo.MODEL, "--tasks", "demo_pictures", "--limit", 40),
        *("--batch-size", 8, "--policy", "layer=2,keep=9,min_tokens=144"),
        *("--", "--include_path", EXAMPLE),
        HF_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "the first 40 questions of each task" in done.stdout
    assert "layer=2,keep=9,method=released,min_tokens=144: 40 of 40 requests ran unpruned: " in (
        done.stdout
    )
    full = share_correct(answers_without_harness(None, QUESTIONS[:40]), QUESTIONS[:40])
    assert done.stdout.count(f"{full:.4f}") == 2, done.stdout
    assert "100.0%" in done.stdout


def test_an_error_of_the_engine_is_one_line_that_names_the_question(tmp_path):
    done = entropyprune(
        *("eval", "--model", demo.MODEL, "--tasks", "demo_pictures", "--limit", 1),
        *("--policy", "layer=2,keep=999", "--", "--include_path", EXAMPLE),
        HF_HOME=str(tmp_path),
    )
    first, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert first.startswith("1 of 2: unpruned: 1 requests")
    assert line.startswith("entropyprune: error: layer=2,keep=999,method=released: keep=999")
    assert line.endswith("(question demo_pictures 0)")
