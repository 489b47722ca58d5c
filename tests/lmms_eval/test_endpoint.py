"""A server that speaks OpenAI's protocol, asked by lmms-eval's own client over HTTP."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ep_backends.lmms_eval.__main__ import served_model
from ep_core import demo
from ep_core.backend import Request
from ep_core.errors import EntropyPruneError
from ep_core.plugins import registry
from ep_core.policy import PruningPolicy

from .common import (
    EXAMPLE,
    POLICY,
    QUESTIONS,
    answers_without_harness,
    entropyprune,
    evaluate_here,
    logged_answers,
    share_correct,
)


@contextmanager
def server(folder, policy=None, status=200):
    """The demonstration model behind HTTP on this machine; gives its address and what it saw."""
    seen = []
    one_at_a_time = threading.Lock()
    pruning = None if policy is None else PruningPolicy.parse(policy)
    with registry().backend("transformers").load().open(demo.MODEL, pruning) as session:

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                assert self.path == "/v1/models"
                self.reply({"object": "list", "data": [{"id": "demo", "object": "model"}]})

            def do_POST(self):
                assert self.path == "/v1/chat/completions"
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with one_at_a_time:
                    seen.append(asked)
                    content = [self.part(part) for part in asked["messages"][0]["content"]]
                    request = Request(tuple(content), asked["max_tokens"])
                    answer = session.generate([request])[0]
                message = {"role": "assistant", "content": answer.text}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.reply(
                    {"id": "1", "object": "chat.completion", "created": 1, "model": "demo"}
                    | {"choices": [choice]}
                )

            def part(self, part):
                if part["type"] == "text":
                    return part["text"]
                path = folder / f"{len(seen)}.png"
                path.write_bytes(base64.b64decode(part["image_url"]["url"].partition(",")[2]))
                return path

            def reply(self, value):
                body = json.dumps(value).encode()
                self.send_response(status if self.command == "POST" else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1", seen
        finally:
            http.shutdown()
            thread.join()
            http.server_close()


def test_a_pruning_server_is_measured_as_it_is(tmp_path):
    with server(tmp_path, POLICY) as (address, seen):
        done = entropyprune(
            *("eval", "--endpoint", address, "--tasks", "demo_pictures", "--limit", 16),
            *("--batch-size", 4, "--out", tmp_path / "out", "--", "--include_path", EXAMPLE),
            HF_HOME=str(tmp_path / "hf"),
        )
    assert done.returncode == 0, done.stderr
    expected = answers_without_harness(POLICY, QUESTIONS[:16])
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["table"]
    assert row["values"] == pytest.approx([share_correct(expected, QUESTIONS[:16])], abs=1e-12)
    (line,) = [line for line in done.stdout.splitlines() if "demo_pictures" in line]
    assert len(line.split("│")[1:-1]) == 4, f"one column of values, and nothing to compare: {line}"
    assert len(seen) == 16
    assert {(asked["model"], asked["max_tokens"], asked["temperature"]) for asked in seen} == {
        ("demo", 8, 0)
    }
    assert logged_answers(tmp_path / "out/1") == expected


@pytest.mark.filterwarnings("ignore")  # lmms-eval's own
def test_a_server_that_fails_is_an_error_and_no_wrong_answer(tmp_path, monkeypatch):
    """lmms-eval's client alone would score what failed as a wrong answer."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with (
        server(tmp_path, status=400) as (address, _),
        pytest.raises(EntropyPruneError, match=r"the server gave no answer: .* 400"),
    ):
        evaluate_here(tmp_path, "demo_pictures", endpoint=address, limit=2)


def test_no_server_is_one_line(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(EntropyPruneError) as refused:
        served_model("http://127.0.0.1:9/v1")
    assert "http://127.0.0.1:9/v1/models names no model" in str(refused.value)
    assert "as in http://127.0.0.1:30000/v1" in str(refused.value)
