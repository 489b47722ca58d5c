"""The real server over HTTP, started as the documentation says."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from ep_backends.shared.pictures import read_picture
from ep_core import demo

from ..servers import counters, post  # noqa: TID252 # tests are no installed package

SAMPLES = json.loads((demo.PICTURES / "samples.json").read_text())
START_SECONDS = 900  # a bound, not an expectation


@contextmanager
def serve(folder, *arguments, policy):
    """`entropyprune serve sglang`, until the block ends; gives the address and the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [
        *(sys.executable, "-m", "entropyprune", "serve", "sglang", "--policy", policy, "--"),
        *("--model-path", str(demo.MODEL), "--device", "cpu", "--dtype", "float32"),
        *("--mm-attention-backend", "sdpa", "--sampling-backend", "pytorch"),
        *("--grammar-backend", "none", "--disable-cuda-graph", "--max-total-tokens", "8192"),
        *("--context-length", "2048", "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-metrics", *arguments),
    ]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server, log)
        yield address, log
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its own session: nothing else is in that group
        server.wait(30)


def wait_for(address, server, log):
    end = time.monotonic() + START_SECONDS
    while "ready to roll" not in log.read_text():
        if server.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)


def picture_url(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(address, picture, question, **more):
    """One OpenAI chat request about a picture."""
    content = [
        {"type": "image_url", "image_url": {"url": picture_url(picture)}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": "demo",
        "temperature": 0,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": content}],
    }
    return post(f"{address}/v1/chat/completions", body | more)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # 100 of the 144 tokens of a demonstration picture; pictures of 64 tokens are too small for it
    with serve(folder, policy="layer=2,keep=100,method=set-entropy") as (address, log):
        yield address, log


def test_answers_of_a_pruned_server(server):
    address, _ = server
    asked = right = 0
    for sample in SAMPLES[:4]:
        picture = read_picture(demo.PICTURES / sample["image"])
        for question in sample["questions"]:
            status, answer = ask(address, picture, question["question"])
            assert status == 200, answer
            asked += 1
            right += answer["choices"][0]["message"]["content"].strip() == question["answer"]
    assert right >= 0.8 * asked, f"{right} of {asked} answers are right"


def test_counters_say_what_was_kept(server):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    before = counters(address)
    ask(address, picture, "what number is written?")
    ask(address, picture, "what number is written?", custom_params={"entropyprune": {"keep": 16}})
    ask(address, picture, "what number is written?", custom_params={"entropyprune": "off"})
    after = counters(address)

    def change(name, reason=""):
        return after.get((name, reason), 0) - before.get((name, reason), 0)

    assert change("visual_tokens_seen_total") == 3 * 144
    assert change("visual_tokens_kept_total") == 100 + 16 + 144
    assert change("requests_pruned_total") == 2
    assert change("requests_unpruned_total", "switched off by the request") == 1


def test_picture_too_small_for_the_servers_budget_stays_whole(server):
    address, _ = server
    small = read_picture(demo.PICTURES / SAMPLES[0]["image"]).resize((224, 224))
    before = counters(address)
    status, answer = ask(address, small, "what number is written?")
    assert status == 200, answer
    reason = ("requests_unpruned_total", "the server's budget does not fit the picture")
    assert counters(address)[reason] == before.get(reason, 0) + 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keep": 1.6}, "keep=1.6 is outside"),
        ({"keep": 145}, "keep=145 asks for more than"),
        ({"layer": 1}, "a request cannot set 'layer', only keep, average"),
        ({"flops": 0.5}, "a request cannot set 'flops'"),
        ({"details": True}, "a request cannot set 'details'"),
        ({"keep": 5, "details": True}, "a request cannot set 'details'"),
        ({"keep": 1}, "keep=1 is one token to some JSON writers"),
        ({"average": 1}, "average=1 is one token to some JSON writers"),
        ("of", "entropyprune='of' cannot be read"),
    ],
)
def test_request_that_asks_for_nonsense_fails_alone(server, asked, message):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    question = "what number is written?"
    status, answer = ask(address, picture, question, custom_params={"entropyprune": asked})
    assert status == 400
    assert message in answer["message"]
    status, answer = ask(address, picture, question)
    assert status == 200, "the server did not survive a bad request"


def test_native_endpoint_says_what_was_kept(server):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    sampling = {"temperature": 0, "max_new_tokens": 4}
    body = {"text": PROMPT, "image_data": picture_url(picture), "sampling_params": sampling}
    _, answer = post(f"{address}/generate", body)
    assert answer["meta_info"]["entropyprune"] == [{"visual_tokens": 144, "kept": 100}]
    sampling["custom_params"] = {"entropyprune": {"keep": 7}}
    _, answer = post(f"{address}/generate", body)
    assert answer["meta_info"]["entropyprune"] == [{"visual_tokens": 144, "kept": 7}]
    sampling["custom_params"] = {"entropyprune": {"keep": 1.0}}  # as JSON writes it: every token
    _, answer = post(f"{address}/generate", body)
    assert answer["meta_info"]["entropyprune"] == [
        {"visual_tokens": 144, "kept": 144, "reason": "the budget keeps every token"}
    ]


def test_chat_endpoint_says_what_was_kept_where_it_is_asked(server):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    _, answer = ask(address, picture, "what number is written?", return_meta_info=True)
    meta = answer["choices"][0]["meta_info"]
    assert meta["entropyprune"] == [{"visual_tokens": 144, "kept": 100}]


@pytest.mark.parametrize("answers", [1, 3])
def test_one_picture_of_one_request_is_counted_once(server, answers):
    """SGLang sends n + 1 requests for n answers."""
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    before = counters(address)
    status, answer = ask(address, picture, "what number is written?", n=answers, temperature=1)
    assert status == 200, answer
    assert len(answer["choices"]) == answers
    after = counters(address)
    assert {name: after[name] - before.get(name, 0) for name in after if "total" in name[0]} == {
        name: {"visual_tokens_seen_total": 144, "visual_tokens_kept_total": 100}.get(
            name[0], float(name[0] == "requests_pruned_total")
        )
        for name in after
    }


PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what number is written?"
    "<|im_end|>\n<|im_start|>assistant\n"
)
OFF = {"entropyprune": "off"}


def bodies(url):
    """Of each endpoint that takes a picture, a request with one that asks not to be pruned."""
    data = url.split(",")[1]
    sampling = {"temperature": 0, "max_new_tokens": 4, "custom_params": OFF}
    short = {"model": "demo", "max_tokens": 4, "custom_params": OFF}
    image = {"type": "image_url", "image_url": {"url": url}}
    source = {"type": "base64", "media_type": "image/png", "data": data}
    text = {"type": "text", "text": "what number is written?"}

    def message(*content):
        return [{"role": "user", "content": list(content)}]

    ollama = {"model": "demo", "stream": False, "options": {"num_predict": 4} | OFF}
    return {
        "/generate": {"text": PROMPT, "image_data": url, "sampling_params": sampling},
        "/vertex_generate": {
            "instances": [{"text": PROMPT, "image_data": url}],
            "parameters": {"sampling_params": sampling},
        },
        "/v1/chat/completions": short | {"messages": message(image, text)},
        "/invocations": short | {"messages": message(image, text)},
        "/v1/messages": short | {"messages": message({"type": "image", "source": source}, text)},
        "/v1/responses": {
            "model": str(demo.MODEL),
            "max_output_tokens": 4,
            "store": False,
            "custom_params": OFF,
            "input": message(
                {"type": "input_image", "image_url": url},
                {"type": "input_text", "text": "what number is written?"},
            ),
        },
        "/v1/systemone": {
            "model": "default",
            "state": "look",
            "images": [{"url": url}],
            "questions": {"star": {"type": "noul", "instructions": "is there a red star?"}},
            "custom_params": OFF,
        },
        "/v1/decisions": {
            "input": "look",
            "images": [{"url": url}],
            "questions": [{"id": "star", "type": "yes_no", "question": "is there a red star?"}],
            "custom_params": OFF,
        },
        "/v1/completions": short | {"prompt": PROMPT, "image_data": url},
        "/v1/score": {
            "model": "demo",
            "query": "a",
            "items": ["b"],
            "label_token_ids": [3],
            "image_data": url,
        },
        "/api/chat": ollama
        | {"messages": [{"role": "user", "content": "what number?", "images": [data]}]},
        "/api/generate": ollama | {"prompt": "what number?", "images": [data]},
        "/encode": {"text": PROMPT, "image_data": url},
        "/classify": {"text": PROMPT, "image_data": url},
        "/v1/embeddings": {"model": "demo", "input": [{"text": "a", "image": url}]},
    }


# what becomes of a request's wish not to be pruned: docs/sglang.md has the same table
REACHES = {
    "read": ["/generate", "/vertex_generate", "/v1/chat/completions", "/invocations"],
    "ignored": ["/v1/messages", "/v1/responses", "/v1/systemone"],
    "refused": ["/v1/decisions"],
    "no picture": ["/v1/completions", "/v1/score", "/api/chat", "/api/generate"],
    "not served": ["/encode", "/classify", "/v1/embeddings"],
}


@pytest.mark.parametrize(
    ("path", "outcome"), [(path, outcome) for outcome, paths in REACHES.items() for path in paths]
)
def test_what_becomes_of_a_requests_own_budget(server, path, outcome):
    address, _ = server
    url = picture_url(read_picture(demo.PICTURES / SAMPLES[1]["image"]))
    before = counters(address)
    status, answer = post(address + path, bodies(url)[path])
    assert status == (400 if outcome in ("refused", "not served") else 200), answer
    after = counters(address)
    changed = {name: after[name] - before.get(name, 0) for name in after}
    assert changed.get(("requests_unpruned_total", "switched off by the request"), 0) == (
        outcome == "read"
    )
    assert changed.get(("requests_pruned_total", ""), 0) == (outcome == "ignored")
    assert (changed.get(("visual_tokens_seen_total", ""), 0) > 0) == (
        outcome in ("read", "ignored")
    )


def test_the_documentation_says_where_a_request_may_set_a_budget():
    text = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `/")]
    told = {}
    for paths, _, own in rows:
        for path in paths.split(","):
            told[path.strip().strip("`")] = own.strip()
    for outcome, paths in REACHES.items():
        for path in paths:
            assert path in told, f"docs/sglang.md does not name {path}"
            said = "custom_params" if outcome == "read" else outcome
            assert said in told[path], f"docs/sglang.md says of {path}: {told[path]}"


def test_streamed_answer_says_it_once(server):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    body = {
        "text": "<|vision_start|><|image_pad|><|vision_end|>what number is written?",
        "image_data": picture_url(picture),
        "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        "stream": True,
    }
    request = urllib.request.Request(
        f"{address}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line[6:] for line in response.read().decode().splitlines() if "data: {" in line]
    last = json.loads(lines[-1])["meta_info"]
    assert last["entropyprune"] == [{"visual_tokens": 144, "kept": 100}]


def test_log_names_no_leak(server):
    _, log = server
    assert "leak" not in log.read_text().lower()
