"""Tasks of every kind: what becomes of a question, and what is refused, all in this process."""

import json
import sys

import pytest

from ep_backends.lmms_eval.__main__ import measured
from ep_core import demo
from ep_core.backend import Request
from ep_core.errors import EntropyPruneError
from ep_core.plugins import registry

from .common import POLICY, QUESTIONS, answers_without_harness, evaluate_here, logged_answers

pytestmark = pytest.mark.filterwarnings("ignore")  # lmms-eval's own

TASK = """
task: demo_pictures
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
from PIL import Image
from ep_core import demo

def picture(doc):
    return Image.open(demo.PICTURES / doc["image"]).convert("RGB")

def visual(doc):
    return [picture(doc)] if doc["image"] else []

def messages(doc):
    text = lambda words: {"type": "text", "text": words}
    content = [text("look:"), {"type": "image", "url": picture(doc)}, text(doc["question"])]
    return [{"role": "user", "content": content}]

def system(doc):
    content = [{"type": "text", "text": "answer briefly"}]
    return [{"role": "system", "content": content}, *messages(doc)]

def video(doc):
    return ["clip.mp4"]

def audio(doc):
    return [{"type": "audio", "url": "clip.wav"}]
"""
FIRST = QUESTIONS[:2]


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluate TASK with more lines of YAML on some questions; gives facts and answers."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "argv", sys.argv)  # lmms-eval's parser reads it

    def run(yaml: str, questions=FIRST, **settings):
        tasks = tmp_path / "tasks"
        tasks.mkdir()
        (tasks / "task.yaml").write_text(TASK + yaml)
        (tasks / "utils.py").write_text(UTILS)
        with (tasks / "questions.jsonl").open("w") as file:
            for picture, question, answer in questions:
                name = picture.name if picture else ""
                line = {"image": name, "question": question, "answer": answer}
                file.write(json.dumps(line) + "\n")
        measured, counts = evaluate_here(tmp_path, "demo_pictures", tasks, **settings)
        return counts | measured, logged_answers(tmp_path)

    return run


VISUAL = "doc_to_visual: !function utils.visual\n"


def test_a_question_without_a_picture_is_counted_as_unpruned(evaluate):
    policy = {"layer": 2, "keep": 0.25, "method": "set-entropy"}
    questions = [*FIRST, (None, "hello", "hello")]
    counts, answers = evaluate(VISUAL, questions, policy=policy)
    assert counts["requests"] == 3
    assert counts["unpruned"] == {"the prompt has no visual tokens": 1}
    assert answers[:2] == answers_without_harness(POLICY, FIRST)


def test_batches_answer_every_question_in_its_place(evaluate):
    questions = QUESTIONS[:11]
    counts, answers = evaluate(VISUAL, questions, batch_size=4)
    assert counts["requests"] == 11
    assert answers == answers_without_harness(None, questions)


def test_text_and_pictures_keep_their_order(evaluate):
    _, answers = evaluate("doc_to_messages: !function utils.messages\n")
    with registry().backend("transformers").load().open(demo.MODEL, None) as session:
        expected = [
            session.generate([Request(("look:", picture, question), 8)])[0].text
            for picture, question, _ in FIRST
        ]
    assert answers == expected


def test_until_cuts_the_answer(evaluate):
    whole = answers_without_harness(None, FIRST)
    cut = whole[0][2]
    _, answers = evaluate(VISUAL + f"generation_kwargs: {{max_new_tokens: 8, until: ['{cut}']}}\n")
    assert answers == [said.split(cut)[0] for said in whole]
    assert answers != whole


def test_sampling_is_answered_greedily_and_said(evaluate):
    more = "generation_kwargs: {max_new_tokens: 8, do_sample: true, temperature: 0.7}\n"
    counts, answers = evaluate(VISUAL + more)
    assert answers == answers_without_harness(None, FIRST)
    assert counts["notes"] == [
        "task demo_pictures asks for do_sample=True, temperature=0.7; answered greedily"
    ]


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        (
            "output_type: multiple_choice\ndoc_to_choice: ['a', 'b']\n" + VISUAL,
            "a task compares log-likelihoods",
        ),
        (
            "output_type: generate_until_multi_round\n" + VISUAL,
            "task demo_pictures has several rounds",
        ),
        ("doc_to_visual: !function utils.video\n", "task demo_pictures asks about video"),
        ("doc_to_visual: !function utils.audio\n", "task demo_pictures asks about audio"),
        (
            "doc_to_messages: !function utils.system\n",
            "task demo_pictures has messages of system, user",
        ),
    ],
    ids=["log-likelihood", "several rounds", "video", "audio", "a system message"],
)
def test_other_tasks_are_refused_with_what_is_possible(evaluate, yaml, words):
    with pytest.raises(EntropyPruneError) as refused:
        evaluate(yaml)
    assert str(refused.value) == (
        f"{words}; possible are tasks that ask one question about pictures and take the text of "
        "the answer, as in --tasks gqa,mme,pope"
    )


def test_an_engines_error_names_the_question(evaluate):
    with pytest.raises(EntropyPruneError, match=r"^keep=999.*\(question demo_pictures 0\)$"):
        evaluate(VISUAL, policy={"layer": 2, "keep": 999})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no_such_thing"], "unrecognized arguments: --no_such_thing"),
        (["--offset", "x"], "argument --offset: invalid int value: 'x'"),
        (["--batch_size", "4"], "after --: --batch_size is not allowed; use --batch-size"),
        (["--use_cache", "x"], "an answer from a cache is not known to be pruned"),
    ],
)
def test_arguments_of_the_harness_are_checked(evaluate, arguments, words):
    with pytest.raises(EntropyPruneError, match=words):
        evaluate(VISUAL, arguments=arguments)


@pytest.mark.parametrize("name", ["a,b", "a[b", "it's"])
def test_a_folder_that_lmms_eval_cannot_name_is_refused(evaluate, tmp_path, name):
    (tmp_path / name).symlink_to(demo.MODEL)
    with pytest.raises(EntropyPruneError, match="rename the folder or link to it"):
        evaluate(VISUAL, model=str(tmp_path / name))


def test_lmms_eval_finds_the_models_through_their_entry_point():
    from lmms_eval.models import get_model, list_available_models

    from ep_backends.lmms_eval.model import BackendModel, EndpointModel

    assert get_model("entropyprune") is BackendModel
    assert get_model("entropyprune_endpoint") is EndpointModel
    assert {"entropyprune", "entropyprune_endpoint"} <= set(list_available_models())


def of_one_task(values, config, directions=None):
    """What becomes of lmms-eval's results of one task."""
    results = {
        "results": {"t": {"alias": "t", **values}},
        "configs": {"t": config},
        "higher_is_better": {"t": directions or {}},
        "n-samples": {"t": {"effective": 7}},
    }
    return measured(results)["t"]


@pytest.mark.parametrize("first", [{}, {"judge,none": float("nan")}, {"judge,none": "N/A"}])
def test_the_metric_listed_first_stays_the_main_one_without_a_value(first):
    listed = {"metric_list": [{"metric": "judge"}, {"metric": "match"}, {"metric": "submission"}]}
    task = of_one_task({"match,none": 0.5, "submission,none": None, **first}, listed)
    values = {metric: facts["value"] for metric, facts in task["metrics"].items()}
    assert task["main"] == "judge", "another metric took the first one's place"
    assert values == {"judge": None, "match": 0.5}


def test_without_a_list_of_metrics_the_results_keep_their_order():
    values = {"b,none": 1.0, "b_stderr,none": 0.1, "b_stderr_clt,none": 0.1, "a,strict": 2.0}
    task = of_one_task(values, {})
    assert (task["main"], list(task["metrics"])) == ("b", ["b", "a (strict)"])
    assert of_one_task({}, {})["metrics"]["no metric"]["value"] is None, "the task vanished"


def test_lmms_eval_says_where_lower_is_better(evaluate):
    judged = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: false}]\n"
    facts, _ = evaluate(VISUAL + judged)
    (metric,) = facts["tasks"]["demo_pictures"]["metrics"].values()
    assert metric["higher_is_better"] is False, "its direction was lost on the way"
    unsaid = of_one_task({"a,none": 1.0, "b,none": 1.0}, {}, {"a": None})["metrics"].values()
    assert [each["higher_is_better"] for each in unsaid] == [True, True]
