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
WHOLE = "layer=2,keep=9,min_tokens=144"  # leaves every bundled picture as it is
ASKED = QUESTIONS[:40]
REASON = "the budget keeps every token"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The command's output, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("out")
    done = entropyprune(
        *("eval", "--harness", "lmms-eval", "--model", demo.MODEL, "--tasks", "demo_pictures"),
        *("--policy", POLICY, "--policy", POOR, "--policy", WHOLE, "--limit", 40, "--out", out),
        *("--", "--include_path", EXAMPLE),
        HF_HOME=str(tmp_path_factory.mktemp("hf")),
    )
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.fixture(scope="module")
def counted():
    """Share of correct answers by policy, the engine asked directly."""
    return {
        policy: answers_without_harness(policy, ASKED) for policy in (None, POLICY, POOR, WHOLE)
    }


def test_the_examples_questions_are_the_bundled_ones():
    lines = map(json.loads, (EXAMPLE / "questions.jsonl").read_text().splitlines())
    assert [(line["image"], line["question"], line["answer"]) for line in lines] == [
        (picture.name, question, answer) for picture, question, answer in QUESTIONS
    ]


def test_every_accuracy_is_that_of_the_engine_asked_directly(evaluated, counted):
    table = json.loads((evaluated[1] / "results.json").read_text())["table"]
    expected = [share_correct(answers, ASKED) for answers in counted.values()]
    assert expected[2] < expected[0] / 2, "columns that are all alike would show nothing"
    (row,) = table
    assert (row["task"], row["metric"], row["questions"]) == ("demo_pictures", "exact_match", 40)
    assert row["values"] == pytest.approx(expected, abs=1e-12)
    assert row["kept"] == pytest.approx([share / expected[0] for share in expected], abs=1e-12)


def test_every_single_answer_is_that_of_the_engine_asked_directly(evaluated, counted):
    for run, (policy, expected) in enumerate(counted.items(), 1):
        assert logged_answers(evaluated[1] / str(run)) == expected, (
            f"answers under {policy or 'no policy'} differ"
        )


def test_the_printed_table_has_each_run_and_what_it_keeps(evaluated, counted):
    out = evaluated[0].stdout
    full, *pruned = (share_correct(answers, ASKED) for answers in counted.values())
    assert "the first 40 questions of each task" in out
    assert f"policy 1: {POLICY}\npolicy 2: {POOR}\npolicy 3: " in out
    (line,) = [line for line in out.splitlines() if "demo_pictures" in line]
    expected = ["40", f"{full:.4f}"]
    for share in pruned:
        expected += [f"{share:.4f}", f"{share / full:.1%}"]
    assert [cell.strip() for cell in line.split("│")[3:-1]] == expected, line


def test_progress_is_one_line_a_run_on_stderr(evaluated):
    lines = evaluated[0].stderr.splitlines()
    assert [line.rpartition(": 40 requests, ")[0] for line in lines[:3]] == [
        "1 of 4: unpruned",
        f"2 of 4: {POLICY}",
        f"3 of 4: {POOR}",
    ]
    assert len(lines) == 4


def test_results_say_what_was_run(evaluated):
    results = json.loads((evaluated[1] / "results.json").read_text())
    assert results["harness"] == "lmms-eval 0.7.3"
    assert set(results["versions"]) == {"transformers", "torch"}
    assert [run["requests"] for run in results["runs"]] == [40] * 4
    assert [run["unpruned"] for run in results["runs"]] == [
        {"no policy is set": 40},
        {},
        {},
        {REASON: 40},
    ]


def test_what_ran_unpruned_is_counted_with_its_reason_below_the_table(evaluated):
    out = evaluated[0].stdout
    name = f"{WHOLE.replace(',min', ',method=released,min')}"
    assert f"\n{name}: 40 of 40 requests ran unpruned: {REASON}\n" in out
    assert out.count("ran unpruned") == 1, "what was asked for, or pruned, is no news"


def test_a_refusal_in_the_harness_is_one_line(tmp_path):
    done = entropyprune(
        *("eval", "--model", demo.MODEL, "--tasks", "nowhere", "--policy", POLICY),
        HF_HOME=str(tmp_path),
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("entropyprune: error: unpruned: lmms-eval failed, give --out DIR")
    assert "Tasks not found: nowhere" in line
