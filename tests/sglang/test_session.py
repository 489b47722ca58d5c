"""A session with a policy prunes, or says why it does not: never silently."""

import json
import os
import subprocess
import sys

import pytest

from ep_backends.sglang import backend
from ep_core import demo
from ep_core.backend import Request
from ep_core.errors import EntropyPruneError, UnsupportedError
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

pytestmark = pytest.mark.filterwarnings("default")  # the engine's warnings are not ours to fix

POLICY = PruningPolicy.parse("layer=2,keep=0.25,method=set-entropy")
PICTURE = demo.PICTURES / "sample_00.png"


def open_session(policy=POLICY):
    return registry().backend("sglang").load().open(demo.MODEL, policy, dtype="float32")


def test_plugin_that_sglang_would_not_load_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    with pytest.raises(UnsupportedError, match="set SGLANG_PLUGINS=another,entropyprune"):
        open_session()


PROGRAM = """
from ep_backends.sglang import backend
from ep_core import demo
from ep_core.errors import UnsupportedError
from ep_core.ledger import PointStatus
from ep_core.policy import PruningPolicy

if __name__ == "__main__":  # SGLang's processes read this file too
    backend.check_entry_point = lambda: PointStatus("", "ok", "")
    try:
        backend.SGLangBackend().open(demo.MODEL, PruningPolicy.parse("layer=2,keep=0.25"))
    except UnsupportedError as error:
        print("refused:", error)
"""


def test_an_engine_that_runs_unpruned_is_refused_for_whatever_reason(tmp_path):
    """The scheduler itself must say that it prunes. In a process that never loaded the plugin."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"SGLANG_PLUGINS": "another", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert "refused: the engine runs without pruning" in done.stdout, done.stderr[-3000:]


def test_plugin_that_sglang_would_not_load_is_reported(monkeypatch):
    engine = registry().backend("sglang").load()
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    entry = engine.probe()[0]
    assert entry.state == "FAILED"
    assert "SGLANG_PLUGINS=another,entropyprune" in entry.detail
    monkeypatch.delenv("SGLANG_PLUGINS")
    assert engine.probe()[0].state == "ok"


def session(pruned=True):
    """A session without an engine."""
    made = object.__new__(backend.SGLangSession)
    made._pruned = pruned
    return made


def output(**meta):
    more = {
        "finish_reason": {"type": "length"},
        "prompt_tokens": 9,
        "output_token_logprobs": [],
        "cached_tokens": 0,
        "num_retractions": 0,
    }
    return {"output_ids": [], "text": "", "meta_info": more | meta}


@pytest.mark.parametrize("meta", [{}, {"entropyprune": []}, {"entropyprune": None}])
def test_an_answer_about_a_picture_that_says_nothing_of_pruning_is_an_error(meta):
    with pytest.raises(EntropyPruneError, match="did not say what was pruned"):
        session()._answer(Request((PICTURE, "what number?")), output(**meta))


def test_an_answer_about_text_has_nothing_to_say():
    answer = session()._answer(Request(("hello",)), output())
    assert answer.reason == "the prompt has no visual tokens"
    json.dumps({"reason": answer.reason})


def test_an_answer_of_an_engine_without_a_policy_has_nothing_to_say():
    answer = session(pruned=False)._answer(Request((PICTURE, "what number?")), output())
    assert answer.reason == "no policy is set"
